// Queries are hashed, or make their tables; keys are drawn by them and attended to.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "codes.h"
#include "lsh_call.h"
#include "sketch_query.h"

namespace attnspan {
namespace {

constexpr int64_t kChunk = 2048;        // tokens whose scores are estimated before any is drawn
constexpr int64_t kQuad = 4;            // query heads that may share a pass over the drawn rows
constexpr int64_t kShared = 2;          // heads that draw a row on average, above which they do

SoftmaxState from_row(const SoftmaxState& s, int64_t row, int64_t dim) {
  return {s.max + row, s.sum + row, s.acc + row * dim, s.spread ? s.spread + row : nullptr};
}

// Numbers of the set bits of up to four masks of `groups` words, with the set of masks that have each.
int64_t collect(const uint64_t* mask, int64_t heads, int64_t groups, int64_t first, int32_t* id, uint8_t* drawn) {
  int64_t count = 0;
  for (int64_t g = 0; g < groups; ++g) {
    uint64_t word[kQuad] = {}, any = 0;
    for (int64_t i = 0; i < heads; ++i) any |= word[i] = mask[i * groups + g];
    for (; any; any &= any - 1) {
      const int bit = __builtin_ctzll(any);
      id[count] = int32_t(first + g * kGroup + bit);
      drawn[count++] = uint8_t((word[0] >> bit & 1) | (word[1] >> bit & 1) << 1 | (word[2] >> bit & 1) << 2 | (word[3] >> bit & 1) << 3);
    }
  }
  return count;
}

// Clears the bits of positions outside [from, to) in a mask whose first bit is position `first`.
void trim(uint64_t* mask, int64_t groups, int64_t first, int64_t from, int64_t to) {
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = std::clamp<int64_t>(from - first - g * kGroup, 0, kGroup), end = std::clamp<int64_t>(to - first - g * kGroup, 0, kGroup);
    if (begin == 0 && end == kGroup) continue;
    const uint64_t below_end = end == kGroup ? ~uint64_t(0) : (uint64_t(1) << end) - 1;
    mask[g] &= begin >= end ? 0 : below_end & ~((uint64_t(1) << begin) - 1);
  }
}

// Draws positions of [begin, end) for the query heads of pair i, and attends to them.
void sample_hashed(LshCall& op, const Hashed& hashed, int64_t i, int64_t begin, int64_t end, const SoftmaxState& state) {
  const auto& [config, view, kernels] = std::tie(op.config, op.view, op.kernels);
  const int64_t b = i / config.kv_heads, h = i % config.kv_heads, group = view.group, dim = view.dim;
  const bool tables = config.index.kind == IndexKind::tables;
  const Index& index = op.index[b];
  // Tables answer for all that a segment holds, signatures for the groups that are asked for.
  const int64_t unit = tables ? kSegment : kGroup, first = begin / unit * unit, held = tables ? std::min(first + kSegment, index.indexed()) : end;
  const int64_t groups = (held - first + kGroup - 1) / kGroup;
  Carver carve(task_scratch.get(groups * kGroup * 5 + kPad * 5 + kQuad * groups * 8 + 3 * kSegment + dim * 4 + 512));
  int32_t* id = carve.take<int32_t>(groups * kGroup + kPad);
  uint8_t* drawn = carve.take<uint8_t>(groups * kGroup + kPad);
  uint64_t* mask = carve.take<uint64_t>(kQuad * groups);
  uint8_t* counts = carve.take<uint8_t>(kSegment);
  uint16_t* list = carve.take<uint16_t>(kSegment);
  float* mean = carve.take<float>(dim);
  const auto attend = [&](int64_t count, int64_t head, int64_t heads) {
    const Timed timed(kAttend);
    std::fill_n(id + count, kPad, count > 0 ? id[count - 1] : 0);
    std::fill_n(drawn + count, kPad, uint8_t(0));
    for (int64_t from = 0; from < count;) {
      int64_t until;
      const int64_t which = index.mean_of(id[from], &until);
      const int64_t to = std::lower_bound(id + from, id + count, until) - id;
      for (int64_t d = 0; d < dim; ++d) mean[d] = index.mean(which, h)[d] / view.key_scale(h);
      // The rows behind a part are the next part's: those that the kernel pads with must not count.
      uint8_t kept[kPad];
      std::memcpy(kept, drawn + to, kPad);
      std::fill_n(drawn + to, kPad, uint8_t(0));
      kernels.gather(op.call.cache,
                     {hashed.query + (i * group + head) * dim, heads, dim, view.keys(b, h),
                      id + from, drawn + from, to - from, mean, op.tables.log_inclusion[op.tables.of_head[h]].data(), config.softcap, nullptr},
                     from_row(state, head, dim));
      std::memcpy(drawn + to, kept, kPad);
      from = to;
    }
  };
  for (int64_t head = 0; head < group; head += kQuad) {
    const int64_t heads = std::min(kQuad, group - head), row = i * group + head;
    Overlap overlap{};
    {
      const Timed timed(kRetrieve);
      for (int64_t g = 0; g < heads; ++g) {
        if (tables) {
          const int64_t s = first / kSegment;
          const WalkTask walk{index.start(h, s), index.ids(h, s), index.sorted(h, s), config.index.tables, config.index.buckets(),
                              op.layout.stride(s), held - first, hashed.codes + (row + g) * config.index.tables,
                              config.index.min_collisions, counts, list, mask + g * groups};
          if (!kernels.walk(walk)) op.good = false;
        } else {
          const int64_t words = config.index.words();
          kernels.scan({index.signatures(h) + first * words, words, groups, hashed.bits + (row + g) * config.index.row_words(),
                        config.max_hamming[h], mask + g * groups});
        }
        trim(mask + g * groups, groups, first, begin, end);
      }
      if (!op.good) return;
      overlap = kernels.overlap(mask, heads, groups);
    }
    // A pass for several heads reads a row once, and computes all of them for each. It pays when most rows were drawn by many.
    const int64_t step = overlap.apart > kShared * overlap.together ? heads : 1;
    for (int64_t g = 0; g < heads; g += step) attend(collect(mask + g * groups, step, groups, first, id, drawn), head + g, step);
  }
}

// Estimates scores of the query heads of pair i with the positions [begin, end), draws, and attends to what was drawn.
void sample_sketches(LshCall& op, const Hashed& hashed, int64_t i, int64_t begin, int64_t end, const SoftmaxState& state) {
  const auto& [config, view, kernels] = std::tie(op.config, op.view, op.kernels);
  const int64_t b = i / config.kv_heads, h = i % config.kv_heads, group = view.group, dim = view.dim, planes = config.index.planes;
  const Index& index = op.index[b];
  const float floor = std::log(config.fraction * kLeastShare);
  const int64_t room = end - begin + 2 * kGroup + kPad;
  Carver carve(task_scratch.get(kQuad * room * 8 + kQuad * (kChunk + 2 * kGroup) * 4 + 1024));
  int32_t* id = carve.take<int32_t>(kQuad * room);
  float* log_p = carve.take<float>(kQuad * room);
  float* scores = carve.take<float>(kQuad * (kChunk + 2 * kGroup));
  for (int64_t head = 0; head < group; head += kQuad) {
    const int64_t heads = std::min(kQuad, group - head), row = i * group + head;
    int64_t count[kQuad] = {};
    {
      const Timed timed(kRetrieve);
      for (int64_t from = begin; from < end;) {
        int64_t until;
        const int64_t mean = index.mean_of(from, &until), to = std::min({end, until, (from / kChunk + 1) * kChunk});
        const int64_t first = from / kGroup, groups = (to - 1) / kGroup - first + 1;
        float bias[kQuad];
        for (int64_t g = 0; g < heads; ++g) bias[g] = hashed.bias[row + g] + hashed.means[(row + g) * kMeans + mean];
        kernels.score({index.sketches(h) + first * sketch_block(planes), planes, groups, heads, hashed.table + row * planes * 32,
                       hashed.step + row, hashed.offset + row, bias, scores});
        for (int64_t g = 0; g < heads; ++g)
          count[g] += kernels.draw({scores + g * groups * kGroup, first, groups, from, to,
                                    draw_seed(op.call.length[b], h * group + head + g), log_thresholds().data(), floor,
                                    id + g * room + count[g], log_p + g * room + count[g]});
        from = to;
      }
    }
    const Timed timed(kAttend);
    for (int64_t g = 0; g < heads; ++g) {
      if (count[g] == 0) continue;
      int32_t* ids = id + g * room;
      std::fill_n(ids + count[g], kPad, ids[count[g] - 1]);
      std::fill_n(log_p + g * room + count[g], kPad, INFINITY);
      const int64_t at = head + g;
      kernels.gather(op.call.cache,
                     {hashed.query + (i * group + at) * dim, 1, dim, view.keys(b, h), ids,
                      nullptr, count[g], nullptr, nullptr, config.softcap, log_p + g * room},
                     from_row(state, at, dim));
    }
  }
}

}  // namespace

