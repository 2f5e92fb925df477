// What the ops have in common towards ONNX Runtime: checked tensors, caches in place, its thread pool, shape inference.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
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

// What a kernel knows of its node, and the checks that name it.
class NodeKernel {
 public:
  NodeKernel(const char* op, DType activation, DType cache) : activation_(activation), cache_(cache), op_(op) {
    const char* names = nullptr;
    const char* wanted = std::getenv("ATTNSPAN_ISA");
    kernels_ = attnspan::select_kernels(wanted, &names);
    if (!kernels_) fail("ATTNSPAN_ISA is '" + std::string(wanted) + "'; this processor runs: " + names);
  }

 protected:
  // The tensors that all attention ops have, in their order, and where they go in a call.
  enum Input { kQuery, kKey, kValue, kPastKey, kPastValue };

  [[noreturn]] void fail(const std::string& what) const {
    throw Ort::Exception("attnspan." + std::string(op_) + ": " + what, ORT_INVALID_ARGUMENT);
  }

  // The fallback when the node does not have the attribute at all.
  template <class V>
  V attribute_or(const Ort::ConstKernelInfo& info, const char* name, V fallback) const {
    if (const auto found = find<V>(info, name)) return *found;
    if (find<int64_t>(info, name) || find<float>(info, name) || find<std::string>(info, name))
      fail(std::string("attribute ") + name + " must be " + (std::is_same_v<V, float> ? "a float" : "an integer"));
    return fallback;
  }

  template <class V>
  static std::optional<V> find(const Ort::ConstKernelInfo& info, const char* name) {
    try {
      return info.GetAttribute<V>(name);
    } catch (const Ort::Exception&) {
      return std::nullopt;
    }
  }

  static std::vector<int64_t> shape_of(const Ort::ConstValue& v) { return v.GetTensorTypeAndShapeInfo().GetShape(); }

  void expect(const char* name, const Ort::ConstValue& v, const std::vector<int64_t>& shape) const {
    if (!v) fail(std::string(name) + " is missing; its shape must be " + text(shape));
    if (shape_of(v) != shape) fail(std::string(name) + " has shape " + text(shape_of(v)) + "; it must be " + text(shape));
  }

  // Checks query, key and value and fills in what they say; returns the shape of the query.
  std::vector<int64_t> read_chunk(Ort::KernelContext& context, int64_t heads, int64_t kv_heads, attnspan::SpanCall& call) const {
    const auto query = context.GetInput(kQuery), key = context.GetInput(kKey), value = context.GetInput(kValue);
    const std::vector<int64_t> q = shape_of(query);
    if (q.size() != 3 || q[2] <= 0 || q[2] % heads != 0)
      fail("query has shape " + text(q) + "; it must be [batch, tokens, num_heads * head_dim] with num_heads " + std::to_string(heads));
    call.batch = q[0], call.tokens = q[1], call.head_dim = q[2] / heads;
    call.activation = activation_, call.cache = cache_;
    const std::vector<int64_t> chunk{call.batch, call.tokens, kv_heads * call.head_dim};
    expect("key", key, chunk);
    expect("value", value, chunk);
    call.query = query.GetTensorRawData(), call.key = key.GetTensorRawData(), call.value = value.GetTensorRawData();
    return q;
  }

  // The scales of an int8 cache, which no other has.
  void read_scales(Ort::KernelContext& context, size_t first, int64_t kv_heads, attnspan::SpanCall& call) const {
    const size_t inputs = context.GetInputCount();
    const auto key_scale = inputs > first ? context.GetInput(first) : Ort::ConstValue{};
    const auto value_scale = inputs > first + 1 ? context.GetInput(first + 1) : Ort::ConstValue{};
    if (cache_ != DType::i8) {
      if (key_scale || value_scale)
        fail(std::string("key_scale and value_scale belong to an int8 cache; this cache is ") + attnspan::name_of(cache_));
      return;
    }
    expect("key_scale", key_scale, {kv_heads});
    expect("value_scale", value_scale, {kv_heads});
    for (const auto* scale : {&key_scale, &value_scale})
      for (int64_t h = 0; h < kv_heads; ++h)
        if (!(scale->GetTensorData<float>()[h] > 0.f)) fail("key_scale and value_scale must be positive");
    call.key_scale = key_scale.GetTensorData<float>(), call.value_scale = value_scale.GetTensorData<float>();
  }

