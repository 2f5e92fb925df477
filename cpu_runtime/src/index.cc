#include "index.h"

#include <algorithm>
#include <cstring>

#include "call.h"

namespace attnspan {
namespace {

constexpr uint64_t kMagic = 0x5844494e41505341;  // "ASPANIDX"
constexpr uint32_t kVersion = 2;

}  // namespace

IndexLayout::IndexLayout(const IndexConfig& config, int64_t kv_heads_, int64_t dim_, int64_t capacity_)
    : kv_heads(kv_heads_), dim(dim_), capacity(round_up(capacity_, kGroup)), segments((capacity + kSegment - 1) / kSegment) {
  means = 256;
  sums = means + round_up(kMeans * kv_heads * dim * 4, 64);
  heads = sums + round_up(kv_heads * dim * 8, 64);
  if (config.kind == IndexKind::signature) head_bytes = capacity * config.words() * 8;
  if (config.kind == IndexKind::sketch) head_bytes = capacity / kGroup * sketch_block(config.planes);
  if (config.kind == IndexKind::tables) {
    start = round_up(segments * config.tables * 4, 64);
    ids = start + round_up(segments * config.tables * (config.buckets() + 1) * 2, 64);
    head_bytes = ids + round_up(capacity * config.tables * 2, 64);
  }
  bytes = heads + kv_heads * head_bytes;
}

std::string Index::open(int64_t length) {
  IndexHeader& h = header();
  if (length == 0 || h.magic == 0) clear();
  const struct {
    const char* what;
    uint64_t got, want;
  } same[] = {
      {"magic", h.magic, kMagic},
      {"version", h.version, kVersion},
      {"kind", h.kind, uint64_t(config_.kind)},
      {"kv_num_heads", h.kv_heads, uint64_t(layout_.kv_heads)},
      {"head_dim", h.head_dim, uint64_t(layout_.dim)},
      {"capacity", h.capacity, uint64_t(layout_.capacity)},
      {"sink", h.sink, uint64_t(sink_)},
      {"bits", h.bits, uint64_t(config_.bits)},
      {"tables", h.tables, uint64_t(config_.tables)},
      {"signature_bits", h.signature_bits, uint64_t(config_.signature_bits)},
      {"layer", h.layer, uint64_t(config_.layer)},
      {"identity", h.identity, uint64_t(config_.identity)},
      {"projection", h.projection, config_.projection},
      {"bytes", h.bytes, uint64_t(layout_.bytes)},
  };
  for (const auto& [what, got, want] : same)
    if (got != want)
      return std::string("past_state has ") + what + " " + std::to_string(got) + "; this node's is " + std::to_string(want) +
             ": it is another index, or damaged; give the state of this layer, or zeros";
  bool good = h.means <= kMeans && (h.means > 0) == (h.indexed > sink_) && (h.means > 0) <= (h.sum_keys > 0) && h.indexed <= layout_.capacity && h.indexed >= sink_;
  for (uint32_t i = 0; good && i < h.means; ++i)
    good = i == 0 ? h.mean_start[0] == sink_ : h.mean_start[i] > h.mean_start[i - 1] && h.mean_start[i] < h.indexed;
  if (!good) return "past_state is damaged: its positions are out of order; give the state of this layer, or zeros";
  if (h.indexed > std::max(length, sink_)) {
    if (config_.kind == IndexKind::tables)
      return "past_state holds " + std::to_string(h.indexed) + " positions, length is " + std::to_string(length) +
             ": tables cannot go back; give zeros, or use index sketch or signature";
    // What lies behind the new end is overwritten before it is read. The sums keep keys that are gone: any mean is right, and
    // that of keys of the same row is a good one.
    h.indexed = uint32_t(std::max(length, sink_));
    while (h.means > 0 && h.mean_start[h.means - 1] >= h.indexed) --h.means;
    h.mean_keys = std::min(h.mean_keys, uint32_t(h.indexed - sink_));
    if (h.means == 0) {
      h.sum_keys = 0;
      std::memset(sum(0), 0, size_t(layout_.kv_heads * layout_.dim * 8));
    }
  }
  return "";
}

void Index::clear() {
  std::memset(base_, 0, size_t(layout_.heads));
  IndexHeader& h = header();
  h.magic = kMagic, h.version = kVersion, h.kind = uint32_t(config_.kind);
  h.kv_heads = uint32_t(layout_.kv_heads), h.head_dim = uint32_t(layout_.dim), h.capacity = uint32_t(layout_.capacity);
  h.sink = uint32_t(sink_), h.bits = uint32_t(config_.bits), h.tables = uint32_t(config_.tables);
  h.signature_bits = uint32_t(config_.signature_bits), h.layer = uint32_t(config_.layer);
  h.identity = uint64_t(config_.identity), h.projection = config_.projection, h.bytes = uint64_t(layout_.bytes);
  h.indexed = uint32_t(sink_);
  if (config_.kind != IndexKind::tables) return;
  for (int64_t i = 0; i < layout_.kv_heads; ++i) {
    std::memset(sorted(i, 0), 0, size_t(layout_.segments * config_.tables * 4));
    // Sinks are never hashed and never drawn, but they are sorted like all others.
    for (int64_t l = 0; l < config_.tables; ++l) std::memset(ids(i, 0) + l * layout_.stride(0), 0, size_t(std::min(sink_, layout_.stride(0)) * 2));
  }
}

int64_t Index::mean_of(int64_t position, int64_t* end) const {
  const IndexHeader& h = header();
  int64_t i = 0;
  while (i + 1 < h.means && h.mean_start[i + 1] <= position) ++i;
  *end = i + 1 < h.means ? h.mean_start[i + 1] : h.indexed;
  return i;
}

void Index::begin_mean(int64_t to) {
  IndexHeader& h = header();
  const int64_t keys = h.sum_keys, positions = to - sink_;  // fewer than the keys of a row that went back
  if (h.means == kMeans || (h.means > 0 && positions < 2 * int64_t(h.mean_keys))) return;
  for (int64_t i = 0; i < layout_.kv_heads; ++i)
    for (int64_t d = 0; d < layout_.dim; ++d) mean(h.means, i)[d] = float(sum(i)[d] / double(keys));
  h.mean_start[h.means++] = h.indexed;
  h.mean_keys = uint32_t(positions);
}

void Index::put(int64_t h, int64_t first, int64_t count, const uint64_t* bits) const {
  const int64_t words = config_.row_words();
  if (config_.kind == IndexKind::signature) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = first + i;
      uint64_t* block = signatures(h) + position / kLanes * words * kLanes + position % kLanes;
      for (int64_t w = 0; w < words; ++w) block[w * kLanes] = bits[i * words + w];
    }
    return;
  }
  if (config_.kind == IndexKind::sketch) {
    const int64_t planes = config_.planes;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = first + i, lane = position % kGroup;
      const auto* row = reinterpret_cast<const uint8_t*>(bits + i * words);
      uint8_t* block = sketches(h) + position / kGroup * sketch_block(planes);
      for (int64_t p = 0; p < planes; ++p) block[p * kGroup + lane] = row[p];
      std::memcpy(block + planes * kGroup + lane * 2, row + planes, 2);
    }
    return;
  }
  const int64_t segment = first / kSegment, at = first % kSegment, stride = layout_.stride(segment);
  const uint64_t all = uint64_t(config_.buckets() - 1);
  for (int64_t l = 0; l < config_.tables; ++l) {
    const int64_t bit = l * config_.bits, word = bit / 64, shift = bit % 64;
    const bool two = shift + config_.bits > 64;
    uint16_t* to = ids(h, segment) + l * stride + at;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t* row = bits + i * words + word;
      const uint64_t low = row[0] >> shift, high = two ? row[1] << (64 - shift) : 0;
      to[i] = uint16_t((low | high) & all);
    }
  }
}

