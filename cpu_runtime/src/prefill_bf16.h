// Prefill on matrix units: the two products of prefill.h in bf16 with fp32 sums, for bf16 and int8 caches.
//
// Keys and values are exact in bf16. A query (or a softmax weight) that is not is split into high + low = two bf16 numbers that
// hold 16 of its 24 bits, at the price of a second product: activations in fp32 keep close to fp32 results.
#pragma once

#include "bf16_multiply.h"
#include "prefill.h"

#if defined(ATTNSPAN_BF16_MULTIPLY)

namespace {

ATTNSPAN_INLINE bool suits_bf16(attnspan::DType cache, int64_t dim) {
  return (cache == attnspan::DType::bf16 || cache == attnspan::DType::i8) && dim % 32 == 0;
}

// Splits x into bf16 high + low; low is 0 when x is exact.
ATTNSPAN_INLINE void split(float x, bf16& high, bf16& low) {
  from_float(x, high);
  from_float(x - to_float(high), low);
}

// Rounds two vectors to bf16 and pairs their lanes: lane r = (even[r], odd[r]), as the product wants them.
ATTNSPAN_INLINE vu pair_bf16(vf even, vf odd) {
  const vu e = (vu)even, o = (vu)odd;
  const vu low = (e + 0x7fffu + ((e >> 16) & 1u)) >> 16, high = (o + 0x7fffu + ((o >> 16) & 1u)) & 0xffff0000u;
  return low | high;
}
ATTNSPAN_INLINE vf low_half(vu pair) { return (vf)(pair << 16); }
ATTNSPAN_INLINE vf high_half(vu pair) { return (vf)(pair & 0xffff0000u); }

// The queries as pairs [padded rows / panel, dim / 2, panel, 2]: high parts, then low parts behind them. They replace the fp32
// panels of the same size.
void pack_query_bf16(const attnspan::PrefillTask& task, const attnspan::PrefillScratch& scratch) {
  const int64_t rows = task.rows(), dim = task.head_dim;
  for (int64_t r = 0; r < rows; r += kPanel) {
    bf16* high = reinterpret_cast<bf16*>(scratch.query_panel + r * dim);
    bf16* low = high + kPanel * dim;
    for (int64_t j = 0; j < kPanel; ++j)
      for (int64_t d = 0; d < dim; ++d) {
        const int64_t at = d / 2 * 2 * kPanel + 2 * j + d % 2;
        split(r + j < rows ? scratch.query[(r + j) * dim + d] : 0.f, high[at], low[at]);
      }
  }
}

ATTNSPAN_INLINE bf16 as_bf16(bf16 x) { return x; }
ATTNSPAN_INLINE bf16 as_bf16(int8_t x) {
  bf16 out;
  from_float(float(x), out);  // exact: 8 significant bits
  return out;
}

template <class C>
void prefill_tile_bf16(const attnspan::PrefillTask& task, const attnspan::KeyTile& tile, const attnspan::PrefillScratch& scratch) {
  using attnspan::kKeyTile;
  const int64_t dim = task.head_dim, keys = tile.count[0] + tile.count[1], last = tile.first + keys - 1;
  const bool sink = last < task.sink;
  const int parts = task.exact ? 1 : 2;

  // Keys [kKeyTile, dim] and values transposed [dim, kKeyTile], zero behind the last key.
  const bf16* key = static_cast<const bf16*>(tile.key[0]);
  if (sizeof(C) != sizeof(bf16) || keys < kKeyTile || tile.count[1] > 0 || tile.stride[0] != dim) {
    bf16* to = reinterpret_cast<bf16*>(scratch.key);
    key = to;
    for (int run = 0; run < 2; ++run)
      for (int64_t t = 0; t < tile.count[run]; ++t)
        for (int64_t i = 0; i < dim; ++i) *to++ = as_bf16(static_cast<const C*>(tile.key[run])[t * tile.stride[run] + i]);
    std::memset(to, 0, size_t((kKeyTile - keys) * dim) * sizeof(bf16));
  }
  bf16* value = reinterpret_cast<bf16*>(scratch.value);
  if (keys < kKeyTile) std::memset(value, 0, size_t(kKeyTile * dim) * sizeof(bf16));
  for (int64_t t = 0; t < keys; ++t) {
    const C* row = t < tile.count[0] ? static_cast<const C*>(tile.value[0]) + t * tile.stride[0]
                                     : static_cast<const C*>(tile.value[1]) + (t - tile.count[0]) * tile.stride[1];
    for (int64_t d = 0; d < dim; ++d) value[d * kKeyTile + t] = as_bf16(row[d]);
  }

  alignas(64) uint32_t weights[2][kKeyTile / 2 * kPanel];
  multiply_begin();
  for (int64_t r = 0; r < task.rows(); r += kPanel) {
    const Sight sight = see(task, tile.first, last, sink, r);
    if (!sight.any) continue;
    float *scores = scratch.scores, *acc = scratch.state.acc + r * dim;
    const bf16* query = reinterpret_cast<const bf16*>(scratch.query_panel + r * dim);
    std::memset(scores, 0, sizeof(float) * kKeyTile * kPanel);
    for (int part = 0; part < parts; ++part) multiply_bf16(key, dim, query + part * kPanel * dim, dim, kKeyTile, scores);
    for (int64_t i = 0; i < keys * kPanel; i += W) store(scores + i, load(scores + i) * task.scale);
    vf f[2];
    weigh(task, tile.first, keys, sink, sight.all, r, scratch, f[0], f[1]);
    std::memset(scores + keys * kPanel, 0, sizeof(float) * size_t((kKeyTile - keys) * kPanel));
    for (int64_t t = 0; t < kKeyTile; t += 2)
      for (int h = 0; h < kPanel; h += W) {
        const vf even = load(scores + t * kPanel + h), odd = load(scores + (t + 1) * kPanel + h);
        const vu high = pair_bf16(even, odd), low = pair_bf16(even - low_half(high), odd - high_half(high));
        std::memcpy(&weights[0][t / 2 * kPanel + h], &high, sizeof high);
        std::memcpy(&weights[1][t / 2 * kPanel + h], &low, sizeof low);
      }
    for (int64_t i = 0; i < dim * kPanel; i += W) store(acc + i, load(acc + i) * f[i / W % 2]);
    for (int part = 0; part < parts; ++part)
      multiply_bf16(value, kKeyTile, reinterpret_cast<const bf16*>(weights[part]), kKeyTile, dim, acc);
  }
  multiply_end();
}

}  // namespace
#endif
