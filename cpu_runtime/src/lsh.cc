#include "lsh.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <tuple>

#include "call.h"
#include "sketch_query.h"

namespace attnspan {
namespace {

// Adds the time of a scope to one of four counters, when asked to.
enum Part { kHash, kRetrieve, kAttend, kUpdate };
std::atomic<int64_t> spent[4];
class Timed {
 public:
  explicit Timed(Part part) : part_(part), start_(on() ? now() : 0) {}
  ~Timed() {
    if (start_) spent[part_].fetch_add(now() - start_, std::memory_order_relaxed);
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

constexpr int64_t kHashTokens = 256;    // keys of one hashing task
constexpr int64_t kBulkMerge = 1024;    // codes that a prefill leaves unsorted in a table, at least
constexpr int64_t kStepMerge = 1024;    // codes above which decode steps sort a table
constexpr int64_t kExactTokens = 2048;  // tokens of an exact decode task
// Tokens of a sampling task over signatures: more where there are many tasks, as each waits for the first rows that it draws.
constexpr int64_t kShortScan = 8192, kLongScan = 32768, kManyScans = 64;
// Tokens from which a step samples: tables win from 4096 on, signatures from 1024, where the little there is to save is not worth the noise
// (docs/results.md). Of signatures, of tables.
constexpr int64_t kDenseBelow[] = {2048, 4096};
constexpr int64_t kChunk = 2048;        // tokens whose scores are estimated before any is drawn
constexpr int64_t kQuad = 4;            // query heads that may share a pass over the drawn rows
constexpr int64_t kShared = 2;          // heads that draw a row on average, above which they do
constexpr float kNothing = -1e30f;      // running maximum before any key: finite, so that a head that drew nothing gives zeros

// One call of the op.
struct Op {
  const LshConfig& config;
  const SpanCall& call;
  const CallView& view;
  const LshTables& tables;
  const Kernels& kernels;
  const Parallel& parallel;
  IndexLayout layout;
  std::vector<Index> index;  // one a row
  std::atomic<bool> good{true};

  Op(const LshConfig& c, const SpanCall& a, const CallView& v, const LshTables& t, const Kernels& k, const Parallel& p,
     int64_t capacity, void* state)
      : config(c), call(a), view(v), tables(t), kernels(k), parallel(p), layout(c.index, c.kv_heads, a.head_dim, capacity) {
    for (int64_t b = 0; b < a.batch; ++b) index.emplace_back(c.index, layout, c.sink, static_cast<char*>(state) + b * layout.bytes);
  }

  int64_t pairs() const { return call.batch * config.kv_heads; }
  int64_t target(int64_t tokens) const { return std::max(config.sink, tokens - config.window); }

  void update(int64_t b, int64_t to);
  void add_keys(int64_t b, int64_t from, int64_t to);
  void merge_due(int64_t b, bool bulk);
  void hash_query(int64_t i, const struct Hashed& hashed) const;
  bool decode();
};

// Brings row b's index to the positions below `to`, whose keys are in the cache.
void Op::update(int64_t b, int64_t to) {
  Index& row = index[b];
  const int64_t from = row.indexed();
  if (config.index.kind == IndexKind::exact || to <= from) return;
  if (row.header().means == 0 && to - config.sink < kFirstKeys) return;
  const Timed timed(kUpdate);
  add_keys(b, from, to);
  row.header().sum_keys += uint32_t(to - from);
  row.begin_mean();
  const int64_t dim = call.head_dim, words = config.index.row_words();
  // Tasks end at multiples of their size, so that no two write to one block of signatures, and none crosses a segment.
  const int64_t first = from / kHashTokens, blocks = (to - 1) / kHashTokens - first + 1;
  const float* mean = row.mean(row.header().means - 1, 0);
  parallel(config.kv_heads * blocks, [&](int64_t task) {
    const int64_t h = task % config.kv_heads, block = first + task / config.kv_heads;
    const int64_t begin = std::max(from, block * kHashTokens), count = std::min(to, (block + 1) * kHashTokens) - begin;
    Carver carve(task_scratch.get(count * (dim * 4 + words * 8) + tables.scratch() + 192));
    float* x = carve.take<float>(count * dim);
    uint64_t* bits = carve.take<uint64_t>(count * words);
    char* scratch = carve.take<char>(tables.scratch());
    kernels.load(call.cache, view.ring(call.past_key, b, h) + begin * view.row_bytes, view.key_scale(h), x, count * dim);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < dim; ++d) x[i * dim + d] -= mean[h * dim + d];
    tables.hash(kernels, x, count, bits, scratch);
    row.put(h, begin, count, bits);
  });
  row.header().indexed = uint32_t(to);
  if (config.index.kind == IndexKind::tables) merge_due(b, to - from > 1);
}

// Adds the keys to the sums that means are taken of.
void Op::add_keys(int64_t b, int64_t from, int64_t to) {
  const int64_t dim = call.head_dim;
  parallel(config.kv_heads, [&](int64_t h) {
    constexpr int64_t rows = 64;
    float* x = reinterpret_cast<float*>(task_scratch.get((rows + 1) * dim * 4));
    float* part = x + rows * dim;
    double* sum = index[b].sum(h);
    for (int64_t at = from; at < to; at += rows) {
      const int64_t count = std::min(rows, to - at);
      kernels.load(call.cache, view.ring(call.past_key, b, h) + at * view.row_bytes, view.key_scale(h), x, count * dim);
      std::fill_n(part, dim, 0.f);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t d = 0; d < dim; ++d) part[d] += x[i * dim + d];
      for (int64_t d = 0; d < dim; ++d) sum[d] += double(part[d]);
    }
  });
}

// Sorts codes into buckets: a prefill sorts all tables of a segment when enough has come together; a decode step sorts a few tables,
// so many that none falls behind.
void Op::merge_due(int64_t b, bool bulk) {
  Index& row = index[b];
  const int64_t indexed = row.indexed(), jobs = config.kv_heads * config.index.tables;
  const int64_t last = (indexed - 1) / kSegment, first = bulk ? 0 : std::max<int64_t>(0, last - 1);
  struct Job {
    int64_t h, s, l;
  };
  std::vector<Job> due;
  const auto coded = [&](int64_t s) { return std::min(layout.stride(s), indexed - s * kSegment); };
  const auto wanted = [&](const Job& j, int64_t least) {
    const int64_t rest = row.unsorted(j.h, j.s, j.l, coded(j.s)), done = coded(j.s) - rest;
    return rest > 0 && (rest >= std::max(least, bulk ? done / 4 : 0) || coded(j.s) == kSegment);
  };
  if (bulk) {
    for (int64_t s = first; s <= last; ++s)
      for (int64_t j = 0; j < jobs; ++j)
        if (const Job job{j / config.index.tables, s, j % config.index.tables}; wanted(job, kBulkMerge)) due.push_back(job);
  } else {
    int64_t left = (2 * jobs + kStepMerge - 1) / kStepMerge, looked = 0;
    uint32_t& next = row.header().next_merge;
    for (; left > 0 && looked < 2 * left; ++looked) {
      const int64_t j = next % jobs;
      next = uint32_t((j + 1) % jobs);
      for (int64_t s = first; s <= last; ++s)
        if (const Job job{j / config.index.tables, s, j % config.index.tables}; wanted(job, kStepMerge)) due.push_back(job), --left;
    }
  }
  parallel(int64_t(due.size()), [&](int64_t i) {
    auto* scratch = reinterpret_cast<uint16_t*>(task_scratch.get((kSegment + 3 * (config.index.buckets() + 1)) * 2));
    if (!row.merge(due[i].h, due[i].s, due[i].l, coded(due[i].s), scratch)) good = false;
  });
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

void cut_codes(const IndexConfig& index, const uint64_t* bits, uint16_t* codes) {
  for (int64_t l = 0; l < index.tables; ++l) {
    const int64_t bit = l * index.bits, shift = bit % 64;
    const uint64_t low = bits[bit / 64] >> shift, high = shift + index.bits > 64 ? bits[bit / 64 + 1] << (64 - shift) : 0;
    codes[l] = uint16_t((low | high) & uint64_t(index.buckets() - 1));
  }
}

// Draws positions of [begin, end) for the query heads of pair i, and attends to them.
void sample(Op& op, const Hashed& hashed, int64_t i, int64_t begin, int64_t end, const SoftmaxState& state) {
  const auto& [config, view, kernels] = std::tie(op.config, op.view, op.kernels);
  const int64_t b = i / config.kv_heads, h = i % config.kv_heads, group = view.group, dim = view.dim;
  const bool tables = config.index.kind == IndexKind::tables;
  const int64_t unit = tables ? kSegment : kGroup, first = begin / unit * unit, groups = (end - first + kGroup - 1) / kGroup;
  const Index& index = op.index[b];
  Carver carve(task_scratch.get(groups * kGroup * 5 + kPad * 5 + kQuad * groups * 8 + 2 * kSegment + dim * 4 + 512));
  int32_t* id = carve.take<int32_t>(groups * kGroup + kPad);
  uint8_t* drawn = carve.take<uint8_t>(groups * kGroup + kPad);
  uint64_t* mask = carve.take<uint64_t>(kQuad * groups);
  uint8_t* counts = carve.take<uint8_t>(2 * kSegment);
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
                     {hashed.query + (i * group + head) * dim, heads, dim, view.ring(op.call.past_key, b, h), view.ring(op.call.past_value, b, h),
                      id + from, drawn + from, to - from, mean, op.tables.log_inclusion[op.tables.of_head[h]].data(), config.softcap, nullptr},
                     {state.max + head, state.sum + head, state.acc + head * dim});
      std::memcpy(drawn + to, kept, kPad);
      from = to;
    }
  };
  for (int64_t head = 0; head < group; head += kQuad) {
    const int64_t heads = std::min(kQuad, group - head), row = i * group + head;
    int64_t together = 0, apart = 0;
    {
      const Timed timed(kRetrieve);
      for (int64_t g = 0; g < heads; ++g) {
        if (tables) {
          const int64_t s = first / kSegment;
          const WalkTask walk{index.start(h, s), index.ids(h, s), index.sorted(h, s), config.index.tables, config.index.buckets(),
                              op.layout.stride(s), end - s * kSegment, hashed.codes + (row + g) * config.index.tables,
                              config.index.min_collisions, counts, mask + g * groups};
          if (!kernels.walk(walk)) op.good = false;
        } else {
          const int64_t words = config.index.words();
          kernels.scan({index.signatures(h) + first * words, words, groups, hashed.bits + (row + g) * config.index.row_words(),
                        config.max_hamming[h], mask + g * groups});
        }
        trim(mask + g * groups, groups, first, begin, end);
      }
      if (!op.good) return;
      for (int64_t g = 0; g < groups; ++g) {
        uint64_t any = 0;
        for (int64_t q = 0; q < heads; ++q) any |= mask[q * groups + g], apart += __builtin_popcountll(mask[q * groups + g]);
        together += __builtin_popcountll(any);
      }
    }
    // A pass for several heads reads a row once, and computes all of them for each. It pays when most rows were drawn by many.
    const int64_t step = apart > kShared * together ? heads : 1;
    for (int64_t g = 0; g < heads; g += step) attend(collect(mask + g * groups, step, groups, first, id, drawn), head + g, step);
  }
}