bool Index::merge(int64_t h, int64_t s, int64_t l, int64_t coded, char* scratch) const {
  const int64_t buckets = config_.buckets(), done = sorted(h, s)[l];
  int64_t fresh = coded - done;
  uint16_t *first = start(h, s) + l * (buckets + 1), *all = ids(h, s) + l * layout_.stride(s);
  Carver carve(scratch);
  uint16_t* codes = carve.take<uint16_t>(kSegment);
  uint32_t *count = carve.take<uint32_t>(buckets + 1), *next = carve.take<uint32_t>(buckets + 1);
  if (fresh < 0) return false;
  if (fresh == 0) return true;
  std::memcpy(codes, all + done, size_t(fresh) * 2);
  std::fill_n(count, buckets + 1, 0u);
  for (int64_t i = 0; i < fresh; ++i) {
    if (codes[i] >= buckets) return false;
    ++count[codes[i]];
  }
  if (done == 0) std::fill_n(first, buckets + 1, uint16_t(0));
  if (first[buckets] != done) return false;
  // Positions within a table fit 16 bits, its whole length of kSegment does not: it would be a bucket's end like its beginning.
  if (coded == kSegment && count[codes[0]] == fresh && first[codes[0] + 1] - first[codes[0]] == done) --coded, --fresh, --count[codes[0]];
  // From the last bucket down: what it holds moves up by the number of new ids below it, and leaves room for its own.
  int64_t old_end = done, below = fresh;
  first[buckets] = uint16_t(coded);
  for (int64_t c = buckets - 1; c >= 0; --c) {
    const int64_t begin = first[c];
    if (begin > old_end) return false;
    below -= count[c];
    if (below > 0 && old_end > begin) std::memmove(all + begin + below, all + begin, size_t(old_end - begin) * 2);
    next[c] = uint32_t(old_end + below);
    first[c] = uint16_t(begin + below);
    old_end = begin;
  }
  for (int64_t i = 0; i < fresh; ++i) all[next[codes[i]]++] = uint16_t(done + i);
  sorted(h, s)[l] = uint32_t(coded);
  return true;
}

}  // namespace attnspan
