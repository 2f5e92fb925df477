// Decode: a few query rows (the query heads of one KV head) against a long run of keys, read once.
//
// A block of kBlock tokens passes three steps while it is in the L1 cache: scores = q.K (dot products, up to four heads at a time so
// that each load of K serves them all), online softmax, acc += p.V. Scores lie as [token, lane] with `lane` the head, padded to
// a power of two, so that the softmax runs on full vectors.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

constexpr int kBlock = 24;  // tokens; two blocks of K and V, this one and the next, fit in the L1 cache
constexpr int kAccumulators = kRegisters == 32 ? 16 : 12;  // leaves registers for K or V, and for q or p

template <class C>
constexpr int64_t kLine = 64 / int64_t(sizeof(C));  // elements of a cache line

// Asks for `count` elements of the next block while this one is computed: K during the scores and V during the sums, so that
// memory is busy all the time. The hardware alone does not keep up, above all with V, which is walked in columns.
template <class C>
ATTNSPAN_INLINE void fetch(const C* p, int64_t count) {
  for (int64_t i = 0; i < count; i += kLine<C>) __builtin_prefetch(p + i);
}

// Scores of `T` tokens for `G` heads into s[token * P + head]; P = 4 for three or four heads.
template <class C, int G, int T, int P>
ATTNSPAN_INLINE void score_tokens(const float* query, int64_t dim, const C* key, float* s) {
  static_assert(T * P % 4 == 0, "scores are reduced four at a time");
  vf acc[T][P] = {};
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
    vf k[T];
    for (int t = 0; t < T; ++t) k[t] = load(key + t * dim + d);
    for (int g = 0; g < G; ++g) {
      vf q = load(query + g * dim + d);
      keep(q);
      for (int t = 0; t < T; ++t) acc[t][g] += k[t] * q;
    }
  }
  const vf* a = &acc[0][0];
  for (int i = 0; i < T * P; i += 4) sum_lanes4(a[i], a[i + 1], a[i + 2], a[i + 3], s + i);
  // Head dimensions that are no multiple of the vector are rare; their rest is added apart to keep `acc` in registers above.
  for (; d < dim; ++d)
    for (int t = 0; t < T; ++t)
      for (int g = 0; g < G; ++g) s[t * P + g] += to_float(key[t * dim + d]) * query[g * dim + d];
}