// Estimates scores of the query heads of pair i with the positions [begin, end), draws, and attends to what was drawn.
void sample_sketches(Op& op, const Hashed& hashed, int64_t i, int64_t begin, int64_t end, const SoftmaxState& state) {
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
                     {hashed.query + (i * group + at) * dim, 1, dim, view.ring(op.call.past_key, b, h), view.ring(op.call.past_value, b, h), ids,
                      nullptr, count[g], nullptr, nullptr, config.softcap, log_p + g * room},
                     {state.max + at, state.sum + at, state.acc + at * dim});
    }
  }
}

// Hashes the query heads of pair i; of sketches: fills their tables, and finds how many they would draw.
void Op::hash_query(int64_t i, const Hashed& hashed) const {
  const Timed timed(kHash);
  const int64_t b = i / config.kv_heads, h = i % config.kv_heads, group = view.group, dim = call.head_dim, words = config.index.row_words();
  float* query = hashed.query + i * group * dim;
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

bool Op::decode() {
  const int64_t group = view.group, dim = call.head_dim, words = config.index.row_words();
  for (int64_t i = 0; i < pairs(); ++i) {
    const int64_t b = i / config.kv_heads, h = i % config.kv_heads, at = call.length[b] * view.row_bytes;
    view.store_token(b, 0, h, view.ring(call.past_key, b, h) + at, view.ring(call.past_value, b, h) + at,
                     reinterpret_cast<float*>(task_scratch.get(dim * 4)));
  }
  for (int64_t b = 0; b < call.batch; ++b) update(b, target(call.length[b] + 1));
  if (!good) return false;

  struct Task {
    int64_t pair, begin, end;
    bool sampled;
  };
  std::vector<Task> task;
  std::vector<int64_t> first_task;
  const bool tabled = config.index.kind == IndexKind::tables;
  const int64_t dense_below = config.dense_below < 0 ? kDenseBelow[tabled] : config.dense_below;
  bool any = false;
  int64_t scanned = 0;
  for (const Index& row : index) scanned += row.indexed() * config.kv_heads;
  const int64_t scan = tabled ? kSegment : std::clamp(scanned / kManyScans / kShortScan * kShortScan, kShortScan, kLongScan);
  for (int64_t i = 0; i < pairs(); ++i) {
    const int64_t b = i / config.kv_heads, tokens = call.length[b] + 1;
    const bool sampled = config.index.kind != IndexKind::exact && tokens >= dense_below && index[b].indexed() > config.sink;
    const auto split = [&](int64_t from, int64_t to, int64_t step, bool draw) {
      for (int64_t at = from; at < to; at = (at / step + 1) * step) task.push_back({i, at, std::min(to, (at / step + 1) * step), draw});
    };
    first_task.push_back(int64_t(task.size()));
    any |= sampled;
    if (sampled) {
      split(0, config.sink, kExactTokens, false);
      split(index[b].indexed(), tokens, kExactTokens, false);
      split(config.sink, index[b].indexed(), scan, true);
    } else {
      split(0, tokens, kExactTokens, false);
    }
  }
  first_task.push_back(int64_t(task.size()));

  const int64_t rows = pairs() * group, states = int64_t(task.size()) * group;
  const int64_t planes = config.index.planes;
  Carver carve(call_scratch.get((states * (dim + 2) + rows * (dim + 3 + kMeans)) * 4 + rows * (words * 8 + config.index.tables * 2 + planes * 32) + 1024));
  const SoftmaxState all{carve.take<float>(states), carve.take<float>(states), carve.take<float>(states * dim)};
  Hashed hashed;
  hashed.query = carve.take<float>(rows * dim);
  hashed.bits = carve.take<uint64_t>(rows * words);
  hashed.codes = carve.take<uint16_t>(rows * config.index.tables);
  hashed.table = carve.take<uint8_t>(rows * planes * 32);
  hashed.step = carve.take<float>(rows);
  hashed.offset = carve.take<float>(rows);
  hashed.bias = carve.take<float>(rows);
  hashed.means = carve.take<float>(rows * kMeans);
  std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[size_t(pairs())]);
  for (int64_t i = 0; i < pairs(); ++i) left[i].store(first_task[i + 1] - first_task[i], std::memory_order_relaxed);

  parallel(pairs(), [&](int64_t i) {
    const int64_t b = i / config.kv_heads, h = i % config.kv_heads;
    float* query = hashed.query + i * group * dim;
    if (any) hash_query(i, hashed);
    view.load_query(b, 0, h, view.score_scale(h), query);
  });
  parallel(int64_t(task.size()), [&](int64_t t) {
    const auto [i, begin, end, sampled] = task[t];
    const int64_t b = i / config.kv_heads, h = i % config.kv_heads;
    const SoftmaxState state{all.max + t * group, all.sum + t * group, all.acc + t * group * dim};
    std::fill_n(state.max, group, kNothing);
    std::fill_n(state.sum, group, 0.f);
    std::fill_n(state.acc, group * dim, 0.f);
    if (sampled && config.index.kind == IndexKind::sketch) {
      sample_sketches(*this, hashed, i, begin, end, state);
    } else if (sampled) {
      sample(*this, hashed, i, begin, end, state);
    } else {
      const Timed timed(kAttend);
      const char *key = view.ring(call.past_key, b, h), *value = view.ring(call.past_value, b, h);
      kernels.decode(call.cache, DecodeRun{hashed.query + i * group * dim, group, dim, key + begin * view.row_bytes,
                                           value + begin * view.row_bytes, end - begin, config.softcap}, state);
    }
    if (left[i].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    const int64_t first = first_task[i] * group;
    const SoftmaxState whole{all.max + first, all.sum + first, all.acc + first * dim};
    kernels.merge(whole, first_task[i + 1] - first_task[i], group, dim);
    for (int64_t g = 0; g < group; ++g) view.finish(b, 0, h, g, whole.acc + g * dim, whole.max[g], whole.sum[g]);
  });
  return good;
}

}  // namespace

bool lsh_attention(const LshConfig& config, const SpanCall& given, int64_t capacity, void* state, const LshTables& tables,
                   const Kernels& kernels, const Parallel& parallel) {
  if (given.batch == 0 || given.tokens == 0) return true;
  const std::vector<int32_t> spans(size_t(given.batch * config.kv_heads), int32_t(capacity));
  const SpanConfig span{config.heads, config.kv_heads, std::vector<int64_t>(size_t(config.kv_heads), capacity), config.sink, config.scale,
                        config.softcap};
  SpanCall call = given;
  call.span = spans.data();
  const CallView view(span, call, kernels);
  Op op(config, call, view, tables, kernels, parallel, capacity, state);
  if (call.tokens == 1) return op.decode();
  span_attention(span, call, kernels, parallel);
  for (int64_t b = 0; b < call.batch; ++b) op.update(b, op.target(call.length[b] + call.tokens));
  return op.good;
}

void lsh_profile(int64_t* out, bool reset) {
  for (int i = 0; i < 4; ++i) out[i] = reset ? spent[i].exchange(0) : spent[i].load();
}

}  // namespace attnspan
