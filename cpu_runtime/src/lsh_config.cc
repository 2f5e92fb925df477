// What LshAttention is told once: its attributes and projection, and whether a call and its states fit them.
#include <algorithm>
#include <cmath>

#include "call.h"
#include "inclusion.h"
#include "lsh.h"

namespace attnspan {
namespace {

std::string text(int64_t v) { return std::to_string(v); }

}  // namespace

std::string LshConfig::check() const {
  const auto range = [](const char* name, int64_t got, int64_t low, int64_t high) {
    if (got >= low && got <= high) return std::string();
    return std::string(name) + " is " + text(got) + "; allowed are " + text(low) + " to " + text(high);
  };
  std::string wrong = SpanConfig{heads, kv_heads, std::vector<int64_t>(size_t(std::max<int64_t>(kv_heads, 0)), INT32_MAX), sink, scale, softcap}.check();
  if (wrong.empty()) wrong = range("sink", sink, 0, kSegment);
  if (wrong.empty()) wrong = range("window", window, 1, INT32_MAX);
  if (wrong.empty()) wrong = range("dense_below", dense_below, -1, INT32_MAX);
  if (wrong.empty() && !(min_inclusion >= 0.f && min_inclusion <= 1.f))
    return "min_inclusion is " + std::to_string(min_inclusion) + "; allowed are 0 to 1";
  if (wrong.empty() && !(guard >= 0.f && guard <= 1.f)) return "guard is " + std::to_string(guard) + "; allowed are 0 to 1";
  if (index.kind == IndexKind::tables) {
    if (wrong.empty()) wrong = range("bits", index.bits, 1, 15);
    if (wrong.empty()) wrong = range("tables", index.tables, 1, 1024);
    if (wrong.empty()) wrong = range("min_collisions", index.min_collisions, 1, std::min<int64_t>(4, index.tables));
  }
  if (index.kind == IndexKind::signature && wrong.empty()) {
    const int64_t bits = index.signature_bits;
    if (bits != 64 && bits != 128 && bits != 256) return "signature_bits is " + text(bits) + "; allowed are 64, 128 and 256";
    if (int64_t(max_hamming.size()) != kv_heads)
      return "max_hamming has " + text(int64_t(max_hamming.size())) + " entries; kv_num_heads is " + text(kv_heads);
    for (int64_t most : max_hamming)
      if (wrong.empty()) wrong = range("max_hamming", most, 0, bits);
  }
  if (index.kind == IndexKind::sketch && wrong.empty()) {
    if (!(fraction > 0.f && fraction <= 0.5f)) return "fraction is " + std::to_string(fraction) + "; allowed are above 0, up to 0.5";
    if (min_inclusion > 0.f) return "min_inclusion is " + std::to_string(min_inclusion) + "; sketches know what they draw: leave it 0";
  }
  return wrong;
}

LshTables::LshTables(const LshConfig& config, const float* projection, int64_t dim_)
    : dim(dim_), depth(round_up(dim_, 32)), panels(2 * config.index.row_words()), of_head(size_t(config.kv_heads), 0) {
  if (config.index.kind == IndexKind::exact) return;
  if (config.index.kind == IndexKind::sketch) {
    signs.assign(projection, projection + dim * kRounds);
    return;
  }
  const int64_t columns = config.index.columns();
  panel.assign(size_t(panels * depth * kColumns), 0);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t d = 0; d < dim; ++d) {
      bf16 rounded;
      from_float(projection[d * columns + c], rounded);
      panel[size_t((c / kColumns * depth + d / 2 * 2) * kColumns + c % kColumns * 2 + d % 2)] = rounded.bits;
    }
  std::vector<int64_t> known;
  for (int64_t h = 0; h < config.kv_heads; ++h) {
    const int64_t most = config.index.kind == IndexKind::signature ? config.max_hamming[size_t(h)] : 0;
    const auto found = std::find(known.begin(), known.end(), most);
    of_head[size_t(h)] = found - known.begin();
    if (found == known.end()) known.push_back(most), log_inclusion.push_back(attnspan::log_inclusion(config.index, most, config.min_inclusion));
  }
}

void LshTables::hash(const Kernels& kernels, const float* x, int64_t rows, uint64_t* bits, void* scratch) const {
  if (signs.empty()) return kernels.hash({x, rows, dim, depth, panel.data(), panels, bits, scratch});
  const int64_t words = (sketch_planes(dim) + 2 + 7) / 8;
  kernels.encode({{const_cast<float*>(x), rows, dim, signs.data(), static_cast<float*>(scratch)}, reinterpret_cast<uint8_t*>(bits), words * 8});
}

uint64_t fingerprint(const float* projection, int64_t count) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  const auto* bytes = reinterpret_cast<const unsigned char*>(projection);
  for (int64_t i = 0; i < count * 4; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3;
  return hash;
}

int64_t state_bytes(const LshConfig& config, int64_t dim, int64_t capacity) {
  return IndexLayout(config.index, config.kv_heads, dim, capacity).bytes;
}

std::string open_states(const LshConfig& config, const SpanCall& call, int64_t capacity, void* state) {
  const IndexLayout layout(config.index, config.kv_heads, call.head_dim, capacity);
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t length = call.length[b];
    if (length < 0 || length + call.tokens > capacity)
      return "length of row " + text(b) + " is " + text(length) + " and the call adds " + text(call.tokens) +
             "; the caches hold " + text(capacity) + " tokens a head: export with a larger --n-max";
    const std::string wrong = Index(config.index, layout, config.sink, static_cast<char*>(state) + b * layout.bytes).open(length);
    if (!wrong.empty()) return "row " + text(b) + ": " + wrong;
  }
  return "";
}

}  // namespace attnspan
