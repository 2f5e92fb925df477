#include "merge.h"

#include <algorithm>
#include <cmath>

#include "call.h"

namespace attnspan {

void merge_attention(const MergeCall& call, const Kernels& kernels, const Parallel& parallel) {
  const int64_t dim = call.head_dim, bytes = dim * size_of(call.activation);
  parallel(call.batch * call.tokens, [&](int64_t at) {
    float *sum = reinterpret_cast<float*>(task_scratch.get(2 * dim * 4)), *part = sum + dim;
    const int64_t b = at / call.tokens, t = at % call.tokens;
    for (int64_t h = 0; h < call.heads; ++h) {
      const int64_t row = (b * call.heads + h) * call.tokens + t, to = (at * call.heads + h) * bytes;
      const float each[2] = {call.part_lse[0][row], call.part_lse[1][row]};
      const float top = std::max(each[0], each[1]);
      const float lse = top == -INFINITY ? top : top + std::log(std::exp(each[0] - top) + std::exp(each[1] - top));
      std::fill_n(sum, dim, 0.f);
      for (int i = 0; i < 2; ++i) {
        if (each[i] == -INFINITY) continue;
        kernels.load(call.activation, static_cast<const char*>(call.part[i]) + to, std::exp(each[i] - lse), part, dim);
        for (int64_t d = 0; d < dim; ++d) sum[d] += part[d];
      }
      kernels.store(call.activation, sum, 1.f, static_cast<char*>(call.output) + to, dim);
      if (call.lse) call.lse[row] = lse;
    }
  });
}

}  // namespace attnspan
