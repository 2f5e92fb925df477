// What the ops share: scratch memory of threads, and the geometry of a call.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "span.h"

namespace attnspan {

// Grows, never shrinks, belongs to one thread: pool threads live as long as the session.
class Scratch {
 public:
  char* get(int64_t bytes) {
    if (bytes > size_) {
      data_.reset(static_cast<char*>(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64)));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

inline thread_local Scratch call_scratch, task_scratch;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Hands out pieces of one allocation, each aligned to a cache line.
class Carver {
 public:
  explicit Carver(char* base) : next_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += round_up(count * int64_t(sizeof(T)), 64);
    return p;
  }

 private:
  char* next_;
};

// What a step attends to under a span, its newest token being at `position`: the first `sinks` tokens and the `window` most recent ones.
struct Kept {
  int64_t sinks, window, position;

  Kept(int64_t span, int64_t sink, int64_t newest)
      : sinks(span == 0 ? 0 : std::min(sink, newest + 1)), window(span == 0 ? 0 : std::min(span - sink, newest + 1 - sinks)), position(newest) {}
  int64_t tokens() const { return sinks + window; }
};

// Tokens of one task of a step whose pairs keep so many in all.
int64_t kept_chunk(int64_t all_kept);

// Where things lie in a call, and how an element gets in and out.
struct CallView {
  const SpanConfig& config;
  const SpanCall& call;
  const Kernels& kernels;
  std::vector<int64_t> offset;
  int64_t group, dim, row_bytes, slots;
  int64_t stride, slot_bytes;  // from one slot to the next, in elements and bytes
  float scale;

  CallView(const SpanConfig& c, const SpanCall& a, const Kernels& k)
      : config(c), call(a), kernels(k), offset(c.offset()), group(c.heads / c.kv_heads), dim(a.head_dim),
        row_bytes(a.head_dim * size_of(a.cache)), slots(offset.back()),
        stride(a.past_value ? a.head_dim : 2 * a.head_dim), slot_bytes(stride * size_of(a.cache)),
        scale(c.scale != 0.f ? c.scale : 1.f / std::sqrt(float(a.head_dim))) {}

  float key_scale(int64_t h) const { return call.key_scale ? call.key_scale[h] : 1.f; }
  float value_scale(int64_t h) const { return call.value_scale ? call.value_scale[h] : 1.f; }

  // The first slot of a head, its key and its value.
  char* keys(int64_t b, int64_t h) const { return static_cast<char*>(call.past_key) + (b * slots + offset[h]) * slot_bytes; }
  char* values(int64_t b, int64_t h) const {
    return call.past_value ? static_cast<char*>(call.past_value) + (b * slots + offset[h]) * slot_bytes : keys(b, h) + row_bytes;
  }
  // Element of an activation [batch, tokens, n * head_dim].
  template <class V>
  V* element(V* base, int64_t b, int64_t t, int64_t n, int64_t h) const {
    using Byte = std::conditional_t<std::is_const_v<V>, const char, char>;
    return static_cast<Byte*>(base) + ((b * call.tokens + t) * n + h) * dim * size_of(call.activation);
  }
  // Rounds one key and value of the call to their stored form.
  void store_token(int64_t b, int64_t t, int64_t h, void* key, void* value, float* wide) const {
    kernels.load(call.activation, element(call.key, b, t, config.kv_heads, h), 1.f, wide, dim);
    kernels.store(call.cache, wide, key_scale(h), key, dim);
    kernels.load(call.activation, element(call.value, b, t, config.kv_heads, h), 1.f, wide, dim);
    kernels.store(call.cache, wide, value_scale(h), value, dim);
  }
  float score_scale(int64_t h) const { return scale * key_scale(h); }
  void load_query(int64_t b, int64_t t, int64_t h, float factor, float* to) const {  // all query heads of KV head h
    kernels.load(call.activation, element(call.query, b, t, config.heads, h * group), factor, to, group * dim);
  }
  // Attends to the tokens [begin, end) of what is kept, in order of position. Runs end where a ring of `capacity` slots starts over:
  // sums are the same to the bit whether the cache is such a ring or has every token.
  void attend(int64_t b, int64_t h, const Kept& kept, int64_t begin, int64_t end, int64_t capacity, bool ring, const float* query,
              const SoftmaxState& state) const;
  // Divides by the sum, applies the value scale; the log-sum-exp. Without keys: zeros, -inf.
  float normalise(int64_t h, float* acc, float max, float sum) const {
    const float factor = sum == 0.f ? 0.f : value_scale(h) / sum;
    for (int64_t d = 0; d < dim; ++d) acc[d] *= factor;
    return sum == 0.f ? -INFINITY : max + std::log(sum);
  }
  // Writes the output and the log-sum-exp of one query head.
  void write(int64_t b, int64_t t, int64_t h, int64_t g, const float* output, float lse) const {
    const int64_t head = h * group + g;
    kernels.store(call.activation, output, 1.f, element(call.output, b, t, config.heads, head), dim);
    if (call.lse) call.lse[(b * config.heads + head) * call.tokens + t] = lse;
  }
  void finish(int64_t b, int64_t t, int64_t h, int64_t g, float* acc, float max, float sum) const {
    const float lse = normalise(h, acc, max, sum);
    write(b, t, h, g, acc, lse);
  }
};

}  // namespace attnspan