// acc[g, d0 : d0 + N*W] += p[t, g] * value[t, d0 : d0 + N*W] over all tokens.
template <class C, int G, int N, int P>
ATTNSPAN_INLINE void add_values(const float* p, int64_t tokens, const C* value, int64_t ahead, int64_t dim, int64_t d0, float* acc) {
  vf a[G][N];
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < N; ++i) a[g][i] = load(acc + g * dim + d0 + i * W);
  const C* next = value + ahead + d0 * tokens;  // this pass's share, so that all passes together walk the block in order
  for (int64_t t = 0; t < tokens; ++t) {
    const C* row = value + t * dim + d0;
    __builtin_prefetch(next + t * N * W);
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

// Online softmax of one block: s becomes exp(s - max), and the running maximum, sum and accumulator are rescaled.
template <int G, int P>
ATTNSPAN_INLINE void softmax_block(float* s, int64_t tokens, float softcap, int64_t dim, float* max_, float* sum_, float* acc) {
  const int64_t n = tokens * P;
  int64_t padded = (n + W - 1) / W * W;
  for (int64_t i = n; i < padded; ++i) s[i] = -INFINITY;
  vf top = splat(-INFINITY);
  for (int64_t i = 0; i < padded; i += W) {
    vf v = load(s + i);
    if (softcap != 0.f) {
      const vf capped = soft_cap(v, softcap);
      v = v == -INFINITY ? v : capped;
      store(s + i, v);
    }
    top = max(top, v);
  }
  float lanes[W], peak[P], factor[P];
  store(lanes, top);
  for (int g = 0; g < P; ++g) {
    peak[g] = g < G ? max_[g] : 0.f;
    for (int i = g; i < W; i += P) peak[g] = lanes[i] > peak[g] ? lanes[i] : peak[g];
  }
  for (int i = 0; i < W; ++i) lanes[i] = peak[i % P];
  const vf shift = load(lanes);
  vf total = {};
  for (int64_t i = 0; i < padded; i += W) {
    const vf e = exp(load(s + i) - shift);
    store(s + i, e);
    total += e;
  }
  for (int g = 0; g < G; ++g) lanes[g] = max_[g] - peak[g];
  for (int g = G; g < W; ++g) lanes[g] = 0.f;
  float scale[W];
  store(scale, exp(load(lanes)));
  store(lanes, total);
  for (int g = 0; g < G; ++g) {
    factor[g] = scale[g];
    float block = 0.f;
    for (int i = g; i < W; i += P) block += lanes[i];
    sum_[g] = sum_[g] * factor[g] + block;
    if (max_[g] != peak[g]) {
      max_[g] = peak[g];
      for (int64_t d = 0; d < dim; ++d) acc[g * dim + d] *= factor[g];
    }
  }
}

template <class C, int G>
ATTNSPAN_INLINE void decode_block(const float* query, int64_t dim, const C* key, const C* value, int64_t ahead, int64_t tokens,
                                  float softcap, float* max_, float* sum_, float* acc) {
  constexpr int P = G == 3 ? 4 : G;             // lanes a token takes in the score block
  constexpr int T = kAccumulators / P;      // tokens that share a load of q
  constexpr int N = kRegisters / 2 / P;     // vectors of V that share a load of p
  constexpr int one = P == 4 ? 1 : 4 / P;   // smallest step whose scores come out in fours
  alignas(64) float s[kBlock * 4 + W + 16];
  int64_t t = 0;
  for (; t + T <= tokens; t += T) {
    fetch(key + t * dim + ahead, T * dim);
    score_tokens<C, G, T, P>(query, dim, key + t * dim, s + t * P);
  }
  for (; t + one <= tokens; t += one) score_tokens<C, G, one, P>(query, dim, key + t * dim, s + t * P);
  for (; t < tokens; ++t)
    for (int g = 0; g < G; ++g) {
      float dot = 0.f;
      for (int64_t d = 0; d < dim; ++d) dot += query[g * dim + d] * to_float(key[t * dim + d]);
      s[t * P + g] = dot;
    }
  softmax_block<G, P>(s, tokens, softcap, dim, max_, sum_, acc);
  int64_t d = 0;
  for (; d + N * W <= dim; d += N * W) add_values<C, G, N, P>(s, tokens, value, ahead, dim, d, acc);
  for (; d + W <= dim; d += W) add_values<C, G, 1, P>(s, tokens, value, ahead, dim, d, acc);
  for (; d < dim; ++d)
    for (int g = 0; g < G; ++g)
      for (t = 0; t < tokens; ++t) acc[g * dim + d] += s[t * P + g] * to_float(value[t * dim + d]);
}

template <class C>
void decode_run(const attnspan::DecodeRun& run, const attnspan::SoftmaxState& state) {
  const int64_t dim = run.head_dim;
  const C *key = static_cast<const C*>(run.key), *value = static_cast<const C*>(run.value);
  const int64_t start = (run.tokens < kBlock ? run.tokens : kBlock) * dim;
  fetch(key, start);
  fetch(value, start);
  for (int64_t first = 0; first < run.tokens; first += kBlock) {
    const int64_t rest = run.tokens - first, tokens = rest < kBlock ? rest : kBlock;
    const int64_t ahead = rest > kBlock ? kBlock * dim : 0;  // nothing behind the run is fetched: it is another task's
    for (int64_t row = 0; row < run.rows;) {
      const int64_t left = run.rows - row;
      const float* query = run.query + row * dim;
      const C *k = key + first * dim, *v = value + first * dim;
      float *m = state.max + row, *l = state.sum + row, *acc = state.acc + row * dim;
      if (left >= 4) {
        decode_block<C, 4>(query, dim, k, v, ahead, tokens, run.softcap, m, l, acc), row += 4;
      } else if (left == 3) {
        decode_block<C, 3>(query, dim, k, v, ahead, tokens, run.softcap, m, l, acc), row += 3;
      } else if (left == 2) {
        decode_block<C, 2>(query, dim, k, v, ahead, tokens, run.softcap, m, l, acc), row += 2;
      } else {
        decode_block<C, 1>(query, dim, k, v, ahead, tokens, run.softcap, m, l, acc), row += 1;
      }
    }
  }
}

}  // namespace
