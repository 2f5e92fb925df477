// SpanAttention towards ONNX Runtime.
#pragma once

#include "ort_op.h"

namespace {

class SpanKernel : NodeKernel {
 public:
  SpanKernel(const OrtKernelInfo* raw, DType activation, DType cache) : NodeKernel("SpanAttention", activation, cache) {
    Ort::ConstKernelInfo info(raw);
    config_.heads = info.GetAttribute<int64_t>("num_heads");
    config_.kv_heads = info.GetAttribute<int64_t>("kv_num_heads");
    config_.capacity = info.GetAttributes<int64_t>("capacity");
    config_.sink = attribute_or(info, "sink", int64_t(64));
    config_.scale = attribute_or(info, "scale", 0.f);
    config_.softcap = attribute_or(info, "softcap", 0.f);
    const std::string wrong = config_.check();
    if (!wrong.empty()) fail(wrong);
    slots_ = config_.offset().back();
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&] { compute(raw); });
  }

 private:
  void compute(OrtKernelContext* raw) const {
    Ort::KernelContext context(raw);
    attnspan::SpanCall call{};
    const std::vector<int64_t> q = read_chunk(context, config_.heads, config_.kv_heads, call);
    const auto past_key = context.GetInput(kPastKey), past_value = context.GetInput(kPastValue), length = context.GetInput(5),
               span = context.GetInput(6);
    std::vector<int64_t> ring{call.batch, slots_, call.head_dim};
    // onnxruntime-genai binds caches of four axes only: [batch, slots, 1, head_dim], the same memory.
    if (past_key && shape_of(past_key).size() == 4) ring.insert(ring.begin() + 2, 1);
    expect("past_key", past_key, ring);
    expect("past_value", past_value, ring);
    expect("length", length, {call.batch});
    expect("span", span, {call.batch, config_.kv_heads});
    read_scales(context, 7, config_.kv_heads, call);
    call.length = length.GetTensorData<int32_t>(), call.span = span.GetTensorData<int32_t>();
    const std::string wrong = check_call(config_, call);
    if (!wrong.empty()) fail(wrong);
    call.output = context.GetOutput(0, q).GetTensorMutableRawData();
    call.past_key = present(context, 1, past_key, attnspan::size_of(cache_));
    call.past_value = present(context, 2, past_value, attnspan::size_of(cache_));
    bind_lse(context, 3, config_.heads, call);
    Pool pool{context};
    attnspan::span_attention(config_, call, *kernels_, {Pool::run, &pool});
  }

  attnspan::SpanConfig config_;
  int64_t slots_ = 0;
};

struct SpanOp : CacheOp<SpanOp, SpanKernel, 2> {
  using CacheOp::CacheOp;

  const char* GetName() const { return "SpanAttention"; }
  size_t GetInputTypeCount() const { return 9; }
  ONNXTensorElementDataType GetInputType(size_t i) const {
    if (i < 3) return onnx_type(activation);
    if (i < 5) return onnx_type(cache);
    return i < 7 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const { return i < 7 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL; }
  size_t GetOutputTypeCount() const { return 4; }
  ONNXTensorElementDataType GetOutputType(size_t i) const {
    return i == 0 ? onnx_type(activation) : i < 3 ? onnx_type(cache) : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t i) const { return i < 3 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL; }
};

}  // namespace
