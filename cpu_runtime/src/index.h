// The index of one layer and row: one buffer without pointers, so that it can be bound in place, copied, forked, saved and loaded.
//
//   header | means [kMeans, kv_heads, dim] fp32 | sums [kv_heads, dim] fp64 | per KV head: sketches, signatures or tables
//
// Positions from `sink` up to `indexed` are in the index. Keys are hashed less a mean, and the mean may be any: scores use the keys
// as they are, and a key's probability of being drawn is computed with the mean that it was hashed with. A better mean is begun each
// time the number of indexed positions has doubled; what was hashed before keeps its own.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace attnspan {

enum class IndexKind : uint32_t { exact = 0, tables = 1, signature = 2, sketch = 3 };

struct IndexConfig {
  IndexKind kind = IndexKind::exact;
  int64_t bits = 0, tables = 0, min_collisions = 0;  // tables
  int64_t signature_bits = 0;                        // signature
  int64_t planes = 0;                                // sketch: bytes of a key's codes
  int64_t layer = 0, identity = 0;
  uint64_t projection = 0;  // fingerprint of the projection

  int64_t columns() const {  // of the projection
    switch (kind) {
      case IndexKind::tables: return bits * tables;
      case IndexKind::signature: return signature_bits;
      case IndexKind::sketch: return kRounds;
      default: return 0;
    }
  }
  int64_t row_words() const { return kind == IndexKind::sketch ? (planes + 2 + 7) / 8 : (columns() + 63) / 64; }  // of a key, as `put` takes it
  int64_t words() const { return signature_bits / 64; }
  int64_t buckets() const { return int64_t(1) << bits; }
};

constexpr int64_t kMeans = 16;
constexpr int64_t kFirstKeys = 256;  // fewer make a poor mean: until there are so many, none is indexed

struct IndexHeader {
  uint64_t magic;
  uint32_t version, kind, kv_heads, head_dim, capacity, sink, bits, tables, signature_bits, layer;
  uint64_t identity, projection, bytes;
  uint32_t indexed;     // positions below are in the index
  uint32_t means;       // means in use
  uint32_t sum_keys;    // keys in the sums
  uint32_t mean_keys;   // positions that were indexed when the last mean was taken, at most
  uint32_t next_merge;  // where the small merges of decoding go on
  uint32_t mean_start[kMeans];
};
static_assert(sizeof(IndexHeader) <= 256);

// Where the parts of a buffer lie, in bytes.
struct IndexLayout {
  IndexLayout() = default;
  IndexLayout(const IndexConfig& config, int64_t kv_heads, int64_t dim, int64_t capacity);

  int64_t kv_heads = 0, dim = 0, capacity = 0, segments = 0;
  int64_t means = 0, sums = 0, heads = 0, head_bytes = 0, start = 0, ids = 0, bytes = 0;

  int64_t stride(int64_t segment) const { return std::min(kSegment, capacity - segment * kSegment); }
};

// One row's buffer, checked.
class Index {
 public:
  Index(const IndexConfig& config, const IndexLayout& layout, int64_t sink, void* buffer)
      : config_(config), layout_(layout), sink_(sink), base_(static_cast<char*>(buffer)) {}

  // Makes the buffer fit a row of `length` tokens: an empty one is initialised, one that cannot belong to it is refused. What is
  // wrong, or "".
  std::string open(int64_t length);
  void clear();

  IndexHeader& header() const { return *reinterpret_cast<IndexHeader*>(base_); }
  int64_t indexed() const { return header().indexed; }
  float* mean(int64_t i, int64_t h) const { return reinterpret_cast<float*>(base_ + layout_.means) + (i * layout_.kv_heads + h) * layout_.dim; }
  double* sum(int64_t h) const { return reinterpret_cast<double*>(base_ + layout_.sums) + h * layout_.dim; }
  // Which mean the keys from `position` on were hashed with, and where the next one begins (or `indexed`).
  int64_t mean_of(int64_t position, int64_t* end) const;

  uint64_t* signatures(int64_t h) const { return reinterpret_cast<uint64_t*>(head(h)); }
  uint8_t* sketches(int64_t h) const { return reinterpret_cast<uint8_t*>(head(h)); }
  uint32_t* sorted(int64_t h, int64_t s) const { return reinterpret_cast<uint32_t*>(head(h)) + s * config_.tables; }
  uint16_t* start(int64_t h, int64_t s) const {
    return reinterpret_cast<uint16_t*>(head(h) + layout_.start) + s * config_.tables * (config_.buckets() + 1);
  }
  uint16_t* ids(int64_t h, int64_t s) const { return reinterpret_cast<uint16_t*>(head(h) + layout_.ids) + s * kSegment * config_.tables; }

  // Decides which mean the keys at [indexed, to) are hashed with, when the sums already hold them.
  void begin_mean(int64_t to);
  // Writes the bits (of sketches: the codes and the factor) of the keys at [first, first + count), [count, row_words].
  void put(int64_t h, int64_t first, int64_t count, const uint64_t* bits) const;
  // Codes that table l of a segment holds unsorted, of `coded` in the segment.
  int64_t unsorted(int64_t h, int64_t s, int64_t l, int64_t coded) const { return coded - sorted(h, s)[l]; }
  // Sorts them into the buckets; one stays behind where all of a segment have one code. False when the buffer is damaged.
  bool merge(int64_t h, int64_t s, int64_t l, int64_t coded, char* scratch) const;
  int64_t merge_scratch() const { return kSegment * 2 + 2 * (config_.buckets() + 1) * 4 + 192; }

 private:
  char* head(int64_t h) const { return base_ + layout_.heads + h * layout_.head_bytes; }

  const IndexConfig& config_;
  const IndexLayout& layout_;
  int64_t sink_;
  char* base_;
};

}  // namespace attnspan
