// Attention to drawn keys: as decode.h, but the rows lie scattered, and each score is corrected by the probability of its draw.
//
// A block of kRows rows passes: products with the centred key and its norm in one pass over the row; cosines; log u from a table (or, of
// sketches, known log p); online softmax; acc += p.V. A head that did not draw a row of its siblings gives it the score -inf.
#pragma once

#include "decode.h"
#include "kernels.h"
#include "simd.h"

namespace {

constexpr int kRows = 32;

static_assert(attnspan::kPad >= kRows + 4);

ATTNSPAN_INLINE vf square_root(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < W; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// log u at each cosine, between the points of the table in straight lines. A key without length (NaN) counts as orthogonal.
ATTNSPAN_INLINE vf log_inclusion(const float* table, vf cosine) {
  constexpr float points = float(attnspan::kInclusion), end = points - 0.001f;
  vf x = 0.5f - 0.5f * cosine;  // sin(theta / 2) squared
  x = x == x ? x : splat(0.5f);
  x = square_root(x > 0.f ? x : splat(0.f)) * points;
  x = x < end ? x : splat(end);
  const vi at = __builtin_convertvector(x, vi);
  const vf part = x - __builtin_convertvector(at, vf);
#if defined(__AVX512F__)
  const vf low = (vf)_mm512_i32gather_ps((__m512i)at, table, 4), high = (vf)_mm512_i32gather_ps((__m512i)at, table + 1, 4);
#elif defined(__AVX2__)
  const vf low = (vf)_mm256_i32gather_ps(table, (__m256i)at, 4), high = (vf)_mm256_i32gather_ps(table + 1, (__m256i)at, 4);
#else
  vf low, high;
  for (int i = 0; i < W; ++i) low[i] = table[at[i]], high[i] = table[at[i] + 1];
#endif
  return low + (high - low) * part;
}

// Asks the second cache for a row that is needed in a block's time: it takes many more requests at once than the first. A key and its
// value lie side by side: one page of memory is opened for both.
template <class C>
ATTNSPAN_INLINE void fetch_far(const C* p, int64_t count) {
  for (int64_t i = 0; i < count; i += kLine<C>) __builtin_prefetch(p + i, 0, 2);
}

// Products of T rows with G heads into s[t * P + g]; asks for T rows of the next block. Hashed: the rows are centred first, and their
// squared norms go into norm[t].
template <class C, int G, int T, int P, bool Hashed>
ATTNSPAN_INLINE void score_rows(const attnspan::GatherTask& task, const int32_t* id, const int32_t* next, float* s,
                                float* norm) {
  const int64_t dim = task.head_dim;
  const C *base = static_cast<const C*>(task.key), *row[T], *ahead[T];
  for (int t = 0; t < T; ++t) row[t] = base + int64_t(id[t]) * 2 * dim, ahead[t] = base + int64_t(next[t]) * 2 * dim;
  vf acc[T][P] = {}, square[4] = {};
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
    if (d % kLine<C> == 0)
      for (int t = 0; t < T; ++t) __builtin_prefetch(ahead[t] + d, 0, 2), __builtin_prefetch(ahead[t] + d + dim, 0, 2);
    vf k[T];
    for (int t = 0; t < T; ++t) {
      k[t] = load(row[t] + d);
      if constexpr (Hashed) k[t] -= load(task.mean + d), square[t] += k[t] * k[t];
    }
    for (int g = 0; g < G; ++g) {
      vf q = load(task.query + g * dim + d);
      keep(q);
      for (int t = 0; t < T; ++t) acc[t][g] += k[t] * q;
    }
  }
  const vf* a = &acc[0][0];
  for (int i = 0; i < T * P; i += 4) sum_lanes4(a[i], a[i + 1], a[i + 2], a[i + 3], s + i);
  float squares[4] = {};
  if constexpr (Hashed) sum_lanes4(square[0], square[1], square[2], square[3], squares);
  for (; d < dim; ++d)
    for (int t = 0; t < T; ++t) {
      const float k = to_float(row[t][d]) - (Hashed ? task.mean[d] : 0.f);
      squares[t] += k * k;
      for (int g = 0; g < G; ++g) s[t * P + g] += k * task.query[g * dim + d];
    }
  if constexpr (Hashed)
    for (int t = 0; t < T; ++t) norm[t] = squares[t];
}

template <class C, int G, int N, int P>
ATTNSPAN_INLINE void add_rows(const attnspan::GatherTask& task, const float* p, const int32_t* id, int64_t rows, int64_t d0, float* acc) {
  const int64_t dim = task.head_dim;
  const C* base = static_cast<const C*>(task.key) + dim + d0;
  vf a[G][N];
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < N; ++i) a[g][i] = load(acc + g * dim + d0 + i * W);
  for (int64_t t = 0; t < rows; ++t) {
    const C* row = base + int64_t(id[t]) * 2 * dim;
    vf v[N];
    for (int i = 0; i < N; ++i) v[i] = load(row + i * W);
    for (int g = 0; g < G; ++g) {
      const vf w = splat(p[t * P + g]);
      for (int i = 0; i < N; ++i) a[g][i] += w * v[i];
    }
  }
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < N; ++i) store(acc + g * dim + d0 + i * W, a[g][i]);
}

