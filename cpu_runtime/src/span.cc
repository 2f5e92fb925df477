#include "span.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>

#include "call.h"

namespace attnspan {
namespace {

// Tokens of one decode task: long enough to stream (512 KiB of K and V in bf16 at head_dim 128), short enough to balance; longer
// where there are many tasks, as each costs a start and a partial state.
constexpr int64_t kShortChunk = 1024, kLongChunk = 4096, kManyTasks = 256;

// A decode step writes its token first: the slot it takes belonged to a token that has just left the window.
void decode(const CallView& view, const Parallel& parallel) {
  const auto& [config, call, kernels] = std::tie(view.config, view.call, view.kernels);
  const int64_t pairs = call.batch * config.kv_heads, group = view.group, dim = view.dim, sink = config.sink;

  struct Pair {
    Kept kept;
    int64_t first_task, tasks;
  };
  std::vector<Pair> pair;
  std::vector<int32_t> owner;
  int64_t tasks = 0, all_kept = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    pair.push_back({Kept(call.span[i], sink, call.length[i / config.kv_heads]), 0, 0});
    all_kept += pair[i].kept.tokens();
  }
  const int64_t chunk = kept_chunk(all_kept);
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t count = (pair[i].kept.tokens() + chunk - 1) / chunk;
    pair[i].first_task = tasks, pair[i].tasks = count;
    owner.insert(owner.end(), count, int32_t(i));
    tasks += count;
  }
  // Partial states lie together per pair, so that the last task of a pair merges them in place.
  const int64_t rows = tasks * group;
  Carver carve(call_scratch.get((rows * (dim + 2)) * 4 + 3 * 64));
  float *max = carve.take<float>(rows), *sum = carve.take<float>(rows), *acc = carve.take<float>(rows * dim);
  std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[pairs]);
  for (int64_t i = 0; i < pairs; ++i) left[i].store(pair[i].tasks, std::memory_order_relaxed);

  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t b = i / config.kv_heads, h = i % config.kv_heads;
    const int64_t slot = slot_of(call.length[b], sink, config.capacity[h]) * view.slot_bytes;
    float* wide = reinterpret_cast<float*>(task_scratch.get(dim * 4));
    view.store_token(b, 0, h, view.keys(b, h) + slot, view.values(b, h) + slot, wide);
    if (pair[i].tasks > 0) continue;
    std::fill_n(wide, dim, 0.f);
    for (int64_t g = 0; g < group; ++g) view.finish(b, 0, h, g, wide, 0.f, 0.f);
  }

  parallel(tasks, [&](int64_t task) {
    const int64_t i = owner[task], b = i / config.kv_heads, h = i % config.kv_heads;
    const Pair& p = pair[i];
    float* query = reinterpret_cast<float*>(task_scratch.get(group * dim * 4));
    view.load_query(b, 0, h, view.score_scale(h), query);
    SoftmaxState state{max + task * group, sum + task * group, acc + task * group * dim};
    std::fill_n(state.max, group, -INFINITY);
    std::fill_n(state.sum, group, 0.f);
    std::fill_n(state.acc, group * dim, 0.f);
    const int64_t begin = (task - p.first_task) * chunk, end = std::min(p.kept.tokens(), begin + chunk);
    view.attend(b, h, p.kept, begin, end, config.capacity[h], true, query, state);
    if (left[i].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    const int64_t first = p.first_task * group;
    const SoftmaxState all{max + first, sum + first, acc + first * dim};
    kernels.merge(all, p.tasks, group, dim);
    for (int64_t g = 0; g < group; ++g) view.finish(b, 0, h, g, all.acc + g * dim, all.max[g], all.sum[g]);
  });
}

// Query rows of one prefill task: enough to pay for widening a tile of keys, few enough to stay in the L2 cache.
constexpr int64_t kTaskRows = 128;

