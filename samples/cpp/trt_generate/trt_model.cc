#include "trt_model.h"

#include <NvInfer.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "cuda.h"
#include "engine_folder.h"
#include "error.h"

namespace attnspan {

namespace {

using nvinfer1::Dims;

class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kERROR) last_ = text;
  }
  const std::string& last() const { return last_; }

 private:
  std::string last_ = "TensorRT does not say why";
};

Dims dims(std::vector<int64_t> sizes) {
  Dims shape{};
  shape.nbDims = static_cast<int32_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), shape.d);
  return shape;
}

// Input and output of a call of `rows` rows with up to `tokens` new tokens each: on the device, and pinned on the CPU.
struct Buffers {
  struct Pair {
    size_t bytes;
    PinnedMemory host;
    DeviceMemory device;
    explicit Pair(size_t size) : bytes(size), host(pinned_zeros(size)), device(device_zeros(size, "a buffer")) {}
  };
  int64_t rows;
  Pair tokens, lengths, spans, logits;

  Buffers(const Artefact& artefact, int64_t rows_, int64_t count)
      : rows(rows_),
        tokens(static_cast<size_t>(rows * count) * 8),
        lengths(static_cast<size_t>(rows) * 4),
        spans(static_cast<size_t>(artefact.layers * rows * artefact.kv_heads) * 4),
        logits(static_cast<size_t>(rows * artefact.vocab_size) * 4) {}

  void write(const int64_t* ids, int64_t count, const int32_t* length, const int32_t* span) {
    std::memcpy(tokens.host.get(), ids, static_cast<size_t>(rows * count) * 8);
    std::memcpy(lengths.host.get(), length, lengths.bytes);
    std::memcpy(spans.host.get(), span, spans.bytes);
  }
};

