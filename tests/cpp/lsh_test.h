// LshAttention in the core: against a naive estimator that draws with the kernels' own bits, and with damaged states.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "lsh.h"
#include "sketch_query.h"

namespace {

using namespace attnspan;

struct LshRun {
  LshConfig config;
  int64_t dim, capacity, group;
  std::vector<float> projection, cache;  // cache: [kv, capacity, 2, dim], keys and values
  std::vector<uint64_t> state;                // one row, aligned
  LshTables tables;
  const Kernels& kernels;
  int32_t length = 0;

  LshRun(const LshConfig& c, int64_t d, int64_t cap, const Kernels& k)
      : config(c), dim(d), capacity(cap), group(c.heads / c.kv_heads), projection(normal(d * std::max<int64_t>(c.index.columns(), 1))),
        cache(size_t(c.kv_heads * cap * 2 * d)), state(size_t(state_bytes(c, d, cap) / 8)),
        tables(c, signs_of(c, projection).data(), d), kernels(k) {}

  static std::vector<float>& signs_of(const LshConfig& c, std::vector<float>& projection) {
    if (c.index.kind == IndexKind::sketch)
      for (float& v : projection) v = v > 0.f ? 1.f : -1.f;
    return projection;
  }

  const float* key(int64_t h, int64_t p) const { return &cache[size_t((h * capacity + p) * 2 * dim)]; }
  const float* value(int64_t h, int64_t p) const { return key(h, p) + dim; }