void prefill(const CallView& view, const Parallel& parallel) {
  const auto& [config, call, kernels] = std::tie(view.config, view.call, view.kernels);
  const int64_t group = view.group, dim = view.dim, sink = config.sink, tokens = call.tokens, row_bytes = view.row_bytes;
  const int64_t pairs = call.batch * config.kv_heads;

  // The chunk in its stored form, [batch, kv_heads, tokens, head_dim].
  Carver carve(call_scratch.get(2 * (pairs * tokens * row_bytes + 64)));
  char *chunk_key = carve.take<char>(pairs * tokens * row_bytes), *chunk_value = carve.take<char>(pairs * tokens * row_bytes);
  parallel(pairs, [&](int64_t i) {
    float* wide = reinterpret_cast<float*>(task_scratch.get(dim * 4));
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t at = (i * tokens + t) * row_bytes;
      view.store_token(i / config.kv_heads, t, i % config.kv_heads, chunk_key + at, chunk_value + at, wide);
    }
  });

  const int64_t task_tokens = std::max<int64_t>(kTaskRows / group, 8), blocks = (tokens + task_tokens - 1) / task_tokens;
  parallel(pairs * blocks, [&](int64_t index) {
    // The last blocks see most keys: they go first, so that no thread is left with a long task at the end.
    const int64_t i = index % pairs, block = blocks - 1 - index / pairs, b = i / config.kv_heads, h = i % config.kv_heads;
    const int64_t start = block * task_tokens, length = call.length[b], capacity = config.capacity[h], span = call.span[i];
    const bool far = call.far && span > 0;
    const int64_t window = (call.far && !far ? capacity : span) - sink;
    PrefillTask task{std::min(task_tokens, tokens - start), group, dim, length + start, window, sink,
                     config.softcap, view.score_scale(h), call.activation == DType::bf16};
    // Of what lies far a query sees what one that stands a window before it sees of all, less the sinks.
    if (far) task.first -= window, task.window = INT32_MAX, task.sink = 0;
    const int64_t rows = task.rows(), padded = round_up(rows, kRowPanel);
    Carver scratch_carve(task_scratch.get((rows * dim + 2 * padded * dim + kKeyTile * (kRowPanel + 2 * dim) + 3 * padded) * 4 + 512));
    PrefillScratch scratch;
    scratch.query = scratch_carve.take<float>(rows * dim);
    scratch.query_panel = scratch_carve.take<float>(padded * dim);
    scratch.scores = scratch_carve.take<float>(kKeyTile * kRowPanel);
    scratch.key = scratch_carve.take<float>(kKeyTile * dim);
    scratch.value = scratch_carve.take<float>(kKeyTile * dim);
    scratch.position = scratch_carve.take<int32_t>(padded);
    scratch.state.max = scratch_carve.take<float>(padded);
    scratch.state.sum = scratch_carve.take<float>(padded);
    scratch.state.acc = scratch_carve.take<float>(padded * dim);
    const int64_t last = task.first + task.tokens - 1;
    if (far ? last < sink : !call.far && span == 0) {
      std::fill_n(scratch.query, dim, 0.f);
      for (int64_t r = 0; r < rows; ++r) view.finish(b, start + r / group, h, r % group, scratch.query, 0.f, 0.f);
      return;
    }
    for (int64_t t = 0; t < task.tokens; ++t) view.load_query(b, start + t, h, 1.f, scratch.query + t * group * dim);
    kernels.prefill_begin(call.cache, task, scratch);

    const char *ring_key = view.keys(b, h), *ring_value = view.values(b, h);
    // Tiles over positions [from, to): the ring below `length`, the chunk from there on.
    const auto walk = [&](int64_t from, int64_t to) {
      while (from < to) {
        KeyTile tile{};
        tile.first = from;
        for (int run = 0; run < 2 && from < to && from - tile.first < kKeyTile; ++run) {
          const int64_t room = std::min(to - from, kKeyTile - (from - tile.first));
          if (from < length) {
            const int64_t slot = slot_of(from, sink, capacity), end = from < sink ? sink : capacity;
            tile.count[run] = std::min({room, length - from, end - slot});
            tile.stride[run] = view.stride;
            tile.key[run] = ring_key + slot * view.slot_bytes, tile.value[run] = ring_value + slot * view.slot_bytes;
          } else {
            const int64_t at = (i * tokens + from - length) * row_bytes;
            tile.count[run] = room, tile.stride[run] = dim;
            tile.key[run] = chunk_key + at, tile.value[run] = chunk_value + at;
          }
          from += tile.count[run];
        }
        kernels.prefill_tile(call.cache, task, tile, scratch);
      }
    };
    walk(0, std::min(task.sink, last + 1));
    walk(std::max(sink, task.first - task.window + 1), last + 1);

    kernels.prefill_end(task, scratch);
    for (int64_t r = 0; r < rows; ++r)
      view.finish(b, start + r / group, h, r % group, scratch.query + r * dim, scratch.state.max[r], scratch.state.sum[r]);
  });

  parallel(pairs, [&](int64_t i) {
    const int64_t b = i / config.kv_heads, h = i % config.kv_heads, capacity = config.capacity[h];
    char *ring_key = view.keys(b, h), *ring_value = view.values(b, h);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t position = call.length[b] + t;
      // Of a chunk longer than the ring only the sinks and the last tokens stay.
      if (position >= sink && tokens - t > capacity - sink) continue;
      const int64_t slot = slot_of(position, sink, capacity) * view.slot_bytes, at = (i * tokens + t) * row_bytes;
      std::memcpy(ring_key + slot, chunk_key + at, row_bytes);
      std::memcpy(ring_value + slot, chunk_value + at, row_bytes);
    }
  });
}

}  // namespace