// Zero where a head drew, -inf where it did not, for each set of heads.
struct Bias {
  alignas(16) float of[16][4];
  constexpr Bias() : of() {
    for (int set = 0; set < 16; ++set)
      for (int g = 0; g < 4; ++g) of[set][g] = set >> g & 1 ? 0.f : -__builtin_inff();
  }
};
constexpr Bias kBias;

// Of each head: query . mean, in the lanes of a block of scores, and 1 / |query|.
struct QueryFacts {
  vf mean;
  float inverse_norm[4];
};

template <int G>
ATTNSPAN_INLINE QueryFacts query_facts(const attnspan::GatherTask& task) {
  QueryFacts facts{};
  float mean[4] = {}, lanes[W];
  for (int g = 0; g < G; ++g) {
    const float* q = task.query + g * task.head_dim;
    vf square = {}, product = {};
    int64_t d = 0;
    for (; d + W <= task.head_dim; d += W) square += load(q + d) * load(q + d), product += load(q + d) * load(task.mean + d);
    float norm = sum_lanes(square);
    mean[g] = sum_lanes(product);
    for (; d < task.head_dim; ++d) norm += q[d] * q[d], mean[g] += q[d] * task.mean[d];
    facts.inverse_norm[g] = 1.f / std::sqrt(norm);
  }
  for (int i = 0; i < W; ++i) lanes[i] = mean[i % lanes_of(G)];
  facts.mean = load(lanes);
  return facts;
}

