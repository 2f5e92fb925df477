// SimHash: signs of a row's products with random columns, packed into 64-bit words.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

// Bit i: lane i is above zero.
ATTNSPAN_INLINE uint32_t positive(vf v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)(v > splat(0.f))));
#else
  uint32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= uint32_t(v[i] > 0.f) << i;
  return bits;
#endif
}

// R rows against one panel, N vectors of columns at a time. Every product is summed over the dimensions in order, so that a row's
// bits do not depend on the rows it is hashed with.
template <int R>
ATTNSPAN_INLINE void hash_rows(const float* x, int64_t dim, const float* panel, uint64_t* bits, int64_t step) {
  constexpr int N = 4, V = int(attnspan::kColumns) / W;
  uint64_t word[R] = {};
  for (int v = 0; v < V; v += N) {
    vf sum[R][N] = {};
    for (int64_t d = 0; d < dim; ++d) {
      vf column[N];
      for (int n = 0; n < N; ++n) column[n] = load(panel + d * attnspan::kColumns + (v + n) * W);
      for (int r = 0; r < R; ++r) {
        const vf a = splat(x[r * dim + d]);
        for (int n = 0; n < N; ++n) sum[r][n] += a * column[n];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) word[r] |= uint64_t(positive(sum[r][n])) << ((v + n) * W);
  }
  for (int r = 0; r < R; ++r) bits[r * step] = word[r];
}

void hash_any(const attnspan::HashTask& task) {
  constexpr int R = kRegisters == 32 ? 6 : 2;
  // A panel stays in the first cache while all rows pass it.
  for (int64_t p = 0; p < task.panel_count; ++p) {
    const float* panel = task.panels + p * task.dim * attnspan::kColumns;
    int64_t r = 0;
    for (; r + R <= task.rows; r += R)
      hash_rows<R>(task.x + r * task.dim, task.dim, panel, task.bits + r * task.panel_count + p, task.panel_count);
    for (; r < task.rows; ++r)
      hash_rows<1>(task.x + r * task.dim, task.dim, panel, task.bits + r * task.panel_count + p, task.panel_count);
  }
}

}  // namespace
