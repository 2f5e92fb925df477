// Keys enter the index: hashed as they leave the window, sorted into buckets in small steps.
#include <algorithm>

#include "lsh_call.h"

namespace attnspan {
namespace {

constexpr int64_t kHashTokens = 256;  // keys of one hashing task
constexpr int64_t kBulkMerge = 1024;  // codes that a prefill leaves unsorted in a table, at least
constexpr int64_t kStepMerge = 1024;  // codes above which decode steps sort a table

}  // namespace

// Brings row b's index to the positions below `to`, whose keys are in the cache.
void LshCall::update(int64_t b, int64_t to) {
  Index& row = index[b];
  const int64_t from = row.indexed();
  if (config.index.kind == IndexKind::exact || to <= from) return;
  if (row.header().means == 0 && to - config.sink < kFirstKeys) return;
  const Timed timed(kUpdate);
  add_keys(b, from, to);
  row.header().sum_keys += uint32_t(to - from);
  row.begin_mean(to);
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
    for (int64_t i = 0; i < count; ++i) {
      kernels.load(call.cache, view.keys(b, h) + (begin + i) * view.slot_bytes, view.key_scale(h), x + i * dim, dim);
      for (int64_t d = 0; d < dim; ++d) x[i * dim + d] -= mean[h * dim + d];
    }
    tables.hash(kernels, x, count, bits, scratch);
    row.put(h, begin, count, bits);
  });
  row.header().indexed = uint32_t(to);
  if (config.index.kind == IndexKind::tables) merge_due(b, to - from > 1);
}

// Adds the keys to the sums that means are taken of.
void LshCall::add_keys(int64_t b, int64_t from, int64_t to) {
  const int64_t dim = call.head_dim;
  parallel(config.kv_heads, [&](int64_t h) {
    constexpr int64_t rows = 64;  // added in fp32, before their sum is in fp64
    float* x = reinterpret_cast<float*>(task_scratch.get(2 * dim * 4));
    float* part = x + dim;
    double* sum = index[b].sum(h);
    for (int64_t at = from; at < to; at += rows) {
      const int64_t count = std::min(rows, to - at);
      std::fill_n(part, dim, 0.f);
      for (int64_t i = 0; i < count; ++i) {
        kernels.load(call.cache, view.keys(b, h) + (at + i) * view.slot_bytes, view.key_scale(h), x, dim);
        for (int64_t d = 0; d < dim; ++d) part[d] += x[d];
      }
      for (int64_t d = 0; d < dim; ++d) sum[d] += double(part[d]);
    }
  });
}

// Sorts codes into buckets: a prefill sorts all tables of a segment when enough has come together; a decode step sorts a few tables,
// so many that none falls behind.
void LshCall::merge_due(int64_t b, bool bulk) {
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
    if (!row.merge(due[i].h, due[i].s, due[i].l, coded(due[i].s), task_scratch.get(row.merge_scratch()))) good = false;
  });
}

}  // namespace attnspan
