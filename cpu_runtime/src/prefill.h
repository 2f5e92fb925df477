// Prefill: many query rows against tiles of keys, as two small matrix products around a softmax.
//
// Everything is computed transposed: scores^T = K Q^T and out^T = V^T P^T. Query rows then run along the vector lanes, K and V
// are broadcast operands in the layout they are stored in, nothing is transposed per tile and the softmax is purely vertical.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

// c[i, :] += sum_k a[i * row + k * col] * b[k, :] for i < M, with c given by its first two vectors of each row.
template <int M>
ATTNSPAN_INLINE void multiply(const float* a, int64_t row, int64_t col, const float* b, int64_t depth, vf (&c)[M][2]) {
  for (int64_t k = 0; k < depth; ++k) {
    const vf b0 = load(b + k * kPanel), b1 = load(b + k * kPanel + W);
    for (int i = 0; i < M; ++i) {
      const vf x = splat(a[i * row + k * col]);
      c[i][0] += x * b0;
      c[i][1] += x * b1;
    }
  }
}

template <int M>
ATTNSPAN_INLINE void score_rows(const float* key, const float* query, int64_t dim, float* scores) {
  vf c[M][2] = {};
  multiply<M>(key, dim, 1, query, dim, c);
  for (int i = 0; i < M; ++i) store(scores + i * kPanel, c[i][0]), store(scores + i * kPanel + W, c[i][1]);
}

template <int M>
ATTNSPAN_INLINE void value_rows(const float* value, const float* p, int64_t keys, int64_t dim, vf f0, vf f1, float* acc) {
  vf c[M][2];
  for (int i = 0; i < M; ++i) c[i][0] = load(acc + i * kPanel) * f0, c[i][1] = load(acc + i * kPanel + W) * f1;
  multiply<M>(value, 1, dim, p, keys, c);
  for (int i = 0; i < M; ++i) store(acc + i * kPanel, c[i][0]), store(acc + i * kPanel + W, c[i][1]);
}

// Calls f<M>(i) so that the steps cover [0, n): M is 12 or 6 where it fits (as many accumulators as registers allow).
#define ATTNSPAN_COVER(n, call)                               \
  for (int64_t i = 0, left; (left = (n) - i) > 0;) {          \
    if (kRegisters == 32 && left >= 12 && left != 16) {       \
      call(12);                                               \
      i += 12;                                                \
    } else if (kRegisters == 32 && left >= 8) {               \
      call(8);                                                \
      i += 8;                                                 \
    } else if (left >= 6 && left != 8) {                      \
      call(6);                                                \
      i += 6;                                                 \
    } else if (left >= 4) {                                   \
      call(4);                                                \
      i += 4;                                                 \
    } else {                                                  \
      call(1);                                                \
      i += 1;                                                 \
    }                                                         \
  }

ATTNSPAN_INLINE vf hide(vf s, const int32_t* position, int32_t key, int32_t window, bool sink) {
  vi q;
  std::memcpy(&q, position, sizeof q);
  const vi behind = q - key;
  const vi seen = sink ? behind >= 0 : (behind >= 0) & (behind < window);
  return seen ? s : splat(-INFINITY);
}

// Scores of one panel become exp(score - max); returns the factors by which earlier sums and accumulators shrink.
ATTNSPAN_INLINE void softmax_panel(float* scores, int64_t keys, float* max_, float* sum_, vf& f0, vf& f1) {
  const vf m0 = load(max_), m1 = load(max_ + W);
  vf top0 = m0, top1 = m1;
  for (int64_t t = 0; t < keys; ++t) top0 = max(top0, load(scores + t * kPanel)), top1 = max(top1, load(scores + t * kPanel + W));
  // A row that has seen no key yet keeps -inf as its maximum; subtracting 0 instead keeps its weights at exp(-inf) = 0.
  const vf s0 = top0 == -INFINITY ? splat(0.f) : top0, s1 = top1 == -INFINITY ? splat(0.f) : top1;
  vf l0 = {}, l1 = {};
  for (int64_t t = 0; t < keys; ++t) {
    const vf e0 = exp(load(scores + t * kPanel) - s0), e1 = exp(load(scores + t * kPanel + W) - s1);
    store(scores + t * kPanel, e0), store(scores + t * kPanel + W, e1);
    l0 += e0, l1 += e1;
  }
  f0 = exp(m0 - s0), f1 = exp(m1 - s1);
  store(max_, top0), store(max_ + W, top1);
  store(sum_, load(sum_) * f0 + l0), store(sum_ + W, load(sum_ + W) * f1 + l1);
}

