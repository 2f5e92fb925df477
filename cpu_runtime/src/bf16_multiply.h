// The bf16 matrix product of prefill: AMX tiles, AVX512-BF16 dot products, or plain loops that compute the same for tests.
//
//   c[i, r] += sum_k a[i, k] * b[k, r]      i < M, M a multiple of 16; k < depth, a multiple of 32; r < kPanel
//
// a: bf16, row-major with `stride` elements a row. b: bf16 pairs [depth / 2, kPanel, 2], so that one 32-bit lane holds two
// consecutive k of one r (the "VNNI" layout). c: fp32 [M, kPanel].
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__) || defined(__AVX512BF16__) || defined(ATTNSPAN_EMULATE_BF16)
#define ATTNSPAN_BF16_MULTIPLY 1

namespace {

#if defined(__AMX_BF16__)

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

ATTNSPAN_INLINE void multiply_begin() {
  const TileConfig config;
  _tile_loadconfig(&config);
}
ATTNSPAN_INLINE void multiply_end() { _tile_release(); }

ATTNSPAN_INLINE void multiply_bf16(const bf16* a, int64_t stride, const bf16* b, int64_t depth, int64_t m, float* c) {
  static_assert(kPanel == 32, "two tiles wide");
  constexpr int64_t pair_row = kPanel * 4, sum_row = kPanel * 4;  // bytes of a row of b and of c
  asm volatile("" ::: "memory");  // the tile loads do not tell the compiler that they read memory: have it written by now
  for (int64_t i = 0; i < m;) {
    const bool two = m - i >= 32;
    float *c0 = c + i * kPanel, *c1 = c0 + 16 * kPanel;
    const bf16 *a0 = a + i * stride, *a1 = a0 + 16 * stride;
    _tile_loadd(0, c0, sum_row);
    _tile_loadd(1, c0 + 16, sum_row);
    if (two) {
      _tile_loadd(2, c1, sum_row);
      _tile_loadd(3, c1 + 16, sum_row);
    }
    for (int64_t k = 0; k < depth; k += 32) {
      const bf16* pairs = b + k * kPanel;
      _tile_loadd(4, a0 + k, stride * 2);
      _tile_loadd(6, pairs, pair_row);
      _tile_loadd(7, pairs + 32, pair_row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (two) {
        _tile_loadd(5, a1 + k, stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c0, sum_row);
    _tile_stored(1, c0 + 16, sum_row);
    if (two) {
      _tile_stored(2, c1, sum_row);
      _tile_stored(3, c1 + 16, sum_row);
    }
    i += two ? 32 : 16;
  }
}

#elif defined(__AVX512BF16__)

ATTNSPAN_INLINE void multiply_begin() {}
ATTNSPAN_INLINE void multiply_end() {}

ATTNSPAN_INLINE void multiply_bf16(const bf16* a, int64_t stride, const bf16* b, int64_t depth, int64_t m, float* c) {
  constexpr int M = 8;  // 16 accumulators, two loads of b, one broadcast
  for (int64_t i = 0; i < m; i += M) {
    __m512 sum[M][2];
    for (int j = 0; j < M; ++j)
      for (int h = 0; h < 2; ++h) sum[j][h] = _mm512_loadu_ps(c + (i + j) * kPanel + h * W);
    for (int64_t k = 0; k < depth; k += 2) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * kPanel), b1 = (__m512bh)_mm512_loadu_si512(b + k * kPanel + 2 * W);
      for (int j = 0; j < M; ++j) {
        int32_t pair;
        std::memcpy(&pair, a + (i + j) * stride + k, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        sum[j][0] = _mm512_dpbf16_ps(sum[j][0], x, b0);
        sum[j][1] = _mm512_dpbf16_ps(sum[j][1], x, b1);
      }
    }
    for (int j = 0; j < M; ++j)
      for (int h = 0; h < 2; ++h) _mm512_storeu_ps(c + (i + j) * kPanel + h * W, sum[j][h]);
  }
}

#else

ATTNSPAN_INLINE void multiply_begin() {}
ATTNSPAN_INLINE void multiply_end() {}

ATTNSPAN_INLINE void multiply_bf16(const bf16* a, int64_t stride, const bf16* b, int64_t depth, int64_t m, float* c) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t r = 0; r < kPanel; ++r)
        c[i * kPanel + r] += to_float(a[i * stride + k]) * to_float(b[k / 2 * 2 * kPanel + 2 * r + k % 2]);
}

#endif

}  // namespace
#endif
