#include "lsh.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "lsh_call.h"

namespace attnspan {
namespace {

constexpr int64_t kExactTokens = 2048;  // tokens of an exact decode task
// Tokens of a sampling task over signatures: more where there are many tasks, as each waits for the first rows that it draws.
constexpr int64_t kShortScan = 8192, kLongScan = 32768, kManyScans = 64;
// Tokens from which a step samples: tables win from 4096 on, signatures from 1024, where the little there is to save is not worth the noise
// (docs/results.md). Of signatures, of tables.
constexpr int64_t kDenseBelow[] = {2048, 4096};
constexpr float kNothing = -1e30f;      // running maximum before any key: finite, so that a head that drew nothing gives zeros

}  // namespace

std::atomic<int64_t> lsh_spent[4];
static std::atomic<int64_t> guarded[2];

bool LshCall::decode() {
  const int64_t group = view.group, dim = call.head_dim, words = config.index.row_words();
  for (int64_t i = 0; i < pairs(); ++i) {
    const int64_t b = i / config.kv_heads, h = i % config.kv_heads, at = call.length[b] * view.slot_bytes;
    view.store_token(b, 0, h, view.keys(b, h) + at, view.values(b, h) + at, reinterpret_cast<float*>(task_scratch.get(dim * 4)));
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
    const int64_t b = i / config.kv_heads, tokens = call.length[b] + 1, last = end(i), first = call.far ? config.sink : 0;
    const int64_t drawn = std::min(last, index[b].indexed());
    const bool sampled = config.index.kind != IndexKind::exact && tokens >= dense_below && drawn > config.sink;
    const auto split = [&](int64_t from, int64_t to, int64_t step, bool draw) {
      for (int64_t at = from; at < to; at = (at / step + 1) * step) task.push_back({i, at, std::min(to, (at / step + 1) * step), draw});
    };
    first_task.push_back(int64_t(task.size()));
    any |= sampled;
    if (sampled) {
      split(first, config.sink, kExactTokens, false);
      split(drawn, last, kExactTokens, false);
      split(config.sink, drawn, scan, true);
    } else {
      split(first, last, kExactTokens, false);
    }
  }
  first_task.push_back(int64_t(task.size()));

  const int64_t rows = pairs() * group, states = int64_t(task.size()) * group;
  const int64_t planes = config.index.planes;
  Carver carve(call_scratch.get((states * (dim + 3) + rows * (dim + 3 + kMeans)) * 4 + rows * (words * 8 + config.index.tables * 2 + planes * 32) + 1024));
  const SoftmaxState all{carve.take<float>(states), carve.take<float>(states), carve.take<float>(states * dim),
                         any && config.guard > 0.f ? carve.take<float>(states) : nullptr};
  const auto state_of = [&](int64_t t) {
    return SoftmaxState{all.max + t * group, all.sum + t * group, all.acc + t * group * dim, all.spread ? all.spread + t * group : nullptr};
  };
  const auto clear = [&](const SoftmaxState& state) {
    std::fill_n(state.max, group, kNothing);
    std::fill_n(state.sum, group, 0.f);
    std::fill_n(state.acc, group * dim, 0.f);
    if (state.spread) std::fill_n(state.spread, group, 0.f);
  };
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
    if (left[i] > 0) return;
    std::fill_n(query, dim, 0.f);
    for (int64_t g = 0; g < group; ++g) view.finish(b, 0, h, g, query, 0.f, 0.f);
  });
  const auto exact = [&](const Task& t, const SoftmaxState& state) {
    const Timed timed(kAttend);
    const int64_t b = t.pair / config.kv_heads, h = t.pair % config.kv_heads, at = t.begin * view.slot_bytes;
    kernels.decode(call.cache, DecodeRun{hashed.query + t.pair * group * dim, group, dim, view.keys(b, h) + at, view.values(b, h) + at,
                                         view.stride, t.end - t.begin, config.softcap}, state);
  };
  parallel(int64_t(task.size()), [&](int64_t t) {
    const auto [i, begin, end, sampled] = task[t];
    const int64_t b = i / config.kv_heads, h = i % config.kv_heads;
    const SoftmaxState state = state_of(t);
    clear(state);
    if (sampled) {
      sample(hashed, i, begin, end, state);
    } else {
      exact(task[t], state);
    }
    if (left[i].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    const SoftmaxState whole = state_of(first_task[i]);
    kernels.merge(whole, first_task[i + 1] - first_task[i], group, dim);
    if (whole.spread && good) {
      bool doubtful = false, drawn = false;
      for (int64_t g = 0; g < group; ++g) doubtful |= !(std::sqrt(whole.spread[g]) <= config.guard * whole.sum[g]);
      for (int64_t n = first_task[i]; n < first_task[i + 1]; ++n) drawn |= task[n].sampled;
      guarded[0] += drawn;
      if (drawn && doubtful) {
        ++guarded[1];
        clear(whole);
        for (int64_t n = first_task[i]; n < first_task[i + 1]; ++n) exact(task[n], whole);
      }
    }
    for (int64_t g = 0; g < group; ++g) view.finish(b, 0, h, g, whole.acc + g * dim, whole.max[g], whole.sum[g]);
  });
  return good;
}

bool lsh_attention(const LshConfig& config, const SpanCall& given, int64_t capacity, void* state, const LshTables& tables,
                   const Kernels& kernels, const Parallel& parallel, const int32_t* codes) {
  if (given.batch == 0 || given.tokens == 0) return true;
  const std::vector<int32_t> spans(size_t(given.batch * config.kv_heads), int32_t(capacity));
  const SpanConfig span{config.heads, config.kv_heads, std::vector<int64_t>(size_t(config.kv_heads), capacity), config.sink, config.scale,
                        config.softcap};
  SpanCall call = given;
  if (!call.far) call.span = spans.data();
  const CallView view(span, call, kernels);
  LshCall op(config, call, view, tables, kernels, parallel, capacity, state, codes);
  if (call.tokens == 1) return op.decode();
  span_attention(span, call, kernels, parallel);
  for (int64_t b = 0; b < call.batch; ++b) op.update(b, op.target(call.length[b] + call.tokens));
  return op.good;
}

void lsh_guarded(int64_t* out, bool reset) {
  for (int i = 0; i < 2; ++i) out[i] = reset ? guarded[i].exchange(0) : guarded[i].load();
}

void lsh_profile(int64_t* out, bool reset) {
  for (int i = 0; i < 4; ++i) out[i] = reset ? lsh_spent[i].exchange(0) : lsh_spent[i].load();
}

}  // namespace attnspan