template <class C>
ATTNSPAN_INLINE const float* widen(const void* const (&from)[2], const attnspan::KeyTile& tile, int64_t dim, float* to) {
  const bool whole = tile.count[1] == 0 && tile.stride[0] == dim;
  if (sizeof(C) == 4 && whole) return static_cast<const float*>(from[0]);  // fp32 in one run: used where it lies
  float* out = to;
  for (int run = 0; run < 2; ++run)
    for (int64_t t = 0; t < tile.count[run]; ++t, out += dim) {
      const C* p = static_cast<const C*>(from[run]) + t * tile.stride[run];
      int64_t i = 0;
      for (; i + W <= dim; i += W) store(out + i, load(p + i));
      for (; i < dim; ++i) out[i] = to_float(p[i]);
    }
  return to;
}

// Whether a panel of rows sees any key of a tile, and whether every row sees every key.
struct Sight {
  bool any, all;
};

ATTNSPAN_INLINE Sight see(const attnspan::PrefillTask& task, int64_t first, int64_t last, bool sink, int64_t r) {
  const int64_t end = r + kPanel < task.rows() ? r + kPanel : task.rows();
  const int64_t low = task.first + r / task.group, high = task.first + (end - 1) / task.group;  // positions of the rows
  return {first <= high && (sink || low - last < task.window), last <= low && (sink || high - first < task.window)};
}

// Scores of one panel become softmax weights: soft cap, mask, online softmax.
ATTNSPAN_INLINE void weigh(const attnspan::PrefillTask& task, int64_t first, int64_t keys, bool sink, bool all, int64_t r,
                           const attnspan::PrefillScratch& scratch, vf& f0, vf& f1) {
  float* scores = scratch.scores;
  if (task.softcap != 0.f)
    for (int64_t i = 0; i < keys * kPanel; i += W) store(scores + i, soft_cap(load(scores + i), task.softcap));
  if (!all)
    for (int64_t t = 0; t < keys; ++t)
      for (int h = 0; h < kPanel; h += W) {
        float* s = scores + t * kPanel + h;
        store(s, hide(load(s), scratch.position + r + h, int32_t(first + t), int32_t(task.window), sink));
      }
  softmax_panel(scores, keys, scratch.state.max + r, scratch.state.sum + r, f0, f1);
}

template <class C>
void prefill_tile(const attnspan::PrefillTask& task, const attnspan::KeyTile& tile, const attnspan::PrefillScratch& scratch) {
  const int64_t dim = task.head_dim, keys = tile.count[0] + tile.count[1], last = tile.first + keys - 1;
  const float* key = widen<C>(tile.key, tile, dim, scratch.key);
  const float* value = widen<C>(tile.value, tile, dim, scratch.value);
  const bool sink = last < task.sink;
  for (int64_t r = 0; r < task.rows(); r += kPanel) {
    const Sight sight = see(task, tile.first, last, sink, r);
    if (!sight.any) continue;
    const float* query = scratch.query_panel + r * dim;
    float *scores = scratch.scores, *acc = scratch.state.acc + r * dim;
#define ATTNSPAN_CALL(M) score_rows<M>(key + i * dim, query, dim, scores + i * kPanel)
    ATTNSPAN_COVER(keys, ATTNSPAN_CALL)
#undef ATTNSPAN_CALL
    vf f0, f1;
    weigh(task, tile.first, keys, sink, sight.all, r, scratch, f0, f1);
#define ATTNSPAN_CALL(M) value_rows<M>(value + i, scores, keys, dim, f0, f1, acc + i * kPanel)
    ATTNSPAN_COVER(dim, ATTNSPAN_CALL)
#undef ATTNSPAN_CALL
  }
}

void prefill_begin(const attnspan::PrefillTask& task, const attnspan::PrefillScratch& scratch) {
  const int64_t rows = task.rows(), dim = task.head_dim;
  for (int64_t r = 0; r < rows; r += kPanel)
    for (int64_t j = 0; j < kPanel; ++j) {
      const int64_t row = r + j;
      for (int64_t d = 0; d < dim; ++d)
        scratch.query_panel[r * dim + d * kPanel + j] = row < rows ? scratch.query[row * dim + d] * task.scale : 0.f;
      // Padding rows stand at the last query's position, so that they are masked like it.
      scratch.position[row] = int32_t(task.first + (row < rows ? row / task.group : task.tokens - 1));
      scratch.state.max[row] = -INFINITY;
      scratch.state.sum[row] = 0.f;
      for (int64_t d = 0; d < dim; ++d) scratch.state.acc[r * dim + d * kPanel + j] = 0.f;
    }
}

void prefill_end(const attnspan::PrefillTask& task, const attnspan::PrefillScratch& scratch) {
  const int64_t rows = task.rows(), dim = task.head_dim;
  for (int64_t row = 0; row < rows; ++row) {
    const float* acc = scratch.state.acc + row / kPanel * kPanel * dim + row % kPanel;
    for (int64_t d = 0; d < dim; ++d) scratch.query[row * dim + d] = acc[d * kPanel];
  }
}

}  // namespace
