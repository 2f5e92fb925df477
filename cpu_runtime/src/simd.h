// Vectors of W floats in GCC/Clang vector extensions: one source, every instruction set; intrinsics only where the
// compiler needs help. Included once per instruction set, so everything has internal linkage.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "types.h"

#define ATTNSPAN_INLINE static inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kRegisters = 16;
#else
constexpr int W = 4;
constexpr int kRegisters = 16;
#endif

constexpr int kPanel = 2 * W;  // query rows that prefill handles together: two vectors

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int8_t vb __attribute__((vector_size(W)));

ATTNSPAN_INLINE vf splat(float x) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(x);
#else
  return vf{x, x, x, x};
#endif
}

// Makes the compiler keep a value in a register: folded into each use as a memory operand, one load would become several.
ATTNSPAN_INLINE void keep(vf& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#else
  (void)v;
#endif
}

ATTNSPAN_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// Written with intrinsics where they exist: compilers turn the generic conversions into element moves.
ATTNSPAN_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#elif defined(__AVX2__)
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
ATTNSPAN_INLINE vf load(const int8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vb b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
#endif
}
ATTNSPAN_INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

ATTNSPAN_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

ATTNSPAN_INLINE vf max(vf a, vf b) { return a > b ? a : b; }

ATTNSPAN_INLINE float sum_lanes(vf v) {
  float x[W], s = 0;
  store(x, v);
  for (int i = 0; i < W; ++i) s += x[i];
  return s;
}
// Lane sums of four vectors, written to out[0..3]: two in-lane shuffle-and-add steps, then the 128-bit lanes are added.
ATTNSPAN_INLINE void sum_lanes4(vf a, vf b, vf c, vf d, float* out) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_unpacklo_ps((__m512)a, (__m512)b) + _mm512_unpackhi_ps((__m512)a, (__m512)b);
  const __m512 cd = _mm512_unpacklo_ps((__m512)c, (__m512)d) + _mm512_unpackhi_ps((__m512)c, (__m512)d);
  const __m512d ab2 = (__m512d)ab, cd2 = (__m512d)cd;
  const __m512 abcd = (__m512)_mm512_unpacklo_pd(ab2, cd2) + (__m512)_mm512_unpackhi_pd(ab2, cd2);
  const __m128 low = _mm_add_ps(_mm512_castps512_ps128(abcd), _mm512_extractf32x4_ps(abcd, 1));
  const __m128 high = _mm_add_ps(_mm512_extractf32x4_ps(abcd, 2), _mm512_extractf32x4_ps(abcd, 3));
  _mm_storeu_ps(out, _mm_add_ps(low, high));
#elif defined(__AVX2__)
  const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
  out[0] = sum_lanes(a), out[1] = sum_lanes(b), out[2] = sum_lanes(c), out[3] = sum_lanes(d);
#endif
}

// Lane i becomes lane i xor S.
template <int S>
ATTNSPAN_INLINE vf swap_lanes(vf v) {
#if defined(__clang__)
  float in[W], out[W];
  store(in, v);
  for (int i = 0; i < W; ++i) out[i] = in[i ^ S];
  return load(out);
#else
  vi to;
  for (int i = 0; i < W; ++i) to[i] = i ^ S;
  return __builtin_shuffle(v, to);
#endif
}

// Largest of the lanes that are equal modulo P, and their sum, in all of them.
template <int P>
ATTNSPAN_INLINE vf max_modulo(vf v) {
  if constexpr (P < W) {
    return max_modulo<2 * P>(max(v, swap_lanes<P>(v)));
  } else {
    return v;
  }
}
template <int P>
ATTNSPAN_INLINE vf sum_modulo(vf v) {
  if constexpr (P < W) {
    return sum_modulo<2 * P>(v + swap_lanes<P>(v));
  } else {
    return v;
  }
}

ATTNSPAN_INLINE bool any_above(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(a > b)) != 0;
#else
  const vi above = a > b;
  return above[0] | above[1] | above[2] | above[3];
#endif
}

// exp(x) for x <= 88, about 1 ulp; results below 2^-126 become 0, exp(-inf) = 0.
ATTNSPAN_INLINE vf exp(vf x) {
  const vf low = splat(-87.33654f);
  const vf clamped = max(x, low);
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (clamped * 1.44269504f + magic) - magic;
  const vf r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const vi e = __builtin_convertvector(n, vi) << 23;
  const vf y = (vf)((vi)p + e);
  return x > low ? y : splat(0.f);
}

// cap * tanh(x / cap), the logit soft cap of Gemma 2.
ATTNSPAN_INLINE vf soft_cap(vf x, float cap) {
  vf t = x * (2.f / cap);
  t = t > 80.f ? splat(80.f) : t;
  return cap - 2.f * cap / (exp(t) + 1.f);
}

}  // namespace
