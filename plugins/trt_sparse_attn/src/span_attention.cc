// SpanAttention: one token a row is span_decode, then merge_chunks, which writes the token; more are span_prefill, then
// ring_update.
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "operation.h"

namespace attnspan {
namespace {

// Three a multiprocessor on a GPU of 192. The workspace does not ask for the GPU: an engine may be built where there is none.
constexpr int64_t kMaxWorkers = 576;
constexpr size_t kAlignment = 256, kVector = 16, kWord = 4;
constexpr double kLog2e = 1.4426950408889634;
enum Input { kQuery, kKey, kValue, kPastKey, kPastValue, kLength, kSpan, kKeyScale, kValueScale };
enum Output { kOutput, kPresentKey, kPresentValue, kLse };

// Every parameter of the four kernels.
struct Arguments {
  const void *query, *key, *value, *length, *span, *capacity, *offset, *key_scale, *value_scale;
  void *key_cache, *value_cache, *part, *part_lse, *output, *lse;
  float scale, softcap;
  int32_t sink, tokens, pairs, kv_heads, group, slots, workers, write;
  const void *global_scratch, *profile_scratch;  // of Triton; no kernel reads them
};

#define ATTNSPAN_FIELD(type, name) Field{#name, type, offsetof(Arguments, name)}
const std::vector<Field>& fields() {
  static const std::vector<Field> all{
      ATTNSPAN_FIELD("*", query), ATTNSPAN_FIELD("*", key), ATTNSPAN_FIELD("*", value), ATTNSPAN_FIELD("*", length),
      ATTNSPAN_FIELD("*", span), ATTNSPAN_FIELD("*", capacity), ATTNSPAN_FIELD("*", offset), ATTNSPAN_FIELD("*", key_scale),
      ATTNSPAN_FIELD("*", value_scale), ATTNSPAN_FIELD("*", key_cache), ATTNSPAN_FIELD("*", value_cache),
      ATTNSPAN_FIELD("*", part), ATTNSPAN_FIELD("*", part_lse), ATTNSPAN_FIELD("*", output), ATTNSPAN_FIELD("*", lse),
      ATTNSPAN_FIELD("fp32", scale), ATTNSPAN_FIELD("fp32", softcap), ATTNSPAN_FIELD("i32", sink),
      ATTNSPAN_FIELD("i32", tokens), ATTNSPAN_FIELD("i32", pairs), ATTNSPAN_FIELD("i32", kv_heads),
      ATTNSPAN_FIELD("i32", group), ATTNSPAN_FIELD("i32", slots), ATTNSPAN_FIELD("i32", workers), ATTNSPAN_FIELD("i32", write),
      ATTNSPAN_FIELD("*", global_scratch), ATTNSPAN_FIELD("*", profile_scratch)};
  return all;
}
#undef ATTNSPAN_FIELD

// Hands out parts of a workspace.
class Carver {
 public:
  explicit Carver(void* from) : next_(static_cast<char*>(from)) {}

  void* take(int64_t words) {
    void* part = next_;
    next_ += (size_t(words) * kWord + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }

 private:
  char* next_;
};

// The integers of a node that kernels read from the device.
class DeviceInts {
 public:
  explicit DeviceInts(const std::vector<int32_t>& values) {
    check(cudaMalloc(&data_, values.size() * sizeof(int32_t)), "cudaMalloc");
    const cudaError_t copied = cudaMemcpy(data_, values.data(), values.size() * sizeof(int32_t), cudaMemcpyHostToDevice);
    // From pageable memory that returns before the integers have arrived, and streams of others do not wait for the default one.
    const cudaError_t arrived = copied == cudaSuccess ? cudaStreamSynchronize(nullptr) : copied;
    if (arrived != cudaSuccess) cudaFree(data_);
    check(copied, "cudaMemcpy");
    check(arrived, "cudaStreamSynchronize");
  }
  DeviceInts(const DeviceInts&) = delete;
  DeviceInts& operator=(const DeviceInts&) = delete;
  ~DeviceInts() { cudaFree(data_); }
  const int32_t* data() const { return static_cast<const int32_t*>(data_); }

 private:
  void* data_ = nullptr;
};

class SpanAttention final : public Operation {
 public:
  SpanAttention(const Attributes& attributes, bool building)
      : capacity_(attributes.at("capacity").ints),
        kv_heads_(attributes.at("kv_num_heads").ints[0]),
        group_(attributes.at("num_heads").ints[0] / kv_heads_),
        sink_(attributes.at("sink").ints[0]),
        scale_(attributes.at("scale").number),
        building_(building) {
    if (const float softcap = attributes.at("softcap").number; softcap != 0.f)
      throw Error("SpanAttention: attribute softcap is " + number(softcap) +
                  ": must be 0, since kernels are compiled ahead of time without it; the plugin in Python takes it");
    for (const int32_t each : capacity_) slots_ += each;
    narrow(slots_, "SpanAttention: the sum of capacity");
  }

  size_t workspace(int64_t batch, int64_t dim) const override {
    const int64_t pairs = batch * kv_heads_;
    // The last two: copies of up to four small inputs, each of a word a pair at most, and alignment.
    return size_t((kMaxWorkers + pairs) * group_ * (dim + 1)) * kWord + size_t(pairs) * 4 * kWord + 4096;
  }

