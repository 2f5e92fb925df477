// SimHash: signs of a row's products with random columns, packed into words.
//
// Rows and columns are bfloat16 numbers and sums are fp32, so that matrix units and plain vectors find the same bits but for sums that
// rounding alone decides.
#pragma once

#include "bf16_multiply.h"
#include "kernels.h"
#include "simd.h"

namespace {

constexpr int64_t kHashRows = 64;  // rows whose products with a panel are kept at a time

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

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)

static_assert(attnspan::kColumns == kPanel);

// rows: a multiple of 16.
ATTNSPAN_INLINE void hash_panel(const bf16* x, int64_t rows, int64_t depth, const bf16* panel, uint32_t* bits, int64_t step) {
  alignas(64) float sum[kHashRows * kPanel];
  std::memset(sum, 0, size_t(rows * kPanel * 4));
  multiply_bf16(x, depth, panel, depth, rows, sum);
  for (int64_t r = 0; r < rows; ++r) bits[r * step] = positive(load(sum + r * kPanel)) | positive(load(sum + r * kPanel + W)) << W;
}

#else

// R rows against two vectors of columns; a 32-bit lane of the panel holds two dimensions of one column.
template <int R>
ATTNSPAN_INLINE void hash_rows(const bf16* x, int64_t depth, const bf16* panel, int shift, uint32_t* bits, int64_t step) {
  vf sum[R][2] = {};
  for (int64_t d = 0; d < depth; d += 2) {
    vf low[2], high[2];
    for (int n = 0; n < 2; ++n) {
      vu pair;
      std::memcpy(&pair, panel + d * attnspan::kColumns + (shift + n * W) * 2, sizeof pair);
      low[n] = (vf)(pair << 16), high[n] = (vf)(pair & 0xffff0000u);
    }
    for (int r = 0; r < R; ++r) {
      const vf a = splat(to_float(x[r * depth + d])), b = splat(to_float(x[r * depth + d + 1]));
      for (int n = 0; n < 2; ++n) sum[r][n] += a * low[n] + b * high[n];
    }
  }
  for (int r = 0; r < R; ++r) bits[r * step] |= (positive(sum[r][0]) | positive(sum[r][1]) << W) << shift;
}

ATTNSPAN_INLINE void hash_panel(const bf16* x, int64_t rows, int64_t depth, const bf16* panel, uint32_t* bits, int64_t step) {
  constexpr int R = kRegisters == 32 ? 8 : 4;
  for (int64_t r = 0; r < rows; ++r) bits[r * step] = 0;
  for (int shift = 0; shift < attnspan::kColumns; shift += 2 * W)
    for (int64_t r = 0; r < rows; r += R) hash_rows<R>(x + r * depth, depth, panel, shift, bits + r * step, step);
}

#endif

void hash_any(const attnspan::HashTask& task) {
  const int64_t depth = task.depth, words = task.panels;
  bf16* rows = static_cast<bf16*>(task.scratch);
  uint32_t* bits = reinterpret_cast<uint32_t*>(rows + kHashRows * depth);
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
  multiply_begin();
#endif
  for (int64_t first = 0; first < task.rows; first += kHashRows) {
    const int64_t count = task.rows - first < kHashRows ? task.rows - first : kHashRows, padded = (count + 15) / 16 * 16;
    std::memset(rows, 0, size_t(padded * depth * 2));
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < task.dim; ++d) from_float(task.x[(first + r) * task.dim + d], rows[r * depth + d]);
    // A panel stays in the first cache while the rows pass it.
    for (int64_t p = 0; p < words; ++p)
      hash_panel(rows, padded, depth, static_cast<const bf16*>(task.panel) + p * depth * attnspan::kColumns, bits + p, words);
    std::memcpy(reinterpret_cast<uint32_t*>(task.bits) + first * words, bits, size_t(count * words * 4));
  }
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
  multiply_end();
#endif
}

}  // namespace
