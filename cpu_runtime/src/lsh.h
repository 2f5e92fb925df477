// LshAttention on the CPU: sinks, window and what is not indexed yet exactly, the rest of the context sampled by hashing, each drawn
// key weighted by the inverse of its probability (MagicPIG, arXiv 2410.16179). This is the whole op without ONNX Runtime.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "index.h"
#include "span.h"

namespace attnspan {

struct LshConfig {
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t sink = 0;
  int64_t window = 0;  // most recent tokens that are never sampled, the current one among them
  float scale = 0.f;
  float softcap = 0.f;
  int64_t dense_below = -1;  // tokens under which a step is exact; -1: where sampling begins to win
  float min_inclusion = 0.f;  // probabilities below weigh as this: less variance for some bias; tables, signature
  float fraction = 0.f;       // sketch: share of the indexed tokens that a query draws, about
  float guard = 0.f;          // relative standard error of the sum of weights above which a KV head's step is exact; 0: none
  IndexConfig index;
  std::vector<int64_t> max_hamming;  // of each KV head, for signatures

  std::string check() const;  // what is wrong with the configuration; empty if nothing
};

// What is computed once from the projection [dim, columns] and the configuration.
struct LshTables {
  LshTables(const LshConfig& config, const float* projection, int64_t dim);

  // Bits of the rows x [rows, dim], [rows, row_words]; of sketches: codes and factor. scratch: so many bytes as `scratch()` says.
  void hash(const Kernels& kernels, const float* x, int64_t rows, uint64_t* bits, void* scratch) const;
  int64_t scratch() const { return signs.empty() ? hash_scratch(depth, panels) : rotate_scratch(dim) * 4; }

  int64_t dim, depth, panels;
  std::vector<uint16_t> panel;                    // bf16, as HashTask wants it
  std::vector<std::vector<float>> log_inclusion;  // one of each threshold in use
  std::vector<int64_t> of_head;                   // which of them a KV head uses
  std::vector<float> signs;                       // sketch: [dim, kRounds]
};

// A fingerprint of the projection, so that an index is not used with another one.
uint64_t fingerprint(const float* projection, int64_t count);

// Bytes of a row's index; capacity: slots of a KV head's cache.
int64_t state_bytes(const LshConfig& config, int64_t dim, int64_t capacity);

// What is wrong with the lengths and states of a call, empty if nothing. Empty states are initialised, rewound ones cut.
// call: past_key [batch, kv_heads * capacity, 2 * head_dim], values behind their keys; past_value is not used, span by far calls only:
// the others attend to everything.
// state: [batch, state_bytes].
std::string open_states(const LshConfig& config, const SpanCall& call, int64_t capacity, void* state);

// Computes the call, whose states are open. codes: what the queries of a step are hashed to, [batch, heads, code_words], or null: they
// are hashed here. False when a state turns out to be damaged.
bool lsh_attention(const LshConfig& config, const SpanCall& call, int64_t capacity, void* state, const LshTables& tables,
                   const Kernels& kernels, const Parallel& parallel, const int32_t* codes = nullptr);

// Nanoseconds since the last reset, added over threads: hash, retrieve, attend, update. Counted when ATTNSPAN_PROFILE is 1.
void lsh_profile(int64_t* out, bool reset);

// Since the last reset: decode steps of a KV head that had a guard, and those of them that it made exact.
void lsh_guarded(int64_t* out, bool reset);

}  // namespace attnspan
