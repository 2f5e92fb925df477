// SpanAttention on the CPU: each KV head keeps the first `sink` tokens and a window of recent ones in a ring of its own size.
// This is the whole op without ONNX Runtime: plain pointers in, plain pointers out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace attnspan {

struct SpanConfig {
  int64_t heads = 0;
  int64_t kv_heads = 0;
  std::vector<int64_t> capacity;  // slots of each KV head's ring, sinks included
  int64_t sink = 0;
  float scale = 0.f;    // 0 = 1 / sqrt(head_dim)
  float softcap = 0.f;  // 0 = none

  std::vector<int64_t> offset() const;  // first slot of each KV head, and the total behind them
  std::string check() const;            // what is wrong with the configuration; empty if nothing
};

// Slot of the token at `position` within its head's ring.
inline int64_t slot_of(int64_t position, int64_t sink, int64_t capacity) {
  return position < sink ? position : sink + (position - sink) % (capacity - sink);
}

// One call. Shapes: query and output [batch, tokens, heads * head_dim]; key and value [batch, tokens, kv_heads * head_dim];
// caches [batch, slots, head_dim], updated in place (past_value null: past_key is [batch, slots, 2 * head_dim], each value behind
// its key); length [batch]; span [batch, kv_heads]; lse [batch, heads, tokens] or null;
// key_scale and value_scale [kv_heads], null unless the cache is int8.
struct SpanCall {
  int64_t batch, tokens, head_dim;
  DType activation, cache;
  const void *query, *key, *value;
  void *past_key, *past_value;
  const int32_t *length, *span;
  const float *key_scale, *value_scale;
  void* output;
  float* lse;
  // span counts tokens that are attended to, sinks included; 0: none. far: of all that came before, which past_key then has, attend
  // to what such a span leaves out; 0: to everything.
  bool far;
};

// Runs body(context, i) for i in [0, count) on any threads it likes and returns when all are done.
struct Parallel {
  void (*run)(void* pool, int64_t count, void (*body)(void* context, int64_t i), void* context);
  void* pool;

  template <class F>
  void operator()(int64_t count, F&& f) const {
    run(pool, count, [](void* context, int64_t i) { (*static_cast<F*>(context))(i); }, &f);
  }
};

// Says what is wrong with the lengths and spans of a call; empty if nothing. The caller has checked the shapes.
std::string check_call(const SpanConfig& config, const SpanCall& call);

// Computes the call. A chunk attends to the ring as it was before the chunk and to itself; then it is written to the ring.
// Every key is attended to in its stored form, so that results do not depend on how a prompt is cut into chunks. A far call has
// several tokens.
void span_attention(const SpanConfig& config, const SpanCall& call, const Kernels& kernels, const Parallel& parallel);

}  // namespace attnspan
