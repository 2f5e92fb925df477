#include "merge.h"

#include <algorithm>
#include <cmath>

#include "call.h"

namespace attnspan {

float merge_head(const Kernels& kernels, DType type, const void* const part[2], const float lse[2], int64_t dim, float* output,
                 float* scratch) {
  const float top = std::max(lse[0], lse[1]);
  const float both = top == -INFINITY ? top : top + std::log(std::exp(lse[0] - top) + std::exp(lse[1] - top));
  bool empty = true;
  for (int i = 0; i < 2; ++i) {
    if (lse[i] == -INFINITY) continue;
    // A part alone keeps its bits.
    kernels.load(type, part[i], std::exp(lse[i] - both), empty ? output : scratch, dim);
    for (int64_t d = 0; d < dim && !empty; ++d) output[d] += scratch[d];
    empty = false;
  }
  if (empty) std::fill_n(output, dim, 0.f);
  return both;
}

void merge_attention(const MergeCall& call, const Kernels& kernels, const Parallel& parallel) {
  const int64_t dim = call.head_dim, bytes = dim * size_of(call.activation);
  parallel(call.batch * call.tokens, [&](int64_t at) {
    float *sum = reinterpret_cast<float*>(task_scratch.get(2 * dim * 4)), *part = sum + dim;
    const int64_t b = at / call.tokens, t = at % call.tokens;
    for (int64_t h = 0; h < call.heads; ++h) {
      const int64_t row = (b * call.heads + h) * call.tokens + t, to = (at * call.heads + h) * bytes;
      const void* const each[2] = {static_cast<const char*>(call.part[0]) + to, static_cast<const char*>(call.part[1]) + to};
      const float each_lse[2] = {call.part_lse[0][row], call.part_lse[1][row]};
      const float lse = merge_head(kernels, call.activation, each, each_lse, dim, sum, part);
      kernels.store(call.activation, sum, 1.f, static_cast<char*>(call.output) + to, dim);
      if (call.lse) call.lse[row] = lse;
    }
  });
}

}  // namespace attnspan
