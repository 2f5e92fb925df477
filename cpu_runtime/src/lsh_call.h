// One call of LshAttention: what its parts share. For lsh.cc, lsh_update.cc and lsh_sample.cc only.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "call.h"
#include "lsh.h"

namespace attnspan {

// Adds the time of a scope to one of four counters, when asked to.
enum Part { kHash, kRetrieve, kAttend, kUpdate };
extern std::atomic<int64_t> lsh_spent[4];
class Timed {
 public:
  explicit Timed(Part part) : part_(part), start_(on() ? now() : 0) {}
  ~Timed() {
    if (start_) lsh_spent[part_].fetch_add(now() - start_, std::memory_order_relaxed);
  }

 private:
  static bool on() {
    static const bool wanted = [] {
      const char* value = std::getenv("ATTNSPAN_PROFILE");
      return value && !std::strcmp(value, "1");
    }();
    return wanted;
  }
  static int64_t now() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); }
  Part part_;
  int64_t start_;
};

// A query hashed: packed signs, and the codes cut out of them.
struct Hashed {
  float* query;     // [pairs * group, dim], scaled
  uint64_t* bits;   // [pairs * group, row_words]
  uint16_t* codes;  // [pairs * group, tables]
  // Sketches:
  uint8_t* table;                 // [pairs * group, planes * 2, 16]
  float *step, *offset, *bias;    // [pairs * group]; with the sharpness; bias: that of the first mean
  float* means;                   // [pairs * group, kMeans] what another mean adds to bias
};

// One call of the op, in three files: the index brought on (lsh_update.cc), queries hashed and keys drawn (lsh_sample.cc), and what
// ties them together (lsh.cc). Rows of a batch and KV heads make pairs.
struct LshCall {
  const LshConfig& config;
  const SpanCall& call;
  const CallView& view;
  const LshTables& tables;
  const Kernels& kernels;
  const Parallel& parallel;
  const int32_t* codes;
  IndexLayout layout;
  std::vector<Index> index;  // one a row
  std::atomic<bool> good{true};

  LshCall(const LshConfig& c, const SpanCall& a, const CallView& v, const LshTables& t, const Kernels& k, const Parallel& p,
          int64_t capacity, void* state, const int32_t* q)
      : config(c), call(a), view(v), tables(t), kernels(k), parallel(p), codes(q), layout(c.index, c.kv_heads, a.head_dim, capacity) {
    for (int64_t b = 0; b < a.batch; ++b) index.emplace_back(c.index, layout, c.sink, static_cast<char*>(state) + b * layout.bytes);
  }

  int64_t pairs() const { return call.batch * config.kv_heads; }
  int64_t target(int64_t tokens) const { return std::max(config.sink, tokens - config.window); }

  // The span of what a step sees exactly: of another op's, or of what pair i attends to here.
  int64_t near_span(int64_t i) const { return call.span[i] > 0 ? call.span[i] : config.sink + config.window; }
  // Slots of a ring for that of ours, as target hybrid has it: spans are rounded to blocks of 64 tokens (planner/rules.py).
  int64_t near_ring() const { return round_up(config.sink + config.window, 64); }
  // Positions from the sinks to here are far: drawn, or not indexed yet.
  int64_t far_end(int64_t i) const {
    return std::max(config.sink, call.length[i / config.kv_heads] + 1 - (near_span(i) - config.sink));
  }

  void update(int64_t b, int64_t to);
  void add_keys(int64_t b, int64_t from, int64_t to);
  void merge_due(int64_t b, bool bulk);
  void hash_query(int64_t i, const Hashed& hashed) const;
  void sample(const Hashed& hashed, int64_t i, int64_t begin, int64_t end, const SoftmaxState& state);
  bool decode();
};

}  // namespace attnspan
