#include "ort_ops.h"

#include <algorithm>
#include <mutex>

#include "operation.h"

#ifndef ATTNSPAN_ORT_PROVIDER  // tests run the ops on the CPU provider, with a CUDA runtime of their own
#define ATTNSPAN_ORT_PROVIDER "CUDAExecutionProvider"
#endif

namespace attnspan {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kMean = 2;  // input of LshHash

std::string name_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return "bfloat16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN: return "float8_e4m3fn";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return "int32";
    default: return "of ONNX type " + std::to_string(static_cast<int>(type));
  }
}

size_t bytes_of(const Shape& shape, const std::string& type) {
  int64_t bytes = type == "float8_e4m3fn" ? 1 : type == "float16" || type == "bfloat16" ? 2 : 4;
  for (const int64_t size : shape) bytes *= size;
  return size_t(bytes);
}

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// LshHash takes zeros where a node gives no mean: the kernels that are compiled ahead of time have one.
bool has_default_mean(const schema::Op& op) { return &op == &schema::kLshHash; }

// Where parts of the keys are attended to on the CPU, that is part b, and it stays on the host until the merge: nodes that copy it
// for the merge would be run before the attention of part a, which then began when the CPU is done.
bool on_host(const schema::Op& op, size_t input) { return &op == &schema::kMergeAttention && input >= 2; }

bool is_optional(const schema::Op& op, size_t input) {
  return op.inputs[input].optional || (has_default_mean(op) && input == kMean);
}

Attributes read_attributes(const schema::Op& op, const OrtKernelInfo* raw) {
  const Ort::ConstKernelInfo info(raw);
  std::vector<Given> given;
  for (int i = 0; i < op.num_attributes; ++i) {
    const schema::Attribute& attribute = op.attributes[i];
    Given one{attribute.name, {}, attribute.kind == schema::Kind::kFloat};
    try {
      switch (attribute.kind) {
        case schema::Kind::kInt: one.values = {static_cast<double>(info.GetAttribute<int64_t>(attribute.name))}; break;
        case schema::Kind::kFloat: one.values = {double{info.GetAttribute<float>(attribute.name)}}; break;
        case schema::Kind::kInts:
          for (const int64_t each : info.GetAttributes<int64_t>(attribute.name)) one.values.push_back(static_cast<double>(each));
      }
    } catch (const Ort::Exception&) {
      continue;  // the node has none of that name: attributes_of knows whether it needs one
    }
    given.push_back(std::move(one));
  }
  return attributes_of(op, given);
}

// Memory of the provider until the end of a call. The provider works through its stream in order, so that whoever gets the memory
// next runs after the kernels that were enqueued here.
class Scratch {
 public:
  Scratch(const Ort::KernelContext& context, const OrtMemoryInfo* where, size_t bytes) {
    if (bytes == 0) return;
    const OrtApi& api = Ort::GetApi();
    Ort::ThrowOnError(api.KernelContext_GetAllocator(context.GetOrtKernelContext(), where, &allocator_));
    try {
      Ort::ThrowOnError(api.KernelContext_GetScratchBuffer(context.GetOrtKernelContext(), where, bytes + kAlignment, &memory_));
    } catch (...) {
      api.ReleaseAllocator(allocator_);
      throw;
    }
    next_ = reinterpret_cast<char*>(aligned(reinterpret_cast<uintptr_t>(memory_)));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (memory_ != nullptr) allocator_->Free(allocator_, memory_);
    if (allocator_ != nullptr) Ort::GetApi().ReleaseAllocator(allocator_);
  }

  void* take(size_t bytes) {
    void* part = next_;
    next_ += aligned(bytes);
    return part;
  }

 private:
  OrtAllocator* allocator_ = nullptr;
  void* memory_ = nullptr;
  char* next_ = nullptr;
};

