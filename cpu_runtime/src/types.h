// Element types of activations and caches, and their scalar conversions to and from float.
#pragma once

#include <cstdint>
#include <cstring>

namespace attnspan {

enum class DType : int { f32, f16, bf16, i8 };

inline int64_t size_of(DType t) {
  return t == DType::f32 ? 4 : t == DType::i8 ? 1 : 2;
}

inline const char* name_of(DType t) {
  return t == DType::f32 ? "float32" : t == DType::f16 ? "float16" : t == DType::bf16 ? "bfloat16" : "int8";
}

}  // namespace attnspan

// The functions below are compiled once per instruction set. Internal linkage keeps the linker from picking an AVX-512 copy
// for everybody, which would end in an illegal instruction on an older processor.
namespace {  // NOLINT

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
inline float to_float(int8_t x) { return float(x); }
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
  return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000)));
}

// All conversions round to nearest, ties to even, as NumPy, PyTorch and ONNX Cast do.
inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, bf16& out) {
  const uint32_t u = to_bits(x);
  out.bits = (u & 0x7fffffff) > 0x7f800000 ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void from_float(float x, f16& out) {
  const uint32_t u = to_bits(x), sign = u >> 16 & 0x8000, mag = u & 0x7fffffff;
  if (mag > 0x7f800000) {
    out.bits = uint16_t(sign | 0x7e00);
  } else if (mag >= 0x477ff000) {  // rounds to 65536 or more
    out.bits = uint16_t(sign | 0x7c00);
  } else if (mag < 0x38800000) {  // subnormal half: adding 0.5 leaves the rounded result in the low mantissa bits
    out.bits = uint16_t(sign | (to_bits(from_bits(mag) + 0.5f) - 0x3f000000));
  } else {
    out.bits = uint16_t(sign | (mag - 0x38000000 + 0xfff + (mag >> 13 & 1)) >> 13);
  }
}
inline void from_float(float x, int8_t& out) {
  x = x > 127.f ? 127.f : x < -127.f ? -127.f : x;
  // Adding 1.5 * 2^23 rounds to the nearest even integer in the mantissa; NaN becomes 0.
  out = x == x ? int8_t(int32_t(to_bits(x + 12582912.f)) - int32_t(0x4b400000)) : int8_t(0);
}

}  // namespace
