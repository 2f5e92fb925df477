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
  float* spread = nullptr;  // where asked for: the variance of `sum`, as far as drawing made it, estimated from what was drawn
};

// Decode: the query heads of one KV head against one contiguous run of its cache. `query` is fp32 [rows, head_dim], already
// multiplied by the softmax scale and, for an int8 cache, by the key scale. The value scale is applied by the caller.
struct DecodeRun {
  const float* query;
  int64_t rows;
  int64_t head_dim;
  const void* key;    // [tokens, stride], head_dim of them each
  const void* value;
  int64_t stride;     // head_dim, or twice that where each key is followed by its value
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
  int64_t stride[2];  // elements from one key to the next
  int64_t count[2];
  int64_t first;  // position of the first key
};

// Signs of projections: bit j of row r is (x[r] . column j > 0). The columns are bf16 and lie in panels of kColumns,
// [panel, depth / 2, kColumns, 2], `depth` being the dimension rounded up to a multiple of 32. Zero columns fill the last panels up to
// an even number; they give zero bits.
struct HashTask {
  const float* x;  // [rows, dim], rounded to bf16 before the products
  int64_t rows;
  int64_t dim;
  int64_t depth;
  const void* panel;
  int64_t panels;
  uint64_t* bits;  // [rows, panels / 2]
  void* scratch;   // hash_scratch(depth, panels) bytes, aligned to 64
};
constexpr int64_t kColumns = 32;
constexpr int64_t hash_scratch(int64_t depth, int64_t panels) { return 64 * (depth * 2 + panels * 4); }

// Packed signatures of consecutive tokens lie in blocks of kLanes tokens: [block, words, kLanes], so that a vector holds the same
// word of different tokens. A group is the 64 tokens that share one word of a mask.
constexpr int64_t kLanes = 8, kGroup = 64;
struct ScanTask {
  const uint64_t* signatures;
  int64_t words;  // 1, 2 or 4
  int64_t groups;
  const uint64_t* query;  // [words]
  int64_t max_hamming;
  uint64_t* mask;  // [groups]: bit i of word g: token 64 * g + i is drawn
};

// Hash tables over one segment of tokens, numbered from 0 within it. Table l holds the tokens below sorted[l] by bucket: bucket c is
// ids[l * stride + start[l * (buckets + 1) + c] ...]; for the tokens from there up to `tokens` the same place holds their codes.
// A start of kSegment is stored as 0. No bucket holds as many.
struct WalkTask {
  const uint16_t *start, *ids;
  const uint32_t* sorted;
  int64_t tables, buckets, stride, tokens;
  const uint16_t* code;  // [tables], of the query
  int64_t min_collisions;
  uint8_t* count;  // [kSegment], scratch: any 16-bit id stays inside
  uint16_t* list;  // [kSegment], scratch
  uint64_t* mask;  // [tokens rounded up to groups]
};
constexpr int64_t kSegment = 65536;  // most tokens of a segment

struct Overlap {
  int64_t apart, together;
};

// Attention of up to four query heads to scattered rows of one KV head's cache, each drawn with a known probability.
struct GatherTask {
  const float* query;  // [heads, head_dim], multiplied by the softmax scale and the key scale
  int64_t heads;
  int64_t head_dim;
  const void* key;  // [slots, 2 * head_dim]: each key, and its value behind it
  const int32_t* id;     // [count + kPad] slots; the last kPad are valid, too
  const uint8_t* drawn;  // [count + kPad] bit g: head g drew it; 0 in the last kPad
  int64_t count;
  const float* mean;           // [head_dim] what was taken from the keys before they were hashed, in units of the cache
  const float* log_inclusion;  // [kInclusion + 1] log u at sin(theta / 2) = 0 ... 1
  float softcap;
  const float* log_p;  // [count + kPad] or null; if not, the log of each draw's probability, infinite in the last kPad: one head, no mean
};
constexpr int64_t kPad = 64, kInclusion = 2048;

// Sketches: tokens in groups of 64, each `planes` rows of 64 bytes (the codes of four dimensions) and 64 factors in bf16.
constexpr int64_t kRounds = 4;  // of a rotation: signs, then a Hadamard transform
constexpr int64_t sketch_planes(int64_t dim) { return (dim + 3) / 4; }
constexpr int64_t sketch_block(int64_t planes) { return planes * kGroup + 2 * kGroup; }
struct RotateTask {
  float* x;  // [rows, dim], rotated in place
  int64_t rows;
  int64_t dim;
  const float* signs;  // [dim, kRounds] of +1 and -1
  float* scratch;      // rotate_scratch(dim) floats
};
constexpr int64_t rotate_scratch(int64_t dim) { return dim * 16; }
struct EncodeTask {
  RotateTask rotate;  // x: less their mean; left as they are
  uint8_t* codes;     // [rows, stride]: planes bytes and a factor
  int64_t stride;
};
// Scores of up to four query heads: factor * (step * sum of entries + offset) + bias. Anything, where the buffer is damaged.
struct SketchTask {
  const uint8_t* blocks;
  int64_t planes;
  int64_t groups;
  int64_t heads;
  const uint8_t* table;  // [heads, planes * 2, 16]
  const float *step, *offset, *bias;  // [heads]
  float* out;            // [heads, groups, 64]
};
// Draws tokens whose log p = min(0, max(floor, score)) is above a threshold.
struct DrawTask {
  const float* scores;  // [groups, 64]
  int64_t first_group, groups;
  int64_t from, to;  // tokens outside are not drawn
  uint64_t seed;     // of the query
  const float* thresholds;
  float floor;
  int32_t* id;   // [groups * 64]
  float* log_p;  // [groups * 64]
};
constexpr int64_t kThresholds = 16384, kThresholdStep = 10127;  // odd, near kThresholds over the golden ratio
// What a query's draws depend on besides its scores: the tokens before it and its head.
constexpr uint64_t draw_seed(int64_t length, int64_t head) {
  return uint64_t(length) * 0x9E3779B97F4A7C15 + uint64_t(head) * 0xC2B2AE3D27D4EB4F;
}
// Where a group's thresholds begin.
constexpr int64_t threshold_start(uint64_t seed, int64_t group) {
  uint64_t x = seed + uint64_t(group) * 0x165667B19E3779F9;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return int64_t((x >> 32) % uint64_t(kThresholds));
}

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
  void (*hash)(const HashTask& task);
  void (*scan)(const ScanTask& task);
  // False, and the mask means nothing, when the tables are damaged.
  bool (*walk)(const WalkTask& task);
  // Set bits of `heads` masks of `groups` words: of each on its own, and of all laid over each other.
  Overlap (*overlap)(const uint64_t* mask, int64_t heads, int64_t groups);
  void (*gather)(DType cache, const GatherTask& task, const SoftmaxState& state);
  void (*rotate)(const RotateTask& task);
  void (*encode)(const EncodeTask& task);
  void (*score)(const SketchTask& task);
  int64_t (*draw)(const DrawTask& task);  // tokens drawn
};

// The fastest table this processor runs, or the one named `wanted` (null or empty: the fastest). Null when there is no such
// table or the processor lacks it; `names` (if not null) receives the names that would do, separated by blanks.
const Kernels* select_kernels(const char* wanted, const char** names);

}  // namespace attnspan
