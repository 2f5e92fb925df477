// LshHash towards ONNX Runtime.
#pragma once

#include <memory>

#include "codes.h"
#include "ort_op.h"

namespace {

class HashKernel : NodeKernel {
 public:
  HashKernel(const OrtKernelInfo* raw, DType activation) : NodeKernel("LshHash", activation, activation) {
    Ort::ConstKernelInfo info(raw);
    config_.heads = config_.kv_heads = info.GetAttribute<int64_t>("num_heads");
    auto& index = config_.index;
    index.signature_bits = attribute_or(info, "signature_bits", int64_t(0));
    index.bits = attribute_or(info, "bits", int64_t(0)), index.tables = attribute_or(info, "tables", int64_t(0));
    index.min_collisions = 1;
    index.kind = index.signature_bits != 0 ? attnspan::IndexKind::signature : attnspan::IndexKind::tables;
    if (index.signature_bits != 0 && (index.bits != 0 || index.tables != 0))
      fail("signature_bits is " + std::to_string(index.signature_bits) + "; bits and tables must be 0 then");
    if (index.signature_bits == 0 && index.tables % 2 != 0) fail("tables is " + std::to_string(index.tables) + "; it must be even");
    config_.max_hamming.assign(size_t(std::max<int64_t>(config_.heads, 0)), 0);
    config_.window = 1;
    const std::string wrong = config_.check();
    if (!wrong.empty()) fail(wrong);
    int constant = 0;
    const Ort::ConstValue projection = info.GetTensorConstantInput(1, &constant);
    if (!constant || !projection) fail("projection must be a constant of the graph");
    const std::vector<int64_t> shape = shape_of(projection);
    if (shape.size() != 2 || shape[0] < 1 || shape[1] != index.columns())
      fail("projection has shape " + text(shape) + "; it must be [head_dim, " + std::to_string(index.columns()) + "]");
    tables_ = std::make_unique<attnspan::LshTables>(config_, projection.GetTensorData<float>(), shape[0]);
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&] { compute(raw); });
  }

 private:
  void compute(OrtKernelContext* raw) const {
    Ort::KernelContext context(raw);
    const auto x = context.GetInput(0), mean = context.GetInputCount() > 2 ? context.GetInput(2) : Ort::ConstValue{};
    const std::vector<int64_t> shape = shape_of(x);
    if (shape.size() != 3 || shape[2] != config_.heads * tables_->dim)
      fail("x has shape " + text(shape) + "; it must be [batch, tokens, " + std::to_string(config_.heads * tables_->dim) +
           "], num_heads times the rows of projection");
    if (mean) expect("mean", mean, {shape[0], config_.heads, tables_->dim});
    const std::vector<int64_t> codes{shape[0], shape[1], config_.heads, attnspan::code_words(config_.index)};
    Pool pool{context};
    hash_codes({shape[0], shape[1], config_.heads, activation_, x.GetTensorRawData(), mean ? mean.GetTensorData<float>() : nullptr,
                context.GetOutput(0, codes).GetTensorMutableRawData()},
               config_.index, *tables_, *kernels_, {Pool::run, &pool});
  }

  attnspan::LshConfig config_;
  std::unique_ptr<attnspan::LshTables> tables_;
};

struct HashOp : ActivationOp<HashOp, HashKernel> {
  using ActivationOp::ActivationOp;

  const char* GetName() const { return "LshHash"; }
  size_t GetInputTypeCount() const { return 3; }
  ONNXTensorElementDataType GetInputType(size_t i) const { return i == 0 ? onnx_type(activation) : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const { return i < 2 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32; }
};

}  // namespace