// rows: a multiple of T; next: the ids of the block behind, `rows` of them readable.
template <class C, int G, bool Hashed>
ATTNSPAN_INLINE void gather_block(const attnspan::GatherTask& task, const QueryFacts& facts, const int32_t* id, const uint8_t* drawn,
                                  const int32_t* next, int64_t rows, Running& running, vf* spread, float* acc) {
  constexpr int P = lanes_of(G), T = kRegisters == 32 || P < 4 ? 4 : 2, N = P == 1 ? 8 : kRegisters / 2 / P;
  const int64_t dim = task.head_dim, lanes = rows * P, padded = (lanes + W - 1) / W * W;
  alignas(64) float s[kRows * 4 + 2 * W], inverse[kRows * 4 + 2 * W], bias[kRows * 4 + 2 * W], norm[kRows + W], log_of[kRows * 4 + 2 * W];
  for (int64_t t = 0; t < rows; t += T) score_rows<C, G, T, P, Hashed>(task, id + t, next + t, s + t * P, norm + t);
  if constexpr (Hashed) {
    for (int64_t t = rows; t < rows + W && t < kRows + W; ++t) norm[t] = 1.f;
    for (int64_t t = 0; t < rows; t += W) store(norm + t, 1.f / square_root(load(norm + t)));
    for (int64_t t = 0; t < rows; ++t)
      for (int g = 0; g < P; ++g) {
        inverse[t * P + g] = norm[t] * facts.inverse_norm[g];
        bias[t * P + g] = kBias.of[drawn[t] & 15][g];
      }
    for (int64_t i = lanes; i < padded; ++i) s[i] = 0.f, inverse[i] = 0.f, bias[i] = -INFINITY;
    for (int64_t i = 0; i < padded; i += W) {
      const vf product = load(s + i);
      vf score = product + facts.mean;
      if (task.softcap != 0.f) score = soft_cap(score, task.softcap);
      const vf log_u = log_inclusion(task.log_inclusion, product * load(inverse + i));
      store(s + i, score + load(bias + i) - log_u);
      store(log_of + i, log_u);
    }
  } else {
    const float* log_p = task.log_p + (id - task.id);
    for (int64_t i = lanes; i < padded; ++i) s[i] = 0.f;
    for (int64_t i = 0; i < padded; i += W) {
      const vf score = load(s + i);
      store(s + i, (task.softcap != 0.f ? soft_cap(score, task.softcap) : score) - load(log_p + i));
    }
  }
  const vf before = running.max;
  softmax_block<G, P>(s, rows, 0.f, dim, running, acc);
  if (spread) {
    const vf shrunk = exp(before - running.max);
    *spread *= shrunk * shrunk;
    for (int64_t i = 0; i < padded; i += W) {
      const vf weight = load(s + i), log_u = load(Hashed ? log_of + i : task.log_p + (id - task.id) + i);
      *spread += weight * weight * (1.f - exp(log_u < 0.f ? log_u : splat(0.f)));  // padding has +inf
    }
  }
  int64_t d = 0;
  for (; d + N * W <= dim; d += N * W) add_rows<C, G, N, P>(task, s, id, rows, d, acc);
  for (; d + 4 * W <= dim; d += 4 * W) add_rows<C, G, 4, P>(task, s, id, rows, d, acc);
  for (; d + W <= dim; d += W) add_rows<C, G, 1, P>(task, s, id, rows, d, acc);
  const C* value = static_cast<const C*>(task.key) + dim;
  for (; d < dim; ++d)
    for (int64_t t = 0; t < rows; ++t)
      for (int g = 0; g < G; ++g) acc[g * dim + d] += s[t * P + g] * to_float(value[int64_t(id[t]) * 2 * dim + d]);
}

template <class C, int G, bool Hashed>
void gather_heads(const attnspan::GatherTask& task, const attnspan::SoftmaxState& state) {
  const int64_t dim = task.head_dim;
  const C* key = static_cast<const C*>(task.key);
  for (int64_t i = 0; i < task.count && i < kRows; ++i) fetch_far(key + int64_t(task.id[i]) * 2 * dim, 2 * dim);
  QueryFacts facts{};
  if constexpr (Hashed) facts = query_facts<G>(task);
  Running running = enter(state.max, state.sum, G);
  vf spread = state.spread ? enter(state.max, state.spread, G).sum : vf{};
  for (int64_t first = 0; first < task.count; first += kRows) {
    const int64_t rest = task.count - first;
    const int64_t rows = rest < kRows ? (rest + 3) / 4 * 4 : kRows;  // the padding makes a last block whole
    const int32_t* id = task.id + first;
    const int32_t* next = rest > kRows ? id + kRows : id;  // at the end: rows that are there already
    gather_block<C, G, Hashed>(task, facts, id, Hashed ? task.drawn + first : nullptr, next, rows, running, state.spread ? &spread : nullptr,
                               state.acc);
  }
  leave(running, state.max, state.sum, G);
  if (state.spread) leave({running.max, spread}, state.max, state.spread, G);
}

template <class C>
void gather_run(const attnspan::GatherTask& task, const attnspan::SoftmaxState& state) {
  if (task.log_p) return gather_heads<C, 1, false>(task, state);
  switch (task.heads) {
    case 1: return gather_heads<C, 1, true>(task, state);
    case 2: return gather_heads<C, 2, true>(task, state);
    case 3: return gather_heads<C, 3, true>(task, state);
    default: return gather_heads<C, 4, true>(task, state);
  }
}

}  // namespace
