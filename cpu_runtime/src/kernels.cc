// Compiled once per instruction set, with ATTNSPAN_ISA naming the table and the compiler's flags choosing the code.
#include "kernels.h"

#include "decode.h"
#include "gather.h"
#include "hash.h"
#include "prefill.h"
#include "prefill_bf16.h"
#include "retrieve.h"
#include "simd.h"
#include "sketch.h"

namespace {

using attnspan::DType;

template <class C>
void load_as(const void* from, float scale, float* to, int64_t count) {
  const C* p = static_cast<const C*>(from);
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load(p + i) * scale);
  for (; i < count; ++i) to[i] = to_float(p[i]) * scale;
}

template <class C>
void store_as(const float* from, float scale, void* to, int64_t count) {
  C* p = static_cast<C*>(to);
  for (int64_t i = 0; i < count; ++i) from_float(scale == 1.f ? from[i] : from[i] / scale, p[i]);
}

#define ATTNSPAN_FOR_TYPE(type, call)           \
  switch (type) {                               \
    case DType::f32: return call(float);        \
    case DType::f16: return call(f16);          \
    case DType::bf16: return call(bf16);        \
    case DType::i8: return call(int8_t);        \
  }

void load_any(DType type, const void* from, float scale, float* to, int64_t count) {
#define ATTNSPAN_CALL(C) load_as<C>(from, scale, to, count)
  ATTNSPAN_FOR_TYPE(type, ATTNSPAN_CALL)
#undef ATTNSPAN_CALL
}

void store_any(DType type, const float* from, float scale, void* to, int64_t count) {
#define ATTNSPAN_CALL(C) store_as<C>(from, scale, to, count)
  ATTNSPAN_FOR_TYPE(type, ATTNSPAN_CALL)
#undef ATTNSPAN_CALL
}

void decode_any(DType type, const attnspan::DecodeRun& run, const attnspan::SoftmaxState& state) {
#define ATTNSPAN_CALL(C) decode_run<C>(run, state)
  ATTNSPAN_FOR_TYPE(type, ATTNSPAN_CALL)
#undef ATTNSPAN_CALL
}

void gather_any(DType type, const attnspan::GatherTask& task, const attnspan::SoftmaxState& state) {
#define ATTNSPAN_CALL(C) gather_run<C>(task, state)
  ATTNSPAN_FOR_TYPE(type, ATTNSPAN_CALL)
#undef ATTNSPAN_CALL
}

void prefill_begin_any(DType type, const attnspan::PrefillTask& task, const attnspan::PrefillScratch& scratch) {
  prefill_begin(task, scratch);
#if defined(ATTNSPAN_BF16_MULTIPLY)
  if (suits_bf16(type, task.head_dim)) pack_query_bf16(task, scratch);
#endif
  (void)type;
}

void prefill_tile_any(DType type, const attnspan::PrefillTask& task, const attnspan::KeyTile& tile,
                      const attnspan::PrefillScratch& scratch) {
#if defined(ATTNSPAN_BF16_MULTIPLY)
  if (suits_bf16(type, task.head_dim))
    return type == DType::bf16 ? prefill_tile_bf16<bf16>(task, tile, scratch) : prefill_tile_bf16<int8_t>(task, tile, scratch);
#endif
#define ATTNSPAN_CALL(C) prefill_tile<C>(task, tile, scratch)
  ATTNSPAN_FOR_TYPE(type, ATTNSPAN_CALL)
#undef ATTNSPAN_CALL
}

void merge_states(const attnspan::SoftmaxState& s, int64_t count, int64_t rows, int64_t dim) {
  for (int64_t part = 1; part < count; ++part)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t other = part * rows + r;
      const float top = s.max[r] > s.max[other] ? s.max[r] : s.max[other];
      float pair[W] = {s.max[r] - top, s.max[other] - top};
      store(pair, exp(load(pair)));
      s.max[r] = top;
      s.sum[r] = s.sum[r] * pair[0] + s.sum[other] * pair[1];
      if (s.spread) s.spread[r] = s.spread[r] * pair[0] * pair[0] + s.spread[other] * pair[1] * pair[1];
      float *acc = s.acc + r * dim, *add = s.acc + other * dim;
      for (int64_t d = 0; d < dim; ++d) acc[d] = acc[d] * pair[0] + add[d] * pair[1];
    }
}

}  // namespace

#define ATTNSPAN_JOIN2(a, b) a##b
#define ATTNSPAN_JOIN(a, b) ATTNSPAN_JOIN2(a, b)
#define ATTNSPAN_TEXT2(a) #a
#define ATTNSPAN_TEXT(a) ATTNSPAN_TEXT2(a)

namespace attnspan {
extern const Kernels ATTNSPAN_JOIN(kernels_, ATTNSPAN_ISA);
const Kernels ATTNSPAN_JOIN(kernels_, ATTNSPAN_ISA) = {ATTNSPAN_TEXT(ATTNSPAN_ISA), load_any, store_any, decode_any, merge_states,
                                                       prefill_begin_any, prefill_tile_any, prefill_end,
                                                       hash_any, scan_any, walk_any, overlap_any, gather_any,
                                                       rotate_any, encode_any, score_any, draw_any};
}  // namespace attnspan
