// ONNX Runtime's side of the library: declares the ops of domain `attnspan`, checks every tensor, calls the core.
#include <atomic>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include "span.h"

namespace {

using attnspan::DType;

ONNXTensorElementDataType onnx_type(DType t) {
  switch (t) {
    case DType::f32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case DType::f16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case DType::bf16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
  }
}

[[noreturn]] void fail(const std::string& what) {
  throw Ort::Exception("attnspan.SpanAttention: " + what, ORT_INVALID_ARGUMENT);
}

std::string text(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

// The session's own thread pool. An exception must not cross ONNX Runtime's C frames, so it is carried around them.
struct Pool {
  Ort::KernelContext& context;

  static void run(void* pool, int64_t count, void (*body)(void*, int64_t), void* user) {
    struct Job {
      void (*body)(void*, int64_t);
      void* user;
      std::atomic<bool> failed{false};
    } job{body, user};
    static_cast<Pool*>(pool)->context.ParallelFor(
        [](void* p, size_t i) {
          auto* j = static_cast<Job*>(p);
          try {
            j->body(j->user, int64_t(i));
          } catch (...) {
            j->failed = true;
          }
        },
        size_t(count), 0, &job);
    if (job.failed) throw std::bad_alloc();
  }
};

class SpanKernel {
 public:
  SpanKernel(const OrtKernelInfo* raw, DType activation, DType cache) : activation_(activation), cache_(cache) {
    Ort::ConstKernelInfo info(raw);
    config_.heads = info.GetAttribute<int64_t>("num_heads");
    config_.kv_heads = info.GetAttribute<int64_t>("kv_num_heads");
    config_.capacity = info.GetAttributes<int64_t>("capacity");
    config_.sink = optional(info, "sink", int64_t(64));
    config_.scale = optional(info, "scale", 0.f);
    config_.softcap = optional(info, "softcap", 0.f);
    const std::string wrong = config_.check();
    if (!wrong.empty()) fail(wrong);
    slots_ = config_.offset().back();
    const char* names = nullptr;
    const char* wanted = std::getenv("ATTNSPAN_ISA");
    kernels_ = attnspan::select_kernels(wanted, &names);
    if (!kernels_) fail("ATTNSPAN_ISA is '" + std::string(wanted) + "'; this processor runs: " + names);
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    try {
      compute(raw);
      return nullptr;
    } catch (const Ort::Exception& e) {
      return Ort::GetApi().CreateStatus(e.GetOrtErrorCode(), e.what());
    } catch (const std::exception& e) {
      return Ort::GetApi().CreateStatus(ORT_FAIL, e.what());
    }
  }

 private:
  template <class V>
  static V optional(const Ort::ConstKernelInfo& info, const char* name, V fallback) {
    try {
      return info.GetAttribute<V>(name);
    } catch (const Ort::Exception&) {
      return fallback;
    }
  }

  static std::vector<int64_t> shape_of(const Ort::ConstValue& v) { return v.GetTensorTypeAndShapeInfo().GetShape(); }

  static void expect(const char* name, const Ort::ConstValue& v, const std::vector<int64_t>& shape) {
    if (!v) fail(std::string(name) + " is missing; its shape must be " + text(shape));
    if (shape_of(v) != shape) fail(std::string(name) + " has shape " + text(shape_of(v)) + "; it must be " + text(shape));
  }

  void compute(OrtKernelContext* raw) const {
    Ort::KernelContext context(raw);
    const auto query = context.GetInput(0), key = context.GetInput(1), value = context.GetInput(2), past_key = context.GetInput(3),
               past_value = context.GetInput(4), length = context.GetInput(5), span = context.GetInput(6);
    const size_t inputs = context.GetInputCount();
    const auto key_scale = inputs > 7 ? context.GetInput(7) : Ort::ConstValue{};
    const auto value_scale = inputs > 8 ? context.GetInput(8) : Ort::ConstValue{};
    const std::vector<int64_t> q = shape_of(query);
    if (q.size() != 3 || q[2] <= 0 || q[2] % config_.heads != 0)
      fail("query has shape " + text(q) + "; it must be [batch, tokens, num_heads * head_dim] with num_heads " +
           std::to_string(config_.heads));
    const int64_t batch = q[0], tokens = q[1], dim = q[2] / config_.heads;
    const std::vector<int64_t> chunk{batch, tokens, config_.kv_heads * dim}, ring{batch, slots_, dim};
    expect("key", key, chunk);
    expect("value", value, chunk);
    expect("past_key", past_key, ring);
    expect("past_value", past_value, ring);
    expect("length", length, {batch});
    expect("span", span, {batch, config_.kv_heads});
    if (cache_ == DType::i8) {
      expect("key_scale", key_scale, {config_.kv_heads});
      expect("value_scale", value_scale, {config_.kv_heads});
      for (const auto* scale : {&key_scale, &value_scale})
        for (int64_t h = 0; h < config_.kv_heads; ++h)
          if (!(scale->GetTensorData<float>()[h] > 0.f)) fail("key_scale and value_scale must be positive");
    } else if (key_scale || value_scale) {
      fail(std::string("key_scale and value_scale belong to an int8 cache; this cache is ") + attnspan::name_of(cache_));
    }
    attnspan::SpanCall call{};
    call.batch = batch, call.tokens = tokens, call.head_dim = dim;
    call.activation = activation_, call.cache = cache_;
    call.query = query.GetTensorRawData(), call.key = key.GetTensorRawData(), call.value = value.GetTensorRawData();
    call.length = length.GetTensorData<int32_t>(), call.span = span.GetTensorData<int32_t>();
    if (cache_ == DType::i8) call.key_scale = key_scale.GetTensorData<float>(), call.value_scale = value_scale.GetTensorData<float>();
    const std::string wrong = check_call(config_, call);
    if (!wrong.empty()) fail(wrong);
    call.output = context.GetOutput(0, q).GetTensorMutableRawData();
    call.past_key = present(context, 1, past_key, ring);
    call.past_value = present(context, 2, past_value, ring);
    if (context.GetOutputCount() > 3) {
      auto lse = context.GetOutput(3, {batch, config_.heads, tokens});
      if (lse) call.lse = lse.GetTensorMutableData<float>();
    }
    Pool pool{context};
    attnspan::span_attention(config_, call, *kernels_, {Pool::run, &pool});
  }

  // The caches are updated in place when the caller bound past and present to the same memory; otherwise they are copied.
  void* present(Ort::KernelContext& context, size_t index, const Ort::ConstValue& past, const std::vector<int64_t>& shape) const {
    void* to = context.GetOutput(index, shape).GetTensorMutableRawData();
    const void* from = past.GetTensorRawData();
    if (to != from) std::memcpy(to, from, size_t(shape[0] * shape[1] * shape[2] * attnspan::size_of(cache_)));
    return to;
  }

  attnspan::SpanConfig config_;
  const attnspan::Kernels* kernels_ = nullptr;
  DType activation_, cache_;
  int64_t slots_ = 0;
};

// One object per pair of element types, all under the name SpanAttention.
struct SpanOp : Ort::CustomOpBase<SpanOp, SpanKernel, true> {
  SpanOp(DType activation, DType cache) : activation(activation), cache(cache) {
    OrtCustomOp::GetMayInplace = [](int** input, int** output) -> size_t {
      *input = new int[2]{3, 4};
      *output = new int[2]{1, 2};
      return 2;
    };
    OrtCustomOp::ReleaseMayInplace = [](int* input, int* output) {
      delete[] input;
      delete[] output;
    };
    OrtCustomOp::InferOutputShapeFn = infer;
  }

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

  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const {
    try {
      *kernel = new SpanKernel(info, activation, cache);
      return nullptr;
    } catch (const Ort::Exception& e) {
      return api.CreateStatus(e.GetOrtErrorCode(), e.what());
    } catch (const std::exception& e) {
      return api.CreateStatus(ORT_FAIL, e.what());
    }
  }

  // output has the shape of query, the presents those of the pasts. Through the C API with -1 for symbolic dimensions:
  // the C++ helper of headers up to 1.23 writes -2, which newer runtimes reject. The type is taken from the input because ONNX
  // Runtime calls only the first object of a name. lse is left to the runtime: its shape is known when it is computed.
  static OrtStatusPtr infer(const OrtCustomOp*, OrtShapeInferContext* context) {
    try {
      const OrtApi& api = Ort::GetApi();
      const std::pair<size_t, size_t> same[] = {{0, 0}, {3, 1}, {4, 2}};
      for (auto [input, output] : same) {
        OrtTensorTypeAndShapeInfo* raw = nullptr;  // stays the context's
        Ort::ThrowOnError(api.ShapeInferContext_GetInputTypeShape(context, input, &raw));
        size_t rank = 0;
        Ort::ThrowOnError(api.GetDimensionsCount(raw, &rank));
        if (rank == 0) continue;  // shape unknown
        std::vector<int64_t> dims(rank);
        std::vector<const char*> names(rank);
        Ort::ThrowOnError(api.GetDimensions(raw, dims.data(), rank));
        Ort::ThrowOnError(api.GetSymbolicDimensions(raw, names.data(), rank));
        bool known = true;
        for (size_t i = 0; i < rank; ++i)
          if (dims[i] < 0) dims[i] = -1, known = known && names[i] && *names[i];
        if (!known) continue;  // a dimension without name or value would be stored as the literal -1
        ONNXTensorElementDataType type;
        Ort::ThrowOnError(api.GetTensorElementType(raw, &type));
        OrtTensorTypeAndShapeInfo* made = nullptr;
        Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&made));
        const Ort::TensorTypeAndShapeInfo owner(made);
        Ort::ThrowOnError(api.SetTensorElementType(made, type));
        Ort::ThrowOnError(api.SetDimensions(made, dims.data(), rank));
        Ort::ThrowOnError(api.SetSymbolicDimensions(made, names.data(), rank));
        Ort::ThrowOnError(api.ShapeInferContext_SetOutputTypeShape(context, output, made));
      }
      return nullptr;
    } catch (const Ort::Exception& e) {
      return Ort::GetApi().CreateStatus(e.GetOrtErrorCode(), e.what());
    }
  }

