// The table of kernels that every instruction set provides. No ONNX Runtime, no Python, no threads in here.
#pragma once

#include <cstdint>

#include "types.h"

namespace attnspan {

// Running softmax of `rows` query rows over the keys seen so far: maximum score [rows], sum of exp(score - maximum) [rows],
// sum of exp(score - maximum) * value [rows, head_dim].
struct SoftmaxState {
  float* max;
  float* sum;
  float* acc;
};

// Decode: the query heads of one KV head against one contiguous run of its cache. `query` is fp32 [rows, head_dim], already
// multiplied by the softmax scale and, for an int8 cache, by the key scale. The value scale is applied by the caller.
struct DecodeRun {
  const float* query;
  int64_t rows;
  int64_t head_dim;
  const void* key;    // [tokens, head_dim]
  const void* value;  // [tokens, head_dim]
  int64_t tokens;
  float softcap;  // 0 = none
};

// Prefill: `tokens` consecutive queries of `group` heads share each tile of keys; row = token * group + head.
struct PrefillTask {
  int64_t tokens;
  int64_t group;
  int64_t head_dim;
  int64_t first;   // position of the first query
  int64_t window;  // a key is visible when 0 <= query - key < window ...
  int64_t sink;    // ... or when it is causal and below sink
  float softcap;   // 0 = none
  float scale;     // of the scores: softmax scale, times the key scale of an int8 cache
  bool exact;      // the queries are bf16 numbers, and nobody expects more of the weights

  int64_t rows() const { return tokens * group; }
};

constexpr int64_t kKeyTile = 64;   // most keys in one prefill tile
constexpr int64_t kRowPanel = 32;  // rows are padded to a multiple of this, at least two vectors of any instruction set

// Scratch of one prefill task. Rows run along vectors ("panels"), so that softmax never reduces across lanes.
struct PrefillScratch {
  float* query;        // [rows, head_dim], filled by the caller
  float* query_panel;  // [padded rows / panel, head_dim, panel]
  float* scores;       // [kKeyTile, panel]
  float* key;          // [kKeyTile, head_dim]
  float* value;        // [kKeyTile, head_dim]
  int32_t* position;   // [padded rows]
  SoftmaxState state;  // acc as [padded rows / panel, head_dim, panel]
};

// Keys and values of consecutive positions, in up to two runs because a tile may straddle the end of the ring.
struct KeyTile {
  const void* key[2];
  const void* value[2];
  int64_t count[2];
  int64_t first;  // position of the first key
};

struct Kernels {
  const char* name;
  // Conversions between stored elements and fp32: to[i] = scale * from[i], and to[i] = round(from[i] / scale).
  void (*load)(DType type, const void* from, float scale, float* to, int64_t count);
  void (*store)(DType type, const float* from, float scale, void* to, int64_t count);
  void (*decode)(DType cache, const DecodeRun& run, const SoftmaxState& state);
  // Merges `count` partial states, [count, rows] and [count, rows, head_dim], into the first.
  void (*merge)(const SoftmaxState& states, int64_t count, int64_t rows, int64_t head_dim);
  void (*prefill_begin)(DType cache, const PrefillTask& task, const PrefillScratch& scratch);
  void (*prefill_tile)(DType cache, const PrefillTask& task, const KeyTile& tile, const PrefillScratch& scratch);
  // Writes acc back as [rows, head_dim] into scratch.query, not yet divided by the sum.
  void (*prefill_end)(const PrefillTask& task, const PrefillScratch& scratch);
};

// The fastest table this processor runs, or the one named `wanted` (null or empty: the fastest). Null when there is no such
// table or the processor lacks it; `names` (if not null) receives the names that would do, separated by blanks.
const Kernels* select_kernels(const char* wanted, const char** names);

}  // namespace attnspan