  // The output that holds `past` afterwards: updated in place when the caller bound both to the same memory, otherwise a copy.
  static void* present(Ort::KernelContext& context, size_t index, const Ort::ConstValue& past, int64_t element_bytes) {
    const std::vector<int64_t> shape = shape_of(past);
    void* to = context.GetOutput(index, shape).GetTensorMutableRawData();
    const void* from = past.GetTensorRawData();
    int64_t bytes = element_bytes;
    for (int64_t n : shape) bytes *= n;
    if (to != from) std::memcpy(to, from, size_t(bytes));
    return to;
  }

  // Gives the output `lse` its memory, where the node has one.
  static void bind_lse(Ort::KernelContext& context, size_t index, int64_t heads, attnspan::SpanCall& call) {
    if (context.GetOutputCount() <= index) return;
    auto lse = context.GetOutput(index, {call.batch, heads, call.tokens});
    if (lse) call.lse = lse.GetTensorMutableData<float>();
  }

  const attnspan::Kernels* kernels_ = nullptr;
  DType activation_, cache_;

 private:
  const char* op_;
};

// Runs what throws where ONNX Runtime wants a status.
template <class F>
OrtStatusPtr guarded(F&& f) {
  try {
    f();
    return nullptr;
  } catch (const Ort::Exception& e) {
    return Ort::GetApi().CreateStatus(e.GetOrtErrorCode(), e.what());
  } catch (const std::exception& e) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, e.what());
  }
}

// Output i has the type and shape of input `input`. Through the C API with -1 for symbolic dimensions: the C++ helper of headers up
// to 1.23 writes -2, which newer runtimes reject. The type is taken from the input because ONNX Runtime calls only the first object
// of a name.
inline void same_shape(OrtShapeInferContext* context, size_t input, size_t output) {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* raw = nullptr;  // stays the context's
  Ort::ThrowOnError(api.ShapeInferContext_GetInputTypeShape(context, input, &raw));
  size_t rank = 0;
  Ort::ThrowOnError(api.GetDimensionsCount(raw, &rank));
  if (rank == 0) return;  // shape unknown
  std::vector<int64_t> dims(rank);
  std::vector<const char*> names(rank);
  Ort::ThrowOnError(api.GetDimensions(raw, dims.data(), rank));
  Ort::ThrowOnError(api.GetSymbolicDimensions(raw, names.data(), rank));
  for (size_t i = 0; i < rank; ++i) {
    if (dims[i] >= 0) continue;
    dims[i] = -1;
    if (!names[i] || !*names[i]) return;  // a dimension without name or value would be stored as the literal -1
  }
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

// An op whose outputs from 1 on are inputs updated in place: PAIRS of them, inputs from 3, outputs from 1. One object per pair of
// element types; ONNX Runtime takes the one that fits.
template <class Op, class Kernel, int PAIRS>
struct CacheOp : Ort::CustomOpBase<Op, Kernel, true> {
  CacheOp(DType activation, DType cache) : activation(activation), cache(cache) {
    OrtCustomOp::GetMayInplace = [](int** input, int** output) -> size_t {
      *input = new int[PAIRS];
      *output = new int[PAIRS];
      for (int i = 0; i < PAIRS; ++i) (*input)[i] = 3 + i, (*output)[i] = 1 + i;
      return PAIRS;
    };
    OrtCustomOp::ReleaseMayInplace = [](int* input, int* output) {
      delete[] input;
      delete[] output;
    };
    // lse is left to the runtime: its shape is known when it is computed.
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
      return guarded([&] {
        same_shape(context, 0, 0);
        for (size_t i = 0; i < PAIRS; ++i) same_shape(context, 3 + i, 1 + i);
      });
    };
  }

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] { *kernel = new Kernel(info, activation, cache); });
  }

  DType activation, cache;
};

// An op without a cache: one object per type of activations.
template <class Op, class Kernel>
struct ActivationOp : Ort::CustomOpBase<Op, Kernel, true> {
  explicit ActivationOp(DType activation) : activation(activation) {}

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] { *kernel = new Kernel(info, activation); });
  }

  DType activation;
};

}  // namespace