  DType activation, cache;
};

const Ort::CustomOpDomain& ops() {
  // ONNX Runtime keeps pointers to these for as long as any session lives.
  static const std::vector<SpanOp> span = [] {
    std::vector<SpanOp> all;
    for (DType activation : {DType::f32, DType::f16, DType::bf16})
      for (DType cache : {DType::f32, DType::f16, DType::bf16, DType::i8}) all.emplace_back(activation, cache);
    return all;
  }();
  static const Ort::CustomOpDomain domain = [] {
    Ort::CustomOpDomain d("attnspan");
    for (const SpanOp& op : span) d.Add(&op);
    return d;
  }();
  return domain;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                              const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) {
    const OrtApi* oldest = base->GetApi(1);
    const std::string what = std::string("libattnspan_ort was built for ONNX Runtime 1.") + std::to_string(ORT_API_VERSION) +
                             " or newer; this is " + base->GetVersionString() + ". Upgrade with: pip install 'onnxruntime>=1.25'";
    return oldest->CreateStatus(ORT_NOT_IMPLEMENTED, what.c_str());
  }
  Ort::InitApi(api);
  try {
    Ort::UnownedSessionOptions(options).Add(ops());
    return nullptr;
  } catch (const Ort::Exception& e) {
    return api->CreateStatus(e.GetOrtErrorCode(), e.what());
  }
}
