// MergeAttention towards ONNX Runtime.
#pragma once

#include "merge.h"
#include "ort_op.h"

namespace {

class MergeKernel : NodeKernel {
 public:
  MergeKernel(const OrtKernelInfo* raw, DType activation) : NodeKernel("MergeAttention", activation, activation) {
    heads_ = Ort::ConstKernelInfo(raw).GetAttribute<int64_t>("num_heads");
    if (heads_ < 1) fail("num_heads is " + std::to_string(heads_) + "; it must be positive");
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&] { compute(raw); });
  }

 private:
  void compute(OrtKernelContext* raw) const {
    Ort::KernelContext context(raw);
    const auto output_a = context.GetInput(0), lse_a = context.GetInput(1), output_b = context.GetInput(2), lse_b = context.GetInput(3);
    const std::vector<int64_t> shape = shape_of(output_a);
    if (shape.size() != 3 || shape[2] <= 0 || shape[2] % heads_ != 0)
      fail("output_a has shape " + text(shape) + "; it must be [batch, tokens, num_heads * head_dim] with num_heads " + std::to_string(heads_));
    const std::vector<int64_t> lse{shape[0], heads_, shape[1]};
    expect("lse_a", lse_a, lse);
    expect("output_b", output_b, shape);
    expect("lse_b", lse_b, lse);
    attnspan::MergeCall call{shape[0], shape[1], heads_, shape[2] / heads_, activation_,
                             {output_a.GetTensorRawData(), output_b.GetTensorRawData()},
                             {lse_a.GetTensorData<float>(), lse_b.GetTensorData<float>()},
                             context.GetOutput(0, shape).GetTensorMutableRawData(), nullptr};
    if (context.GetOutputCount() > 1)
      if (auto merged = context.GetOutput(1, lse)) call.lse = merged.GetTensorMutableData<float>();
    Pool pool{context};
    merge_attention(call, *kernels_, {Pool::run, &pool});
  }

  int64_t heads_;
};

struct MergeOp : ActivationOp<MergeOp, MergeKernel> {
  explicit MergeOp(DType activation) : ActivationOp(activation) {
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
      return guarded([&] { same_shape(context, 0, 0); });
    };
  }

  const char* GetName() const { return "MergeAttention"; }
  size_t GetInputTypeCount() const { return 4; }
  ONNXTensorElementDataType GetInputType(size_t i) const { return i % 2 == 0 ? onnx_type(activation) : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  size_t GetOutputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetOutputType(size_t i) const { return i == 0 ? onnx_type(activation) : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t i) const { return i == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL; }
};

}  // namespace