// A node on the GPU.
class CudaKernel {
 public:
  CudaKernel(const schema::Op& op, const OrtKernelInfo* info)
      : op_(op), attributes_(read_attributes(op, info)), operation_(make_operation(op, attributes_, false)) {}

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    try {
      compute(Ort::KernelContext(raw));
      return nullptr;
    } catch (const Ort::Exception& error) {
      return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
    } catch (const Error& error) {
      return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, (std::string("attnspan.") + error.what()).c_str());
    } catch (const std::exception& error) {
      return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
    }
  }

 private:
  struct Tensor {
    std::string type;
    Shape shape;
    const void* data = nullptr;
  };

  // Enqueues the node. Nothing here reads what lies on the device: lengths and spans are the kernels' to read.
  void compute(const Ort::KernelContext& context) {
    const OrtMemoryInfo* where = nullptr;
    std::vector<Tensor> inputs = read(context, where);
    const std::lock_guard<std::mutex> lock(mutex_);  // threads that run one session share the node
    prepare(inputs);
    std::vector<const void*> in;
    for (const Tensor& each : inputs) in.push_back(each.data);
    std::vector<void*> out;
    size_t bytes = aligned(operation_->workspace(sizes_.at("batch"), sizes_.at("dim")));
    const auto result_types = types_of(op_, types_);
    std::vector<size_t> missing(size_t(op_.num_outputs), 0);  // bytes of outputs that the node leaves out, and kernels write
    for (int i = 0; i < op_.num_outputs; ++i) {
      const int alias = op_.outputs[i].alias;
      const Shape shape = alias < 0 ? shape_of(op_.outputs[i]) : inputs[size_t(alias)].shape;
      void* data = nullptr;
      if (size_t(i) < context.GetOutputCount())
        if (auto output = context.GetOutput(size_t(i), shape)) data = output.GetTensorMutableRawData();
      if (data == nullptr) bytes += aligned(missing[size_t(i)] = bytes_of(shape, result_types[size_t(i)]));
      out.push_back(data);
    }
    const size_t mean = no_mean_ ? size_t(sizes_.at("batch") * sizes_.at("num_heads") * sizes_.at("dim")) * sizeof(float) : 0;
    const auto stream = static_cast<cudaStream_t>(context.GetGPUComputeStream());
    for (size_t i = 0; i < inputs.size(); ++i)
      if (on_host(op_, i)) bytes += aligned(bytes_of(inputs[i].shape, inputs[i].type));
    Scratch scratch(context, where, bytes + aligned(mean));
    void* workspace = scratch.take(operation_->workspace(sizes_.at("batch"), sizes_.at("dim")));
    for (size_t i = 0; i < out.size(); ++i)
      if (missing[i]) out[i] = scratch.take(missing[i]);
    if (mean) {
      in[kMean] = scratch.take(mean);
      check(cudaMemsetAsync(const_cast<void*>(in[kMean]), 0, mean, stream), "cudaMemsetAsync");
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      const size_t size = on_host(op_, i) ? bytes_of(inputs[i].shape, inputs[i].type) : 0;
      if (size == 0) continue;
      in[i] = scratch.take(size);
      check(cudaMemcpyAsync(const_cast<void*>(in[i]), inputs[i].data, size, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
    }
    operation_->run(in.data(), out.data(), sizes_.at("batch"), sizes_.at("tokens"), workspace, stream);
  }

  std::vector<Tensor> read(const Ort::KernelContext& context, const OrtMemoryInfo*& where) const {
    std::vector<Tensor> all;
    for (size_t i = 0; i < context.GetInputCount(); ++i) {
      const Ort::ConstValue value = context.GetInput(i);
      if (!value) continue;  // only trailing inputs are optional: checked by their number
      const auto info = value.GetTensorTypeAndShapeInfo();
      all.push_back({name_of(info.GetElementType()), info.GetShape(), value.GetTensorRawData()});
      if (i == 0) Ort::ThrowOnError(Ort::GetApi().GetTensorMemoryInfo(value, &where));
    }
    return all;
  }

  // Checks types and shapes and loads kernels where they are not those of the last call. Adds the mean that a node leaves out.
  void prepare(std::vector<Tensor>& inputs) {
    const bool no_mean = has_default_mean(op_) && inputs.size() == kMean;
    std::vector<std::string> types;
    std::vector<Shape> shapes;
    for (const Tensor& each : inputs) {
      types.push_back(each.type), shapes.push_back(each.shape);
      // onnxruntime-genai binds caches of four axes only: [batch, slots, 1, dim], the same memory.
      const size_t at = shapes.size() - 1;
      if (at < size_t(op_.num_inputs) && op_.inputs[at].type == schema::Type::kC && shapes[at].size() == 4 && shapes[at][2] == 1)
        shapes[at].erase(shapes[at].begin() + 2);
    }
    if (no_mean) inputs.push_back({"float32", {}, nullptr}), types.push_back("float32");
    if (types == types_ && shapes == shapes_) return;
    shapes_.clear();  // until all is loaded
    types_of(op_, types);
    sizes_ = sizes_of(op_, attributes_, shapes);
    if (types != types_ || sizes_.at("dim") != dim_) {
      types_.clear();
      operation_->prepare(types, sizes_.at("dim"));
    }
    types_ = types, shapes_ = shapes, dim_ = sizes_.at("dim"), no_mean_ = no_mean;
  }

  Shape shape_of(const schema::Port& port) const {
    Shape shape;
    for (const auto& axis : axes_of(port)) {
      shape.push_back(1);
      for (const std::string& symbol : axis) shape.back() *= sizes_.at(symbol);
    }
    return shape;
  }

  const schema::Op& op_;
  const Attributes attributes_;
  const std::unique_ptr<Operation> operation_;
  std::mutex mutex_;
  // Of the last call.
  std::vector<std::string> types_;
  std::vector<Shape> shapes_;
  Sizes sizes_;
  int64_t dim_ = -1;
  bool no_mean_ = false;
};

// An op for one pair of element types; ONNX Runtime takes the one that fits.
struct CudaOp : Ort::CustomOpBase<CudaOp, CudaKernel, true> {
  CudaOp(const schema::Op& op, ONNXTensorElementDataType activation, ONNXTensorElementDataType cache)
      : op(op), activation(activation), cache(cache) {
    if (&op != &schema::kSpanAttention) return;
    static_assert(schema::kSpanAttentionOutputs[1].alias == 3 && schema::kSpanAttentionOutputs[2].alias == 4);
    OrtCustomOp::GetMayInplace = [](int** input, int** output) -> size_t {
      *input = new int[2]{3, 4};
      *output = new int[2]{1, 2};
      return 2;
    };
    OrtCustomOp::ReleaseMayInplace = [](int* input, int* output) {
      delete[] input;
      delete[] output;
    };
  }

  const char* GetName() const { return op.name; }
  const char* GetExecutionProviderType() const { return ATTNSPAN_ORT_PROVIDER; }
  size_t GetInputTypeCount() const { return size_t(op.num_inputs); }
  size_t GetOutputTypeCount() const { return size_t(op.num_outputs); }
  ONNXTensorElementDataType GetInputType(size_t i) const { return type_of(op.inputs[i]); }
  ONNXTensorElementDataType GetOutputType(size_t i) const { return type_of(op.outputs[i]); }
  OrtMemType GetInputMemoryType(size_t i) const { return on_host(op, i) ? OrtMemTypeCPUInput : OrtMemTypeDefault; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
    return is_optional(op, i) ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t i) const {
    return op.outputs[i].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }

  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const {
    try {
      *kernel = new CudaKernel(op, info);
      return nullptr;
    } catch (const std::exception& error) {
      return api.CreateStatus(ORT_INVALID_ARGUMENT, (std::string("attnspan.") + error.what()).c_str());
    }
  }

  const schema::Op& op;
  ONNXTensorElementDataType activation, cache;

 private:
  ONNXTensorElementDataType type_of(const schema::Port& port) const {
    switch (port.type) {
      case schema::Type::kT: return activation;
      case schema::Type::kC: return cache;
      case schema::Type::kInt32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
      default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
  }
};

}  // namespace

void add_cuda_ops(Ort::CustomOpDomain& domain) {
  // ONNX Runtime keeps pointers to these for as long as any session lives.
  static const std::vector<CudaOp>& all = *new std::vector<CudaOp>([] {
    std::vector<CudaOp> ops;
    for (const schema::Op* op : schema::kOps)
      for (const auto activation : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}) {
        ops.emplace_back(*op, activation, activation);
        if (op == &schema::kSpanAttention) ops.emplace_back(*op, activation, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN);
      }
    return ops;
  }());
  for (const CudaOp& op : all) domain.Add(&op);
}

}  // namespace attnspan

// "attnspan 1; schema 913c9f013171; kernels 0123456789abcdef; ONNX Runtime headers 1.23".
extern "C" __attribute__((visibility("default"))) const char* attnspan_ort_cuda_version() {
  using namespace attnspan;
  static const std::string& text =
      *new std::string(std::string("attnspan ") + schema::kVersion + "; schema " + std::string(schema::kDigest, 12) + "; kernels " +
                       kernels_digest() + "; ONNX Runtime headers 1." + std::to_string(ORT_API_VERSION));
  return text.c_str();
}