  void prepare(const std::vector<std::string>& types, int64_t dim) override {
    const bool fp8 = types.size() > kKeyScale;
    const std::string suffix = suffix_of(types[kQuery], fp8, dim);
    const Device device = current_device();
    if (device.ordinal == device_ && suffix == suffix_) return;
    narrow(*std::max_element(capacity_.begin(), capacity_.end()) * dim, "SpanAttention: a head of the cache");
    device_ = -1;  // until all is loaded
    decode_ = Kernel("span_decode_" + suffix, device, fields());
    merge_ = Kernel("merge_chunks_" + suffix, device, fields());
    prefill_ = Kernel("span_prefill_" + suffix, device, fields());
    update_ = Kernel("ring_update_" + suffix, device, fields());
    head_block_ = decode_.constant("BLOCK_G");
    row_block_ = prefill_.constant("BLOCK_M");
    token_block_ = update_.constant("BLOCK_T");
    // One wave of the device, by the registers and shared memory of a block: workers_per_sm of kernels/span_decode.py.
    const int64_t each = !fp8 && device.shared_limit > (100 << 10) ? 3 : 2;
    workers_ = std::min(each * device.multiprocessors, kMaxWorkers);
    std::vector<int32_t> numbers(capacity_);  // and the first slot of each head
    numbers.resize(offset_at() + capacity_.size());
    for (size_t h = 1; h < capacity_.size(); ++h) numbers[offset_at() + h] = numbers[offset_at() + h - 1] + capacity_[h - 1];
    numbers_ = std::make_unique<DeviceInts>(numbers);
    fp8_ = fp8, dim_ = dim, suffix_ = suffix, device_ = device.ordinal;
  }

  void run(const void* const* inputs, void* const* outputs, int64_t batch, int64_t tokens, void* workspace,
           cudaStream_t stream) const override {
    const int64_t pairs = batch * kv_heads_, heads = int64_t{kv_heads_} * group_;
    narrow(heads * tokens * dim_, "SpanAttention: a row of query");
    copy_unless_same(inputs[kPastKey], outputs[kPresentKey], batch, stream);
    copy_unless_same(inputs[kPastValue], outputs[kPresentValue], batch, stream);
    if (batch == 0 || tokens == 0) return;
    check_pointers(schema::kSpanAttention, schema::kSpanAttentionInputs, inputs, kPastValue + 1);
    check_pointers(schema::kSpanAttention, schema::kSpanAttentionOutputs, outputs, kLse + 1);
    Arguments a{};
    Carver carve(workspace);
    const int64_t parts = (workers_ + pairs) * group_;
    a.part = carve.take(parts * dim_), a.part_lse = carve.take(parts);
    a.query = inputs[kQuery], a.key = inputs[kKey], a.value = inputs[kValue];
    // Kernels load these words as vectors; a slice of a larger tensor, such as one layer's spans, may begin anywhere.
    const auto words = [&](Input which, int64_t count) -> const void* {
      if (reinterpret_cast<uintptr_t>(inputs[which]) % kVector == 0) return inputs[which];
      void* copy = carve.take(count);
      check(cudaMemcpyAsync(copy, inputs[which], size_t(count) * kWord, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
      return copy;
    };
    if (building_) {
      void* zeros = carve.take(batch);
      check(cudaMemsetAsync(zeros, 0, size_t(batch) * kWord, stream), "cudaMemsetAsync");
      a.length = zeros;
    } else {
      a.length = words(kLength, batch);
    }
    a.span = words(kSpan, pairs);
    if (fp8_) a.key_scale = words(kKeyScale, kv_heads_), a.value_scale = words(kValueScale, kv_heads_);
    a.capacity = numbers_->data(), a.offset = numbers_->data() + offset_at();
    a.key_cache = outputs[kPresentKey], a.value_cache = outputs[kPresentValue];
    a.output = outputs[kOutput], a.lse = outputs[kLse];
    const double scale = scale_ != 0.f ? double{scale_} : 1 / std::sqrt(double(dim_));
    a.scale = static_cast<float>(scale * kLog2e);
    a.sink = sink_, a.tokens = narrow(tokens, "SpanAttention: tokens");
    a.pairs = narrow(pairs, "SpanAttention: batch * kv_num_heads");
    a.kv_heads = kv_heads_, a.group = group_, a.slots = static_cast<int32_t>(slots_);
    a.workers = static_cast<int32_t>(workers_), a.write = 1;
    if (tokens == 1) {
      decode_.launch(&a, workers_, ceil_div(group_, head_block_), stream);
      merge_.launch(&a, pairs * group_, 1, stream);
    } else {
      prefill_.launch(&a, pairs * ceil_div(tokens * group_, row_block_), 1, stream);
      update_.launch(&a, pairs * ceil_div(tokens, token_block_), 1, stream);
    }
  }

 private:
  // Where offsets begin behind the capacities: kernels load vectors.
  size_t offset_at() const { return (capacity_.size() + 3) / 4 * 4; }

  void copy_unless_same(const void* past, void* present, int64_t batch, cudaStream_t stream) const {
    if (past == present || batch == 0) return;
    const size_t bytes = size_t(batch * slots_ * dim_) * (fp8_ ? 1 : 2);
    check(cudaMemcpyAsync(present, past, bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
  }

  const std::vector<int32_t> capacity_;
  const int32_t kv_heads_, group_, sink_;
  const float scale_;
  const bool building_;
  int64_t slots_ = 0;

  // Set by `prepare`.
  Kernel decode_, merge_, prefill_, update_;
  int64_t head_block_ = 0, row_block_ = 0, token_block_ = 0, workers_ = 0, dim_ = 0;
  bool fp8_ = false;
  std::string suffix_;
  int device_ = -1;
  std::unique_ptr<DeviceInts> numbers_;
};

}  // namespace

std::unique_ptr<Operation> make_span_attention(const Attributes& attributes, bool building) {
  return std::make_unique<SpanAttention>(attributes, building);
}

}  // namespace attnspan
