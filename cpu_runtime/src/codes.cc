#include "codes.h"

#include <algorithm>
#include <cstring>

#include "call.h"

namespace attnspan {
namespace {

constexpr int64_t kTaskTokens = 16;  // tokens of a task: all their heads are hashed in one pass over the projection

}  // namespace

void cut_codes(const IndexConfig& index, const uint64_t* bits, uint16_t* codes) {
  for (int64_t l = 0; l < index.tables; ++l) {
    const int64_t bit = l * index.bits, shift = bit % 64;
    const uint64_t low = bits[bit / 64] >> shift, high = shift + index.bits > 64 ? bits[bit / 64 + 1] << (64 - shift) : 0;
    codes[l] = uint16_t((low | high) & uint64_t(index.buckets() - 1));
  }
}

void hash_codes(const CodesCall& call, const IndexConfig& index, const LshTables& tables, const Kernels& kernels, const Parallel& parallel) {
  const int64_t dim = tables.dim, heads = call.heads, words = index.row_words(), bytes = code_words(index) * 4;
  const int64_t blocks = (call.tokens + kTaskTokens - 1) / kTaskTokens;
  parallel(call.batch * blocks, [&](int64_t task) {
    const int64_t b = task / blocks, first = b * call.tokens + task % blocks * kTaskTokens;
    const int64_t rows = (std::min((b + 1) * call.tokens, first + kTaskTokens) - first) * heads;
    Carver carve(task_scratch.get(rows * (dim * 4 + words * 8) + tables.scratch() + 192));
    float* x = carve.take<float>(rows * dim);
    uint64_t* bits = carve.take<uint64_t>(rows * words);
    char* scratch = carve.take<char>(tables.scratch());
    kernels.load(call.activation, static_cast<const char*>(call.x) + first * heads * dim * size_of(call.activation), 1.f, x, rows * dim);
    if (call.mean)
      for (int64_t i = 0; i < rows * dim; ++i) x[i] -= call.mean[b * heads * dim + i % (heads * dim)];
    tables.hash(kernels, x, rows, bits, scratch);
    char* to = static_cast<char*>(call.codes) + first * heads * bytes;
    for (int64_t r = 0; r < rows; ++r) {
      if (index.kind == IndexKind::tables) {
        cut_codes(index, bits + r * words, reinterpret_cast<uint16_t*>(to + r * bytes));
      } else {
        std::memcpy(to + r * bytes, bits + r * words, size_t(bytes));
      }
    }
  });
}

}  // namespace attnspan