int64_t kept_chunk(int64_t all_kept) { return std::clamp(all_kept / kManyTasks, kShortChunk, kLongChunk); }

void CallView::attend(int64_t b, int64_t h, const Kept& kept, int64_t begin, int64_t end, int64_t capacity, bool ring, const float* query,
                      const SoftmaxState& state) const {
  for (int64_t k = begin; k < end;) {
    const int64_t position = k < kept.sinks ? k : kept.position + 1 - kept.tokens() + k, slot = slot_of(position, config.sink, capacity);
    const int64_t run = std::min(k < kept.sinks ? kept.sinks - k : capacity - slot, end - k), at = (ring ? slot : position) * slot_bytes;
    kernels.decode(call.cache, DecodeRun{query, group, dim, keys(b, h) + at, values(b, h) + at, stride, run, config.softcap}, state);
    k += run;
  }
}

std::vector<int64_t> SpanConfig::offset() const {
  std::vector<int64_t> out{0};
  for (int64_t c : capacity) out.push_back(out.back() + c);
  return out;
}

std::string SpanConfig::check() const {
  const auto text = [](int64_t v) { return std::to_string(v); };
  if (kv_heads < 1 || heads < 1 || heads % kv_heads != 0)
    return "num_heads is " + text(heads) + " and kv_num_heads " + text(kv_heads) + "; the first must be a positive multiple of the second";
  if (int64_t(capacity.size()) != kv_heads)
    return "capacity has " + text(int64_t(capacity.size())) + " entries; kv_num_heads is " + text(kv_heads);
  if (sink < 0) return "sink is " + text(sink) + "; it must not be negative";
  for (int64_t c : capacity)
    if (c <= sink || c > INT32_MAX) return "a capacity is " + text(c) + "; it must be above sink (" + text(sink) + ") and fit in 31 bits";
  if (!(softcap >= 0.f) || !std::isfinite(scale)) return "softcap must be at least 0 and scale finite";
  return "";
}

std::string check_call(const SpanConfig& config, const SpanCall& call) {
  for (int64_t b = 0; b < call.batch; ++b) {
    if (call.length[b] < 0 || call.length[b] > INT32_MAX - call.tokens)
      return "length of row " + std::to_string(b) + " is " + std::to_string(call.length[b]) + "; allowed are 0 to " +
             std::to_string(INT32_MAX - call.tokens);
    for (int64_t h = 0; h < config.kv_heads; ++h) {
      const int64_t span = call.span[b * config.kv_heads + h], capacity = config.capacity[h];
      // A step writes its token before it attends: then the ring must have room for it.
      const bool whole = call.length[b] + (call.tokens == 1) <= capacity;
      if (span != 0 && (span <= config.sink || (span > capacity && !whole)))
        return "span of row " + std::to_string(b) + ", KV head " + std::to_string(h) + " is " + std::to_string(span) +
               "; allowed are " + std::to_string(config.sink + 1) + " to the head's capacity " + std::to_string(capacity) +
               (whole ? ", more while nothing has left its ring, and 0 for none" : ", and 0 for none");
    }
  }
  return "";
}

void span_attention(const SpanConfig& config, const SpanCall& call, const Kernels& kernels, const Parallel& parallel) {
  const CallView view(config, call, kernels);
  if (call.batch == 0 || call.tokens == 0) return;
  if (call.tokens == 1) {
    decode(view, parallel);
  } else {
    prefill(view, parallel);
  }
}

}  // namespace attnspan
