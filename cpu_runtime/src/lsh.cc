#include "lsh.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "lsh_call.h"
#include "merge.h"

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

  // Positions, but of near tasks: tokens of what is kept.
  enum Kind { kFar, kDrawn, kNear };
  struct Task {
    int64_t pair, begin, end;
    Kind kind;
  };
  std::vector<Task> task;
  std::vector<int64_t> first_task;  // [2 * pairs + 1] of each pair: of its far part, of its near part
  std::vector<Kept> near;
  int64_t all_kept = 0;
  for (int64_t i = 0; i < pairs(); ++i) {
    near.emplace_back(call.span[i] > 0 ? 0 : near_span(i), config.sink, call.length[i / config.kv_heads]);
    all_kept += near[i].tokens();
  }
  const bool tabled = config.index.kind == IndexKind::tables;
  const int64_t dense_below = config.dense_below < 0 ? kDenseBelow[tabled] : config.dense_below;
  bool any = false;
  const int64_t near_chunk = kept_chunk(all_kept);
  int64_t scanned = 0;
  for (const Index& row : index) scanned += row.indexed() * config.kv_heads;
  const int64_t scan = tabled ? kSegment : std::clamp(scanned / kManyScans / kShortScan * kShortScan, kShortScan, kLongScan);
  for (int64_t i = 0; i < pairs(); ++i) {
    const int64_t b = i / config.kv_heads, tokens = call.length[b] + 1, last = far_end(i);
    const int64_t drawn = std::min(last, index[b].indexed());
    const bool sampled = config.index.kind != IndexKind::exact && tokens >= dense_below && drawn > config.sink;
    const auto split = [&](int64_t from, int64_t to, int64_t step, Kind kind) {
      for (int64_t at = from; at < to; at = (at / step + 1) * step) task.push_back({i, at, std::min(to, (at / step + 1) * step), kind});
    };
    first_task.push_back(int64_t(task.size()));
    any |= sampled;
    if (sampled) {
      split(drawn, last, kExactTokens, kFar);
      split(config.sink, drawn, scan, kDrawn);
    } else {
      split(config.sink, last, kExactTokens, kFar);
    }
    first_task.push_back(int64_t(task.size()));
    split(0, near[i].tokens(), near_chunk, kNear);
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
  for (int64_t i = 0; i < pairs(); ++i) left[i].store(first_task[2 * i + 2] - first_task[2 * i], std::memory_order_relaxed);

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
    const float* query = hashed.query + t.pair * group * dim;
    if (t.kind == kNear) {
      view.attend(b, h, near[t.pair], t.begin, t.end, near_ring(), false, query, state);
    } else {
      kernels.decode(call.cache, DecodeRun{query, group, dim, view.keys(b, h) + at, view.values(b, h) + at, view.stride, t.end - t.begin,
                                           config.softcap}, state);
    }
  };
  // Makes the far part of a pair exact where its guard says so.
  const auto check = [&](int64_t i, const SoftmaxState& far, const SoftmaxState* near_part) {
    const int64_t begin = first_task[2 * i], end = first_task[2 * i + 1];
    if (!std::any_of(task.begin() + begin, task.begin() + end, [](const Task& t) { return t.kind == kDrawn; })) return;
    bool doubtful = false;
    for (int64_t g = 0; g < group; ++g) {
      const float rest = near_part ? near_part->sum[g] * std::exp(near_part->max[g] - far.max[g]) : 0.f;
      doubtful |= !(std::sqrt(far.spread[g]) <= config.guard * (far.sum[g] + rest));
    }
    ++guarded[0];
    if (!doubtful) return;
    ++guarded[1];
    clear(far);
    for (int64_t n = begin; n < end; ++n) exact(task[n], far);
  };
  // Each part of a pair is a softmax of its own, then both are one, in the arithmetic of two ops and MergeAttention.
  const auto finish = [&](int64_t i) {
    const int64_t b = i / config.kv_heads, h = i % config.kv_heads, *at = &first_task[2 * i];
    const SoftmaxState part[2] = {state_of(at[1]), state_of(at[0])};
    const int64_t count[2] = {at[2] - at[1], at[1] - at[0]};
    for (int p = 0; p < 2; ++p)
      if (count[p] > 0) kernels.merge(part[p], count[p], group, dim);
    if (all.spread && good) check(i, part[1], count[0] > 0 ? &part[0] : nullptr);
    float *both = reinterpret_cast<float*>(task_scratch.get(2 * dim * 4)), *scratch = both + dim;
    for (int64_t g = 0; g < group; ++g) {
      float* each[2];
      float lse[2];
      for (int p = 0; p < 2; ++p) {
        each[p] = part[p].acc + g * dim;
        lse[p] = count[p] > 0 ? view.normalise(h, each[p], part[p].max[g], part[p].sum[g]) : -INFINITY;
      }
      const void* const parts[2] = {each[0], each[1]};
      const float merged = merge_head(kernels, DType::f32, parts, lse, dim, both, scratch);
      view.write(b, 0, h, g, both, merged);
    }
  };
  parallel(int64_t(task.size()), [&](int64_t t) {
    const auto [i, begin, end, kind] = task[t];
    const SoftmaxState state = state_of(t);
    clear(state);
    if (kind == kDrawn) {
      sample(hashed, i, begin, end, state);
    } else {
      exact(task[t], state);
    }
    if (left[i].fetch_sub(1, std::memory_order_acq_rel) == 1) finish(i);
  });
  return good;
}

bool lsh_attention(const LshConfig& config, const SpanCall& given, int64_t capacity, void* state, const LshTables& tables,
                   const Kernels& kernels, const Parallel& parallel, const int32_t* codes) {
  if (given.batch == 0 || given.tokens == 0) return true;
  const std::vector<int32_t> none(size_t(given.batch * config.kv_heads), 0);
  const SpanConfig span{config.heads, config.kv_heads, std::vector<int64_t>(size_t(config.kv_heads), capacity), config.sink, config.scale,
                        config.softcap};
  SpanCall call = given;
  if (!call.far) call.far = true, call.span = none.data();  // no other op attends to anything
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
