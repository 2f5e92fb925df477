// LshAttention towards ONNX Runtime.
#pragma once

#include <memory>

#include "codes.h"
#include "lsh.h"
#include "ort_op.h"

namespace {

class LshKernel : NodeKernel {
 public:
  LshKernel(const OrtKernelInfo* raw, DType activation, DType cache) : NodeKernel("LshAttention", activation, cache) {
    Ort::ConstKernelInfo info(raw);
    config_.heads = info.GetAttribute<int64_t>("num_heads");
    config_.kv_heads = info.GetAttribute<int64_t>("kv_num_heads");
    config_.sink = attribute_or(info, "sink", int64_t(64));
    config_.window = attribute_or(info, "window", int64_t(64));
    config_.scale = attribute_or(info, "scale", 0.f);
    config_.softcap = attribute_or(info, "softcap", 0.f);
    config_.dense_below = attribute_or(info, "dense_below", int64_t(-1));
    config_.min_inclusion = attribute_or(info, "min_inclusion", 0.f);
    config_.guard = attribute_or(info, "guard", 0.f);
    config_.index.layer = attribute_or(info, "layer", int64_t(0));
    config_.index.identity = attribute_or(info, "identity", int64_t(0));
    const auto kind = info.GetAttribute<std::string>("index");
    if (kind == "tables") {
      config_.index.kind = attnspan::IndexKind::tables;
      config_.index.bits = info.GetAttribute<int64_t>("bits");
      config_.index.tables = info.GetAttribute<int64_t>("tables");
      config_.index.min_collisions = attribute_or(info, "min_collisions", int64_t(2));
    } else if (kind == "signature") {
      config_.index.kind = attnspan::IndexKind::signature;
      config_.index.signature_bits = info.GetAttribute<int64_t>("signature_bits");
      config_.max_hamming = info.GetAttributes<int64_t>("max_hamming");
    } else if (kind == "sketch") {
      config_.index.kind = attnspan::IndexKind::sketch;
      config_.fraction = attribute_or(info, "fraction", 0.02f);
    } else if (kind != "exact") {
      fail("index is '" + kind + "'; allowed are sketch, signature, tables and exact");
    }
    const std::string wrong = config_.check();
    if (!wrong.empty()) fail(wrong);
    if (kind == "exact") {
      tables_ = std::make_unique<attnspan::LshTables>(config_, nullptr, 0);
      return;
    }
    int constant = 0;
    const Ort::ConstValue projection = info.GetTensorConstantInput(6, &constant);
    if (!constant || !projection) fail("projection must be a constant of the graph");
    const std::vector<int64_t> shape = shape_of(projection);
    if (shape.size() != 2 || shape[0] < 1 || shape[1] != config_.index.columns())
      fail("projection has shape " + text(shape) + "; it must be [head_dim, " + std::to_string(config_.index.columns()) + "]");
    dim_ = shape[0];
    const float* data = projection.GetTensorData<float>();
    if (kind == "sketch") {
      for (int64_t i = 0; i < shape[0] * shape[1]; ++i)
        if (data[i] != 1.f && data[i] != -1.f) fail("projection holds " + std::to_string(data[i]) + "; of index sketch it is signs, 1 and -1");
      config_.index.planes = attnspan::sketch_planes(dim_);
    }
    config_.index.projection = attnspan::fingerprint(data, shape[0] * shape[1]);
    tables_ = std::make_unique<attnspan::LshTables>(config_, data, dim_);
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&] { compute(raw); });
  }

 private:
  void compute(OrtKernelContext* raw) const {
    Ort::KernelContext context(raw);
    attnspan::SpanCall call{};
    const std::vector<int64_t> q = read_chunk(context, config_.heads, config_.kv_heads, call);
    if (dim_ && call.head_dim != dim_)
      fail("head_dim is " + std::to_string(call.head_dim) + "; the projection was made for " + std::to_string(dim_));
    const auto past_kv = context.GetInput(3), past_state = context.GetInput(4), length = context.GetInput(5);
    const size_t inputs = context.GetInputCount();
    const auto span = inputs > 9 ? context.GetInput(9) : Ort::ConstValue{}, codes = inputs > 10 ? context.GetInput(10) : Ort::ConstValue{};
    const std::vector<int64_t> given = shape_of(past_kv);
    if (given.size() != 3 || given[1] % config_.kv_heads != 0 || given[1] / config_.kv_heads <= config_.sink || given[1] > INT32_MAX)
      fail("past_kv has shape " + text(given) + "; it must be [batch, slots, 2 * head_dim] with as many slots for each of " +
           std::to_string(config_.kv_heads) + " KV heads, more than sink (" + std::to_string(config_.sink) + ")");
    const int64_t capacity = given[1] / config_.kv_heads;
    expect("past_kv", past_kv, {call.batch, given[1], 2 * call.head_dim});
    expect("past_state", past_state, {call.batch, attnspan::state_bytes(config_, call.head_dim, capacity)});
    expect("length", length, {call.batch});
    read_scales(context, 7, config_.kv_heads, call);
    call.length = length.GetTensorData<int32_t>();
    if (span) {
      expect("span", span, {call.batch, config_.kv_heads});
      call.far = true, call.span = span.GetTensorData<int32_t>();
      for (int64_t i = 0; i < call.batch * config_.kv_heads; ++i)
        if (call.span[i] <= config_.sink && call.span[i] != 0)
          fail("span of row " + std::to_string(i / config_.kv_heads) + ", KV head " + std::to_string(i % config_.kv_heads) + " is " +
               std::to_string(call.span[i]) + "; it must be above sink (" + std::to_string(config_.sink) + "), or 0 for none");
    }
    if (codes) {
      if (config_.index.kind != attnspan::IndexKind::signature && (config_.index.kind != attnspan::IndexKind::tables || config_.index.tables % 2))
        fail("query_codes is given; it belongs to index signature, and to tables of an even number");
      expect("query_codes", codes, {call.batch, 1, config_.heads, attnspan::code_words(config_.index)});
    }
    call.output = context.GetOutput(0, q).GetTensorMutableRawData();
    call.past_key = present(context, 1, past_kv, attnspan::size_of(cache_));
    void* state = present(context, 2, past_state, 1);
    bind_lse(context, 3, config_.heads, call);
    const std::string wrong = open_states(config_, call, capacity, state);
    if (!wrong.empty()) fail(wrong);
    Pool pool{context};
    if (!attnspan::lsh_attention(config_, call, capacity, state, *tables_, *kernels_, {Pool::run, &pool},
                                 codes ? codes.GetTensorData<int32_t>() : nullptr))
      fail("past_state is damaged: its tables are out of order; give the state of this layer, or zeros");
  }

  attnspan::LshConfig config_;
  std::unique_ptr<attnspan::LshTables> tables_;
  int64_t dim_ = 0;
};

struct LshOp : CacheOp<LshOp, LshKernel, 2> {
  using CacheOp::CacheOp;

  const char* GetName() const { return "LshAttention"; }
  size_t GetInputTypeCount() const { return 11; }
  ONNXTensorElementDataType GetInputType(size_t i) const {
    if (i < 3) return onnx_type(activation);
    if (i == 3) return onnx_type(cache);
    if (i == 4) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    return i == 5 || i > 8 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const { return i < 6 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL; }
  size_t GetOutputTypeCount() const { return 4; }
  ONNXTensorElementDataType GetOutputType(size_t i) const {
    if (i == 0) return onnx_type(activation);
    return i == 1 ? onnx_type(cache) : i == 2 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t i) const { return i < 3 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL; }
};

}  // namespace
