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

// Lanes that `heads` heads take in a block of scores.
constexpr int lanes_of(int heads) { return heads == 3 ? 4 : heads; }

template <class C>
constexpr int64_t kLine = 64 / int64_t(sizeof(C));  // elements of a cache line

// Asks for `count` elements of the next block while this one is computed: K during the scores and V during the sums, so that
// memory is busy all the time. The hardware alone does not keep up, above all with V, which is walked in columns.
template <class C>
ATTNSPAN_INLINE void fetch(const C* p, int64_t count) {
  for (int64_t i = 0; i < count; i += kLine<C>) __builtin_prefetch(p + i, 0, 2);
}

// Scores of `T` tokens for `G` heads into s[token * P + head]; P = 4 for three or four heads.
template <class C, int G, int T, int P>
ATTNSPAN_INLINE void score_tokens(const float* query, int64_t dim, const C* key, int64_t stride, float* s) {
  static_assert(T * P % 4 == 0, "scores are reduced four at a time");
  vf acc[T][P] = {};
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
    vf k[T];
    for (int t = 0; t < T; ++t) k[t] = load(key + t * stride + d);
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
      for (int g = 0; g < G; ++g) s[t * P + g] += to_float(key[t * stride + d]) * query[g * dim + d];
}

// acc[g, d0 : d0 + N*W] += p[t, g] * value[t, d0 : d0 + N*W] over all tokens. next: what to ask for meanwhile, N * W elements a token.
template <class C, int G, int N, int P>
ATTNSPAN_INLINE void add_values(const float* p, int64_t tokens, const C* value, int64_t stride, const C* next, int64_t dim, int64_t d0, float* acc) {
  vf a[G][N];
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < N; ++i) a[g][i] = load(acc + g * dim + d0 + i * W);
  for (int64_t t = 0; t < tokens; ++t) {
    const C* row = value + t * stride + d0;
    __builtin_prefetch(next + t * N * W, 0, 2);
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

// Running maximum and sum of up to four heads. Lane i belongs to head i mod P; the maximum is the same in all lanes of a head, the
// sum is spread over them until the run ends.
struct Running {
  vf max, sum;
};

// Online softmax of one block: s becomes exp(s - max); the sum and the accumulators shrink when the maximum rises.
template <int G, int P>
ATTNSPAN_INLINE void softmax_block(float* s, int64_t tokens, float softcap, int64_t dim, Running& running, float* acc) {
  const int64_t n = tokens * P, padded = (n + W - 1) / W * W;
  for (int64_t i = n; i < padded; ++i) s[i] = -INFINITY;
  vf top = running.max;
  for (int64_t i = 0; i < padded; i += W) {
    vf v = load(s + i);
    if (softcap != 0.f) {
      const vf capped = soft_cap(v, softcap);
      v = v == -INFINITY ? v : capped;
      store(s + i, v);
    }
    top = max(top, v);
  }
  top = max_modulo<P>(top);
  if (any_above(top, running.max)) {
    const vf factor = exp(running.max - top);
    running = {top, running.sum * factor};
    float each[W];
    store(each, factor);
    for (int g = 0; g < G; ++g)
      for (int64_t d = 0; d < dim; ++d) acc[g * dim + d] *= each[g];
  }
  for (int64_t i = 0; i < padded; i += W) {
    const vf e = exp(load(s + i) - top);
    store(s + i, e);
    running.sum += e;
  }
}

template <class C, int G>
ATTNSPAN_INLINE void decode_block(const float* query, int64_t dim, const C* key, const C* value, int64_t stride, int64_t ahead,
                                  int64_t tokens, float softcap, Running& running, float* acc) {
  constexpr int P = lanes_of(G);             // lanes a token takes in the score block
  constexpr int T = kAccumulators / P;      // tokens that share a load of q
  constexpr int N = kRegisters / 2 / P;     // vectors of V that share a load of p
  constexpr int one = P == 4 ? 1 : 4 / P;   // smallest step whose scores come out in fours
  alignas(64) float s[kBlock * 4 + W + 16];
  int64_t t = 0;
  for (; t + T <= tokens; t += T) {
    fetch(key + t * stride + ahead, T * stride);
    score_tokens<C, G, T, P>(query, dim, key + t * stride, stride, s + t * P);
  }
  for (; t + one <= tokens; t += one) score_tokens<C, G, one, P>(query, dim, key + t * stride, stride, s + t * P);
  for (; t < tokens; ++t)
    for (int g = 0; g < G; ++g) {
      float dot = 0.f;
      for (int64_t d = 0; d < dim; ++d) dot += query[g * dim + d] * to_float(key[t * stride + d]);
      s[t * P + g] = dot;
    }
  softmax_block<G, P>(s, tokens, softcap, dim, running, acc);
  // Each pass asks for its share of the next block, so that all together walk it in order. Values beside their keys came with them.
  const C* next = stride == dim ? value + ahead : value;
  int64_t d = 0;
  for (; d + N * W <= dim; d += N * W) add_values<C, G, N, P>(s, tokens, value, stride, next + d * tokens, dim, d, acc);
  for (; d + W <= dim; d += W) add_values<C, G, 1, P>(s, tokens, value, stride, next + d * tokens, dim, d, acc);
  for (; d < dim; ++d)
    for (int g = 0; g < G; ++g)
      for (t = 0; t < tokens; ++t) acc[g * dim + d] += s[t * P + g] * to_float(value[t * stride + d]);
}

// Enters or leaves the lanes of a run: `max` and `sum` hold one number for each head.
ATTNSPAN_INLINE Running enter(const float* max, const float* sum, int heads) {
  float m[W], l[W];
  for (int i = 0; i < W; ++i) {
    const int g = i % lanes_of(heads);
    m[i] = g < heads ? max[g] : 0.f;
    l[i] = i < heads ? sum[i] : 0.f;
  }
  return {load(m), load(l)};
}
ATTNSPAN_INLINE void leave(const Running& running, float* max, float* sum, int heads) {
  float m[W], l[W];
  store(m, running.max);
  store(l, heads == 1 ? sum_modulo<1>(running.sum) : heads == 2 ? sum_modulo<2>(running.sum) : sum_modulo<4>(running.sum));
  for (int g = 0; g < heads; ++g) max[g] = m[g], sum[g] = l[g];
}

template <class C>
void decode_run(const attnspan::DecodeRun& run, const attnspan::SoftmaxState& state) {
  const int64_t dim = run.head_dim;
  const C *key = static_cast<const C*>(run.key), *value = static_cast<const C*>(run.value);
  const int64_t stride = run.stride, start = (run.tokens < kBlock ? run.tokens : kBlock) * stride;
  fetch(key, start);
  if (stride == dim) fetch(value, start);
  // Groups of four rows share a walk over the keys: 64 rows at most, beyond which the keys are read again.
  constexpr int64_t kGroups = 16;
  for (int64_t base = 0; base < run.rows; base += 4 * kGroups) {
    const int64_t rows = run.rows - base < 4 * kGroups ? run.rows - base : 4 * kGroups;
    Running running[kGroups];
    for (int64_t row = 0; row < rows; row += 4)
      running[row / 4] = enter(state.max + base + row, state.sum + base + row, int(rows - row < 4 ? rows - row : 4));
    for (int64_t first = 0; first < run.tokens; first += kBlock) {
      const int64_t rest = run.tokens - first, tokens = rest < kBlock ? rest : kBlock;
      const int64_t ahead = rest > kBlock ? kBlock * stride : 0;  // nothing behind the run is fetched: it is another task's
      const C *k = key + first * stride, *v = value + first * stride;
      for (int64_t row = 0; row < rows; row += 4) {
        const float* query = run.query + (base + row) * dim;
        float* acc = state.acc + (base + row) * dim;
        Running& r = running[row / 4];
        switch (rows - row) {
          case 1: decode_block<C, 1>(query, dim, k, v, stride, ahead, tokens, run.softcap, r, acc); break;
          case 2: decode_block<C, 2>(query, dim, k, v, stride, ahead, tokens, run.softcap, r, acc); break;
          case 3: decode_block<C, 3>(query, dim, k, v, stride, ahead, tokens, run.softcap, r, acc); break;
          default: decode_block<C, 4>(query, dim, k, v, stride, ahead, tokens, run.softcap, r, acc); break;
        }
      }
    }
    for (int64_t row = 0; row < rows; row += 4)
      leave(running[row / 4], state.max + base + row, state.sum + base + row, int(rows - row < 4 ? rows - row : 4));
  }
}

}  // namespace