class TrtModel : public Model {
 public:
  TrtModel(const Artefact& artefact, int64_t batch, const std::filesystem::path& plugin, const EngineFile& file)
      : artefact_(artefact), batch_(batch) {
    runtime_.reset(nvinfer1::createInferRuntime(logger_));
    if (runtime_ == nullptr) throw std::runtime_error("TensorRT does not start: " + logger_.last());
    if (file.has_plugin && runtime_->getPluginRegistry().loadLibrary(plugin.c_str()) == nullptr)
      throw UserError("the plugin library " + plugin.string() + " does not load: " + logger_.last() + "; change --plugin");
    read_engine(file);
    if (file.streams_weights) engine_->setWeightStreamingBudgetV2(engine_->getWeightStreamingAutomaticBudget());
    find_profiles();
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    for (const Cache& cache : artefact.caches)
      caches_.push_back(device_zeros(static_cast<size_t>(batch * cache.row_bytes()), "a cache"));
    activations_ = device_zeros(static_cast<size_t>(engine_->getDeviceMemorySizeV2()), "activations");
    prompt_ = std::make_unique<Buffers>(artefact, 1, max_chunk_);
    step_ = std::make_unique<Buffers>(artefact, batch, 1);
    keep_on_host_ = engine_->getTensorLocation("logits_to_keep") == nvinfer1::TensorLocation::kHOST;
    keep_device_ = device_zeros(sizeof keep_, "logits_to_keep");
    check(cudaMemcpy(keep_device_.get(), &keep_, sizeof keep_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }

  ~TrtModel() override {
    cudaStreamSynchronize(stream_);
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
    contexts_.clear();
    cudaStreamDestroy(stream_);
  }

  int64_t max_chunk() const override { return max_chunk_; }

  const float* chunk(int64_t row, const int64_t* tokens, int64_t count, int32_t length, const int32_t* span) override {
    prompt_->write(tokens, count, &length, span);
    nvinfer1::IExecutionContext& context = bind(*prompt_, row, count);
    enqueue(context, *prompt_);
    return wait(*prompt_);
  }

  const float* step(const int64_t* tokens, const int32_t* lengths, const int32_t* span) override {
    step_->write(tokens, 1, lengths, span);
    if (graph_ != nullptr) {
      check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
      return wait(*step_);
    }
    nvinfer1::IExecutionContext& context = bind(*step_, 0, 1);
    enqueue(context, *step_);
    const float* logits = wait(*step_);
    capture(context);
    return logits;
  }

 private:
  struct Profile {
    int32_t index;
    int64_t least_batch, most_batch, least_tokens, most_tokens;
    bool takes(int64_t batch, int64_t tokens) const {
      return least_batch <= batch && batch <= most_batch && least_tokens <= tokens && tokens <= most_tokens;
    }
  };

  void read_engine(const EngineFile& file) {
    std::ifstream stream(file.path, std::ios::binary);
    std::vector<char> content(std::filesystem::file_size(file.path));
    if (!stream.read(content.data(), static_cast<std::streamsize>(content.size())))
      throw UserError("cannot read " + file.path.string());
    engine_.reset(runtime_->deserializeCudaEngine(content.data(), content.size()));
    if (engine_ == nullptr) throw UserError("TensorRT cannot read " + file.path.string() + ": " + logger_.last());
  }

  void find_profiles() {
    using nvinfer1::OptProfileSelector;
    int64_t most_batch = 0;
    for (int32_t i = 0; i < engine_->getNbOptimizationProfiles(); ++i) {
      const Dims least = engine_->getProfileShape("input_ids", i, OptProfileSelector::kMIN);
      const Dims most = engine_->getProfileShape("input_ids", i, OptProfileSelector::kMAX);
      profiles_.push_back({i, least.d[0], most.d[0], least.d[1], most.d[1]});
      most_batch = std::max(most_batch, most.d[0]);
      if (least.d[0] <= 1) max_chunk_ = std::max(max_chunk_, std::min<int64_t>(most.d[1], 512));
    }
    if (batch_ > most_batch)
      throw UserError(std::to_string(batch_) + " prompts: the engine was built for at most " + std::to_string(most_batch) +
                      "; give fewer, or attnspan build --max-batch " + std::to_string(batch_));
  }

  // The context of the tightest profile that such a call fits in.
  nvinfer1::IExecutionContext& context(int64_t batch, int64_t tokens) {
    const Profile* best = nullptr;
    for (const Profile& profile : profiles_)
      if (profile.takes(batch, tokens) &&
          (best == nullptr || profile.most_batch * profile.most_tokens < best->most_batch * best->most_tokens))
        best = &profile;
    if (best == nullptr)
      throw UserError("a call of " + std::to_string(batch) + " rows and " + std::to_string(tokens) +
                      " tokens fits no profile of the engine; attnspan build again");
    auto& found = contexts_[best->index];
    if (found == nullptr) {
      found.reset(engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
      if (found == nullptr) throw UserError("not enough GPU memory for a context of the engine: " + logger_.last());
      expect(found->setOptimizationProfileAsync(best->index, stream_), "the profile");
      check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
      // All calls are in one stream: contexts can share their memory.
      found->setDeviceMemoryV2(activations_.get(), engine_->getDeviceMemorySizeV2());
    }
    return *found;
  }

  nvinfer1::IExecutionContext& bind(const Buffers& buffers, int64_t start, int64_t count) {
    const int64_t rows = buffers.rows;
    nvinfer1::IExecutionContext& call = context(rows, count);
    const auto input = [&](const std::string& name, std::vector<int64_t> shape, void* data) {
      expect(call.setInputShape(name.c_str(), dims(std::move(shape))), name.c_str());
      expect(call.setTensorAddress(name.c_str(), data), name.c_str());
    };
    input("input_ids", {rows, count}, buffers.tokens.device.get());
    input("length", {rows}, buffers.lengths.device.get());
    input("span", {artefact_.layers, rows, artefact_.kv_heads}, buffers.spans.device.get());
    input("logits_to_keep", {1}, keep_on_host_ ? &keep_ : keep_device_.get());
    expect(call.setTensorAddress("logits", buffers.logits.device.get()), "logits");
    for (size_t i = 0; i < caches_.size(); ++i) {
      const Cache& cache = artefact_.caches[i];
      std::vector<int64_t> shape{rows};
      shape.insert(shape.end(), cache.shape.begin(), cache.shape.end());
      char* data = static_cast<char*>(caches_[i].get()) + start * cache.row_bytes();
      input("past_" + cache.name, shape, data);
      expect(call.setTensorAddress(("present_" + cache.name).c_str(), data), cache.name.c_str());  // in place
    }
    return call;
  }

  // Copies in, the engine, the logits out: all in the stream, so that it can be captured.
  void enqueue(nvinfer1::IExecutionContext& call, const Buffers& buffers) {
    for (const Buffers::Pair* pair : {&buffers.tokens, &buffers.lengths, &buffers.spans})
      check(cudaMemcpyAsync(pair->device.get(), pair->host.get(), pair->bytes, cudaMemcpyHostToDevice, stream_),
            "cudaMemcpyAsync");
    expect(call.enqueueV3(stream_), "the call");
    const Buffers::Pair& logits = buffers.logits;
    check(cudaMemcpyAsync(logits.host.get(), logits.device.get(), logits.bytes, cudaMemcpyDeviceToHost, stream_),
          "cudaMemcpyAsync");
  }

  const float* wait(const Buffers& buffers) {
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    return static_cast<const float*>(buffers.logits.host.get());
  }

  // Steps from now on are replays of the one that was just made. Where the device cannot capture it, they are calls.
  void capture(nvinfer1::IExecutionContext& call) {
    if (tried_) return;
    tried_ = true;
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    bool good = true;
    try {
      enqueue(call, *step_);
    } catch (const std::exception&) {
      good = false;
    }
    good = cudaStreamEndCapture(stream_, &graph) == cudaSuccess && good;
    if (good && cudaGraphInstantiate(&graph_, graph, 0) != cudaSuccess) graph_ = nullptr;
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();  // what capturing may have left
  }

  void expect(bool good, const char* what) const {
    if (!good) throw std::runtime_error(std::string("TensorRT refuses ") + what + ": " + logger_.last());
  }

  const Artefact& artefact_;
  int64_t batch_, max_chunk_ = 1, keep_ = 1;
  Logger logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<Profile> profiles_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
  bool tried_ = false, keep_on_host_ = true;
  DeviceMemory activations_, keep_device_;
  std::vector<DeviceMemory> caches_;
  std::unique_ptr<Buffers> prompt_, step_;
  std::map<int32_t, std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;
};

}  // namespace

std::unique_ptr<Model> make_trt_model(const Artefact& artefact, int64_t batch, const std::filesystem::path& plugin) {
  if (artefact.target != "tensorrt")
    throw UserError(artefact.folder.string() + " was exported for target " + artefact.target + ": this program takes tensorrt");
  int device = 0;
  cudaDeviceProp properties{};
  if (const cudaError_t status = cudaGetDevice(&device);
      status != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess)
    throw UserError(std::string("no NVIDIA GPU is usable: ") + cudaGetErrorString(status) + "; engines run on GPUs only");
  const std::string version = std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) + "." +
                              std::to_string(getInferLibPatchVersion());
  const EngineFile file = find_engine(artefact, version, std::to_string(properties.major) + std::to_string(properties.minor));
  const std::filesystem::path library = plugin.empty() ? artefact.folder / "libattnspan_trt.so" : plugin;
  if (file.has_plugin && !std::filesystem::is_regular_file(library))
    throw UserError("the plugin library " + library.string() +
                    " does not exist: give --plugin FILE, the path of libattnspan_trt.so");
  return std::make_unique<TrtModel>(artefact, batch, library, file);
}

}  // namespace attnspan
