#include "ort_model.h"

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "error.h"

namespace attnspan {

namespace {

constexpr int64_t kChunk = 512;  // tokens of a prompt at a time: full matrix speed, little memory

ONNXTensorElementDataType type_of(const std::string& dtype) {
  if (dtype == "float32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  if (dtype == "float16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  if (dtype == "bfloat16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
  if (dtype == "int8") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
  if (dtype == "uint8") return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  throw UserError("cache_dtype is " + dtype + ": this program does not know it");
}

// Memory that is zero and is taken from the system as it is first written: caches are for n_max tokens, texts mostly shorter.
struct Zeros {
  explicit Zeros(int64_t bytes) : data(std::calloc(static_cast<size_t>(bytes), 1), std::free) {
    if (!data) throw UserError("no memory for a cache of " + std::to_string(bytes) + " bytes: give fewer prompts");
  }
  std::unique_ptr<void, void (*)(void*)> data;
};

class OrtModel : public Model {
 public:
  OrtModel(const Artefact& artefact, int64_t batch, int64_t threads, const std::filesystem::path& library)
      : artefact_(artefact),
        batch_(batch),
        env_(ORT_LOGGING_LEVEL_ERROR, "attnspan"),
        memory_(Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault)) {
    Ort::SessionOptions options;
    if (threads > 0) options.SetIntraOpNumThreads(static_cast<int>(threads));
    options.SetInterOpNumThreads(1);
    if (!library.empty()) options.RegisterCustomOpsLibrary(std::filesystem::absolute(library).c_str());
    session_ = Ort::Session(env_, (artefact.folder / "model.onnx").c_str(), options);
    for (const Cache& cache : artefact.caches) caches_.emplace_back(batch * cache.row_bytes());
    const auto rows = static_cast<size_t>(batch);
    logits_.resize(rows * static_cast<size_t>(artefact.vocab_size));
    tokens_.resize(rows), lengths_.resize(rows), spans_.resize(rows * static_cast<size_t>(artefact.layers * artefact.kv_heads));
    step_ = Ort::IoBinding(session_);  // of all steps
    bind(step_, 0, batch, tokens_.data(), 1, lengths_.data(), spans_.data());
  }

  int64_t max_chunk() const override { return kChunk; }

  const float* chunk(int64_t row, const int64_t* tokens, int64_t count, int32_t length, const int32_t* span) override {
    Ort::IoBinding binding(session_);
    bind(binding, row, 1, tokens, count, &length, span);
    session_.Run(Ort::RunOptions{nullptr}, binding);
    return logits_.data();
  }

  const float* step(const int64_t* tokens, const int32_t* lengths, const int32_t* span) override {
    std::copy_n(tokens, batch_, tokens_.begin());
    std::copy_n(lengths, batch_, lengths_.begin());
    std::copy_n(span, spans_.size(), spans_.begin());
    session_.Run(Ort::RunOptions{nullptr}, step_);
    return logits_.data();
  }

 private:
  // Binds rows [start, start + rows) and `count` new tokens of each where they lie: caches are updated in place.
  void bind(Ort::IoBinding& binding, int64_t start, int64_t rows, const int64_t* tokens, int64_t count, const int32_t* lengths,
            const int32_t* span) {
    const auto tensor = [&](const void* data, std::vector<int64_t> shape, ONNXTensorElementDataType type, int64_t bytes) {
      for (const int64_t size : shape) bytes *= size;
      return Ort::Value::CreateTensor(memory_, const_cast<void*>(data), static_cast<size_t>(bytes), shape.data(), shape.size(),
                                      type);
    };
    binding.BindInput("input_ids", tensor(tokens, {rows, count}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8));
    binding.BindInput("length", tensor(lengths, {rows}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4));
    const std::vector<int64_t> spans{artefact_.layers, rows, artefact_.kv_heads};
    binding.BindInput("span", tensor(span, spans, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4));
    binding.BindInput("logits_to_keep", tensor(&keep_, {1}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8));
    const std::vector<int64_t> logits{rows, 1, artefact_.vocab_size};
    binding.BindOutput("logits", tensor(logits_.data(), logits, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4));
    for (size_t i = 0; i < caches_.size(); ++i) {
      const Cache& cache = artefact_.caches[i];
      std::vector<int64_t> shape{rows};
      shape.insert(shape.end(), cache.shape.begin(), cache.shape.end());
      const char* data = static_cast<char*>(caches_[i].data.get()) + start * cache.row_bytes();
      const auto value = tensor(data, shape, type_of(cache.dtype), bytes_of(cache.dtype));
      binding.BindInput(("past_" + cache.name).c_str(), value);
      binding.BindOutput(("present_" + cache.name).c_str(), value);
    }
  }

  const Artefact& artefact_;
  int64_t batch_;
  Ort::Env env_;
  Ort::MemoryInfo memory_;
  Ort::Session session_{nullptr};
  Ort::IoBinding step_{nullptr};
  std::vector<Zeros> caches_;
  std::vector<int64_t> tokens_;
  std::vector<int32_t> lengths_, spans_;
  int64_t keep_ = 1;  // positions with logits
  std::vector<float> logits_;
};

}  // namespace

std::unique_ptr<Model> make_ort_model(const Artefact& artefact, int64_t batch, int64_t threads,
                                      const std::filesystem::path& library) {
  if (artefact.target != "cpu" && artefact.target != "portable")
    throw UserError(artefact.folder.string() + " was exported for target " + artefact.target +
                    ": this program takes cpu and portable");
  std::filesystem::path found = library;
  if (artefact.target == "cpu" && library.empty()) {
    found = artefact.folder / artefact.op_library;
    if (artefact.op_library.empty() || !std::filesystem::is_regular_file(found))
      throw UserError(artefact.folder.string() + " has no op library: give --library FILE, the path of libattnspan_ort.so");
  } else if (!library.empty() && !std::filesystem::is_regular_file(library)) {
    throw UserError("the op library " + library.string() + " does not exist; change --library");
  }
  try {
    return std::make_unique<OrtModel>(artefact, batch, threads, found);
  } catch (const Ort::Exception& error) {
    throw UserError("ONNX Runtime " + Ort::GetVersionString() + " cannot load " + artefact.folder.string() + ": " + error.what());
  }
}

}  // namespace attnspan