  // Output and lse of a call whose queries are `query`, [tokens, heads, dim]; "" or what was wrong.
  std::string call(const std::vector<float>& query, std::vector<float>& output, std::vector<float>& lse) {
    const int64_t tokens = int64_t(query.size()) / (config.heads * dim);
    const auto k = normal(tokens * config.kv_heads * dim), v = normal(tokens * config.kv_heads * dim);
    output.assign(query.size(), 0.f), lse.assign(size_t(tokens * config.heads), 0.f);
    SpanCall c{};
    c.batch = 1, c.tokens = tokens, c.head_dim = dim, c.activation = c.cache = DType::f32;
    c.query = query.data(), c.key = k.data(), c.value = v.data(), c.past_key = cache.data();
    c.length = &length, c.output = output.data(), c.lse = lse.data();
    const std::string wrong = open_states(config, c, capacity, state.data());
    if (!wrong.empty()) return wrong;
    if (!lsh_attention(config, c, capacity, state.data(), tables, kernels, {run_threads, nullptr})) return "damaged";
    length += int32_t(tokens);
    return "";
  }
};

double choose(int64_t n, int64_t k) { return std::exp(std::lgamma(double(n) + 1) - std::lgamma(double(k) + 1) - std::lgamma(double(n - k) + 1)); }

// Probability of a draw by the definition, summed term by term.
double inclusion(const LshConfig& config, int64_t head, double cosine) {
  const double t = std::acos(std::min(1.0, std::max(-1.0, cosine))) / M_PI;
  double u = 0;
  if (config.index.kind == IndexKind::signature) {
    const int64_t n = config.index.signature_bits;
    for (int64_t k = 0; k <= config.max_hamming[size_t(head)]; ++k) u += choose(n, k) * std::pow(t, double(k)) * std::pow(1 - t, double(n - k));
  } else {
    const int64_t n = config.index.tables;
    const double p = std::pow(1 - t, double(config.index.bits));
    for (int64_t k = config.index.min_collisions; k <= n; ++k) u += choose(n, k) * std::pow(p, double(k)) * std::pow(1 - p, double(n - k));
  }
  return std::min(1.0, u);
}

// log p of every position of [from, to) that a query draws, by sketches: +1 where it is not drawn. `own`: codes and factors of the keys.
std::vector<double> sketch_draws(const LshRun& run, const Index& index, int64_t head, std::vector<float> q, const std::vector<uint64_t>& own,
                                 int64_t from, int64_t to) {
  const LshConfig& config = run.config;
  const int64_t h = head / run.group, planes = config.index.planes, words = config.index.row_words();
  for (float& v : q) v *= 1.f / std::sqrt(float(run.dim));
  std::vector<float> mean_scores, scratch(size_t(rotate_scratch(run.dim)));
  for (int64_t m = 0; m < kMeans; ++m) {
    double sum = 0;
    for (int64_t d = 0; d < run.dim; ++d) sum += double(q[size_t(d)]) * double(index.mean(m, h)[d]);
    mean_scores.push_back(float(sum));
  }
  run.kernels.rotate({q.data(), 1, run.dim, run.tables.signs.data(), scratch.data()});
  std::vector<uint8_t> table(size_t(planes * 32));
  const SketchQuery query = sketch_query(q.data(), run.dim, table.data());
  std::vector<float> estimate, of_mean;
  for (int64_t p = from; p < to; ++p) {
    const auto* row = reinterpret_cast<const uint8_t*>(&own[size_t((p - from) * words)]);
    int64_t sum = 0, end;
    for (int64_t n = 0; n < planes * 2; ++n) sum += table[size_t(n * 16 + (n % 2 ? row[n / 2] >> 4 : row[n / 2] & 15))];
    bf16 factor;
    std::memcpy(&factor, row + planes, 2);
    estimate.push_back(to_float(factor) * (query.step * float(sum) + query.offset));
    of_mean.push_back(mean_scores[size_t(index.mean_of(p, &end))]);
  }
  std::vector<float> wanted;
  const int64_t first = (from + 63) / 64, all = to / 64 - first, some = std::min(all, kOffsetGroups);
  for (int64_t g = 0; g < some; ++g)
    for (int64_t i = 0, at = (first + g * all / some) * 64 - from; i < 64; ++i)
      wanted.push_back(kSharpness * (estimate[size_t(at + i)] + of_mean[size_t(at)]));
  const double least = double(config.fraction) * double(kLeastShare);
  const float c = sketch_offset(wanted.data(), int64_t(wanted.size()), double(config.fraction) * double(wanted.size()), least);
  std::vector<double> out;
  for (int64_t p = from; p < to; ++p) {
    const size_t i = size_t(p - from);
    const double log_p = std::min(0.0, std::max(std::log(least), double(kSharpness * (estimate[i] + of_mean[i]) + c)));
    const int64_t start = threshold_start(draw_seed(run.length - 1, head), p / 64);
    out.push_back(log_p > double(log_thresholds()[size_t(start + p % 64)]) ? log_p : 1.0);
  }
  return out;
}

// Checks one decode step against a loop over positions. The state tells which positions are indexed and their means.
void lsh_step(LshRun& run) {
  const LshConfig& config = run.config;
  const auto query = normal(config.heads * run.dim);
  std::vector<float> output, lse;
  const std::string wrong = run.call(query, output, lse);
  expect(wrong.empty(), ("lsh call: " + wrong).c_str());
  const IndexLayout layout(config.index, config.kv_heads, run.dim, run.capacity);
  const Index index(config.index, layout, config.sink, run.state.data());
  const bool exact = config.index.kind == IndexKind::exact || run.length < config.dense_below;
  const int64_t words = config.index.row_words();
  const auto bits = [&](const std::vector<float>& x) {  // of some rows
    const int64_t rows = int64_t(x.size()) / run.dim;
    std::vector<uint64_t> out(size_t(rows * words + 1)), scratch(size_t(run.tables.scratch() / 8 + 16));
    if (words) run.tables.hash(run.kernels, x.data(), rows, out.data(), scratch.data() + (8 - reinterpret_cast<uintptr_t>(scratch.data()) / 8 % 8));
    return out;
  };
  const auto code = [&](const uint64_t* b, int64_t l) {
    int64_t c = 0;
    for (int64_t i = 0; i < config.index.bits; ++i) {
      const int64_t at = l * config.index.bits + i;
      c |= int64_t(b[at / 64] >> (at % 64) & 1) << i;
    }
    return c;
  };
  const int64_t from = config.sink, to = exact || words == 0 ? from : index.indexed();
  std::vector<float> centred;
  std::vector<uint64_t> key_bits;
  for (int64_t head = 0; head < config.heads; ++head) {
    const int64_t h = head / run.group;
    if (head % run.group == 0) {
      centred.clear();
      for (int64_t p = from; p < to; ++p) {
        int64_t end;
        const float* mean = index.mean(index.mean_of(p, &end), h);
        for (int64_t d = 0; d < run.dim; ++d) centred.push_back(run.key(h, p)[d] - mean[d]);
      }
      key_bits = bits(centred);
    }
    const float* q = &query[size_t(head * run.dim)];
    const auto query_bits = bits(std::vector<float>(q, q + run.dim));
    std::vector<double> known;
    if (config.index.kind == IndexKind::sketch && to > from) known = sketch_draws(run, index, head, std::vector<float>(q, q + run.dim), key_bits, from, to);
    double top = -INFINITY, sum = 0;
    std::vector<double> scores, out(size_t(run.dim), 0.0);
    std::vector<int64_t> seen;
    for (int64_t p = 0; p < run.length; ++p) {
      const float* k = run.key(h, p);
      double dot = 0, log_u = 0;
      for (int64_t d = 0; d < run.dim; ++d) dot += double(q[d]) * double(k[d]);
      if (p >= from && p < to && !known.empty()) {
        log_u = known[size_t(p - from)];
        if (log_u > 0) continue;
      } else if (p >= from && p < to) {
        const float* x = &centred[size_t((p - from) * run.dim)];
        const uint64_t* own = &key_bits[size_t((p - from) * words)];
        double product = 0, norm = 0, query_norm = 0;
        for (int64_t d = 0; d < run.dim; ++d) {
          product += double(q[d]) * double(x[d]), norm += double(x[d]) * double(x[d]), query_norm += double(q[d]) * double(q[d]);
        }
        int64_t count = 0;
        if (config.index.kind == IndexKind::signature) {
          for (int64_t w = 0; w < words; ++w) count += __builtin_popcountll(own[w] ^ query_bits[size_t(w)]);
          if (count > config.max_hamming[size_t(h)]) continue;
        } else {
          for (int64_t l = 0; l < config.index.tables; ++l) count += code(own, l) == code(query_bits.data(), l);
          if (count < config.index.min_collisions) continue;
        }
        log_u = std::log(inclusion(config, h, product / std::sqrt(norm * query_norm)));
      }
      scores.push_back(dot / std::sqrt(double(run.dim)) - log_u);
      seen.push_back(p);
      top = std::max(top, scores.back());
    }
    for (size_t i = 0; i < scores.size(); ++i) {
      const double w = std::exp(scores[i] - top);
      sum += w;
      for (int64_t d = 0; d < run.dim; ++d) out[size_t(d)] += w * double(run.value(h, seen[i])[d]);
    }
    expect(std::abs(double(lse[size_t(head)]) - top - std::log(sum)) < 2e-3, "lsh lse", double(lse[size_t(head)]), top + std::log(sum));
    for (int64_t d = 0; d < run.dim; ++d)
      expect(std::abs(double(output[size_t(head * run.dim + d)]) - out[size_t(d)] / sum) < 3e-3, "lsh output",
             double(output[size_t(head * run.dim + d)]), out[size_t(d)] / sum);
  }
}

void lsh_sequence(const LshConfig& config, int64_t dim, int64_t capacity, const Kernels& kernels, const std::vector<int64_t>& chunks) {
  expect(config.check().empty(), "lsh configuration");
  LshRun run(config, dim, capacity, kernels);
  std::vector<float> output, lse;
  for (const int64_t tokens : chunks) {
    if (tokens == 1) {
      lsh_step(run);
    } else {
      expect(run.call(normal(tokens * config.heads * dim), output, lse).empty(), "lsh prefill");
    }
  }
}

// States of random bytes, and good states with random bytes in them: refused or computed, never read out of bounds.
void lsh_damage(const LshConfig& config, const Kernels& kernels) {
  const int64_t dim = 16, capacity = 1000;
  LshRun run(config, dim, capacity, kernels);
  std::vector<float> output, lse;
  expect(run.call(normal(900 * config.heads * dim), output, lse).empty(), "prefill before damage");
  const auto good = run.state;
  const int32_t length = run.length;
  for (int trial = 0; trial < 60; ++trial) {
    run.state = good, run.length = length;
    auto* bytes = reinterpret_cast<unsigned char*>(run.state.data());
    const size_t size = run.state.size() * 8, first = trial % 3 == 0 ? 0 : 256, last = trial % 3 == 0 ? 256 : size;
    for (int i = 0; i < (trial % 2 ? 3 : 4000); ++i) bytes[first + random_bits() % (last - first)] = static_cast<unsigned char>(random_bits());
    const auto query = normal(config.heads * dim);
    run.call(query, output, lse);
    if (trial % 6 == 3) run.call(normal(40 * config.heads * dim), output, lse);
    ++checks;
  }
  for (const size_t at : {size_t(0), size_t(8), size_t(12), size_t(44), size_t(48), size_t(56)}) {
    run.state = good, run.length = length;
    reinterpret_cast<unsigned char*>(run.state.data())[at] ^= 1;
    expect(!run.call(normal(config.heads * dim), output, lse).empty(), "another header is refused", double(at));
  }
}

LshConfig lsh_config(IndexKind kind, int64_t heads, int64_t kv_heads, int64_t sink, int64_t window) {
  LshConfig c;
  c.heads = heads, c.kv_heads = kv_heads, c.sink = sink, c.window = window, c.dense_below = 0;
  c.index.kind = kind, c.index.layer = 3, c.index.identity = 7;
  return c;
}

void lsh_tests(const Kernels& kernels) {
  LshConfig exact = lsh_config(IndexKind::exact, 4, 2, 4, 8);
  lsh_sequence(exact, 24, 512, kernels, {1, 5, 1, 300, 1, 1});
  for (const int64_t dim : {16, 24, 80, 128}) {
    LshConfig c = lsh_config(IndexKind::sketch, dim == 80 ? 7 : 4, dim == 80 ? 1 : 2, 4, 9);
    c.fraction = 0.1f, c.index.planes = sketch_planes(dim);
    lsh_sequence(c, dim, 2048, kernels, {1, 400, 1, 1, 130, 1, 1, 1, 700, 1, 1});
    if (dim == 16) lsh_damage(c, kernels);
  }
  for (const int64_t bits : {64, 128, 256}) {
    LshConfig c = lsh_config(IndexKind::signature, bits == 64 ? 7 : 4, bits == 64 ? 1 : 2, 4, 9);
    c.index.signature_bits = bits;
    for (int64_t h = 0; h < c.kv_heads; ++h) c.max_hamming.push_back(bits * 7 / 16 + h);
    lsh_sequence(c, bits == 128 ? 24 : 32, 2048, kernels, {1, 400, 1, 1, 130, 1, 1, 1, 700, 1, 1});
    c.max_hamming.assign(size_t(c.kv_heads), bits);  // everything is drawn, with certainty
    lsh_sequence(c, 16, 1024, kernels, {700, 1, 1, 1, 1});
    lsh_damage(c, kernels);
  }
  for (const int64_t collisions : {1, 2, 3}) {
    LshConfig c = lsh_config(IndexKind::tables, 3, 1, collisions == 1 ? 0 : 64, 16);
    c.index.bits = 5 - collisions, c.index.tables = collisions == 3 ? 260 : 20, c.index.min_collisions = collisions;
    lsh_sequence(c, 24, 4096, kernels, {1, 400, 1, 1, 1500, 1, 1, 1400, 1});
    lsh_damage(c, kernels);
  }
}

}  // namespace