// Hashes the query heads of pair i; of sketches: fills their tables, and finds how many they would draw.
void LshCall::hash_query(int64_t i, const Hashed& hashed) const {
  const Timed timed(kHash);
  const int64_t b = i / config.kv_heads, h = i % config.kv_heads, group = view.group, dim = call.head_dim, words = config.index.row_words();
  float* query = hashed.query + i * group * dim;
  if (codes && config.index.kind != IndexKind::sketch) {
    const int64_t each = code_words(config.index);
    for (int64_t r = i * group; r < (i + 1) * group; ++r) {
      if (config.index.kind == IndexKind::signature) {
        std::memcpy(hashed.bits + r * words, codes + r * each, size_t(each) * 4);
        continue;
      }
      uint16_t* own = hashed.codes + r * config.index.tables;
      std::memcpy(own, codes + r * each, size_t(each) * 4);
      for (int64_t l = 0; l < config.index.tables; ++l) own[l] &= uint16_t(config.index.buckets() - 1);  // whatever came in
    }
    return;
  }
  if (config.index.kind != IndexKind::sketch) {
    view.load_query(b, 0, h, 1.f, query);  // as it is: a factor would change how it rounds
    tables.hash(kernels, query, group, hashed.bits + i * group * words, task_scratch.get(tables.scratch()));
    for (int64_t r = i * group; r < (i + 1) * group; ++r) cut_codes(config.index, hashed.bits + r * words, hashed.codes + r * config.index.tables);
    return;
  }
  const Index& row = index[b];
  const int64_t planes = config.index.planes, block = sketch_block(planes), means = row.header().means;
  view.load_query(b, 0, h, view.scale, query);
  for (int64_t r = i * group; r < (i + 1) * group; ++r)
    for (int64_t m = 0; m < means; ++m) {
      double product = 0.;
      for (int64_t d = 0; d < dim; ++d) product += double(hashed.query[r * dim + d]) * double(row.mean(m, h)[d]);
      hashed.means[r * kMeans + m] = kSharpness * float(product);
    }
  Carver carve(task_scratch.get(tables.scratch() + kQuad * (kOffsetGroups + 1) * kGroup * 4 + 512));
  float* scratch = carve.take<float>(rotate_scratch(dim));
  float* scores = carve.take<float>(kQuad * kOffsetGroups * kGroup);
  float* few = carve.take<float>(kQuad * kGroup);
  kernels.rotate({query, group, dim, tables.signs.data(), scratch});
  // Groups that lie wholly in the index; there are some, as nothing is indexed before kFirstKeys are.
  const int64_t first = (config.sink + kGroup - 1) / kGroup, all = row.indexed() / kGroup - first, some = std::min(all, kOffsetGroups);
  const double fraction = double(config.fraction), least = fraction * double(kLeastShare);
  for (int64_t from = i * group; from < (i + 1) * group; from += kQuad) {
    const int64_t heads = std::min(kQuad, (i + 1) * group - from);
    uint8_t* table = hashed.table + from * planes * 32;
    for (int64_t r = from; r < from + heads; ++r) {
      const SketchQuery q = sketch_query(hashed.query + r * dim, dim, hashed.table + r * planes * 32);
      hashed.step[r] = kSharpness * q.step, hashed.offset[r] = kSharpness * q.offset, hashed.bias[r] = 0.f;
    }
    for (int64_t n = 0; n < some; ++n) {
      const int64_t at = first + n * all / some, next = first + std::min(n + 1, some - 1) * all / some;
      for (int64_t line = 0; line < block; line += 64) __builtin_prefetch(row.sketches(h) + next * block + line, 0, 2);
      int64_t until;
      const int64_t mean = row.mean_of(at * kGroup, &until);
      float bias[kQuad];
      for (int64_t g = 0; g < heads; ++g) bias[g] = hashed.means[(from + g) * kMeans + mean];
      kernels.score({row.sketches(h) + at * block, planes, 1, heads, table, hashed.step + from, hashed.offset + from, bias, few});
      for (int64_t g = 0; g < heads; ++g) std::copy_n(few + g * kGroup, kGroup, scores + (g * some + n) * kGroup);
    }
    for (int64_t g = 0; g < heads && some > 0; ++g)
      hashed.bias[from + g] = sketch_offset(scores + g * some * kGroup, some * kGroup, fraction * double(some * kGroup), least);
  }
}

void LshCall::sample(const Hashed& hashed, int64_t i, int64_t begin, int64_t end, const SoftmaxState& state) {
  (config.index.kind == IndexKind::sketch ? sample_sketches : sample_hashed)(*this, hashed, i, begin, end, state);
}

}  // namespace attnspan
