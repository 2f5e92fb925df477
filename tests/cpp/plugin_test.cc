// The plugin as a TensorRT runtime drives it: created from what an engine holds, cloned, attached, told shapes, run; with the
// CUDA runtime of fake_cudart.cc, under the sanitizers. Needs TensorRT's headers. What builders do is tested with TensorRT-RTX.
#include <cstring>
#include <memory>

#include "check.h"
#include "fake_cudart.h"
#include "plugin.h"

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(ILoggerFinder* finder);
extern "C" const char* attnspan_trt_version();

namespace {

struct Logger final : ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) errors += std::string(message) + "\n";
  }
  std::string errors;
} logger;

struct Finder final : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

std::string taken() {
  std::string errors;
  errors.swap(logger.errors);
  return errors;
}

void expect_error(const std::string& want) {
  const std::string got = taken();
  expect(got == want + "\n", ("got: " + got + "want: " + want).c_str());
}

IPluginCreatorV3One* creator(const char* name) {
  int32_t count = 0;
  IPluginCreatorInterface* const* all = getCreators(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* one = static_cast<IPluginCreatorV3One*>(all[i]);
    if (std::strcmp(one->getPluginName(), name) == 0) return one;
  }
  return nullptr;
}

template <class Interface>
Interface* as(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Interface*>(plugin->getCapabilityInterface(type));
}

Dims dims(std::initializer_list<int64_t> sizes) {
  Dims all{};
  for (const int64_t size : sizes) all.d[all.nbDims++] = size;
  return all;
}

// Inputs of SpanAttention: 4 query heads, 2 KV heads of 64 elements, 128 and 192 slots.
std::vector<PluginTensorDesc> tensors(int64_t batch, int64_t tokens, DataType type = DataType::kBF16) {
  std::vector<PluginTensorDesc> all;
  const auto add = [&](Dims shape, DataType kind) { all.push_back({shape, kind, TensorFormat::kLINEAR, 1.f}); };
  add(dims({batch, tokens, 256}), type), add(dims({batch, tokens, 128}), type), add(dims({batch, tokens, 128}), type);
  add(dims({batch, 320, 64}), type), add(dims({batch, 320, 64}), type);
  add(dims({batch}), DataType::kINT32), add(dims({batch, 2}), DataType::kINT32);
  return all;
}

const int32_t heads[] = {4}, kv_heads[] = {2}, capacity[] = {128, 192}, sink[] = {64};
const float scale[] = {0.25f}, softcap[] = {0.f};

std::vector<PluginField> span_fields() {
  return {{"num_heads", heads, PluginFieldType::kINT32, 1},   {"kv_num_heads", kv_heads, PluginFieldType::kINT32, 1},
          {"capacity", capacity, PluginFieldType::kINT32, 2}, {"sink", sink, PluginFieldType::kINT32, 1},
          {"scale", scale, PluginFieldType::kFLOAT32, 1},     {"softcap", softcap, PluginFieldType::kFLOAT32, 1}};
}

std::unique_ptr<IPluginV3> make(const std::vector<PluginField>& fields, TensorRTPhase phase = TensorRTPhase::kRUNTIME,
                                const char* op = "SpanAttention") {
  const PluginFieldCollection all{static_cast<int32_t>(fields.size()), fields.data()};
  return std::unique_ptr<IPluginV3>(creator(op)->createPlugin("layer", &all, phase));
}

void creators() {
  int32_t count = 0;
  IPluginCreatorInterface* const* all = getCreators(count);
  expect(count == 3, "creators", count, 3);
  for (int32_t i = 0; i < count; ++i) {
    auto* one = static_cast<IPluginCreatorV3One*>(all[i]);
    expect(std::string(one->getPluginNamespace()) == "attnspan", one->getPluginName());
    expect(std::string(one->getPluginVersion()) == "1", one->getPluginName());
    const PluginFieldCollection* names = one->getFieldNames();
    expect(names->nbFields == attnspan::schema::kOps[i]->num_attributes, "names of attributes");
    for (int32_t j = 0; j < names->nbFields; ++j)
      expect(std::strcmp(names->fields[j].name, attnspan::schema::kOps[i]->attributes[j].name) == 0, names->fields[j].name);
  }
  expect(std::string(attnspan_trt_version()).find("attnspan 1; schema ") == 0, attnspan_trt_version());
}

void serialisation() {
  const auto first = make(span_fields());
  const PluginFieldCollection* kept =
      as<IPluginV3OneRuntime>(first.get(), PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  const auto second = make(std::vector<PluginField>(kept->fields, kept->fields + kept->nbFields));
  auto* build = as<IPluginV3OneBuildV2>(second.get(), PluginCapabilityType::kBUILD);
  const std::string id = build->getTimingCacheID();
  expect(id == as<IPluginV3OneBuildV2>(first.get(), PluginCapabilityType::kBUILD)->getTimingCacheID(), id.c_str());
  const char want[] = "SpanAttention num_heads=4 kv_num_heads=2 capacity=128,192 sink=64 scale=0.25 softcap=0.0 kernels=";
  expect(id.find(want) == 0, id.c_str());
  const std::unique_ptr<IPluginV3> twin(second->clone());
  expect(id == as<IPluginV3OneBuildV2>(twin.get(), PluginCapabilityType::kBUILD)->getTimingCacheID(), "of a clone");
  for (int32_t output = -1; output < 5; ++output)
    expect(build->getAliasedInput(output) == (output == 1 ? 3 : output == 2 ? 4 : -1), "alias", output);
  expect(build->getNbOutputs() == 4 && build->getNbTactics() == 0, "outputs");
}

void formats() {
  const auto plugin = make(span_fields());
  auto* build = as<IPluginV3OneBuildV2>(plugin.get(), PluginCapabilityType::kBUILD);
  std::vector<DynamicPluginTensorDesc> all;
  for (const PluginTensorDesc& each : tensors(2, 5)) all.push_back({each, each.dims, each.dims, each.dims});
  const auto output = [&](DataType type) { all.push_back(all[0]), all.back().desc.type = type; };
  output(DataType::kBF16), output(DataType::kBF16), output(DataType::kBF16), output(DataType::kFLOAT);
  for (int32_t at = 0; at < 11; ++at) {
    expect(build->supportsFormatCombination(at, all.data(), 7, 4), "as it should be", at);
    auto other = all;
    other[size_t(at)].desc.type = DataType::kHALF;
    expect(build->supportsFormatCombination(at, other.data(), 7, 4) == (at == 0), "another type", at);
    other = all;
    other[size_t(at)].desc.format = TensorFormat::kCHW32;
    expect(!build->supportsFormatCombination(at, other.data(), 7, 4), "another format", at);
  }
  expect(taken().empty(), "questions are no errors");
  expect(build->configurePlugin(all.data(), 7, all.data() + 7, 4) == 0, "configure");
  const size_t bytes = build->getWorkspaceSize(all.data(), 7, all.data() + 7, 4);
  expect(bytes == (576 + 4) * 2 * 65 * 4 + 16 * 4 + 4096, "workspace", double(bytes));
  all[3].desc.dims.d[1] = 300;
  expect(build->configurePlugin(all.data(), 7, all.data() + 7, 4) != 0, "configure");
  expect_error("attnspan: node layer: SpanAttention: past_key has shape [2, 300, 64]: must be [batch, slots, dim], batch = 2, "
               "slots = 320, dim = 64");
}

// Kernels that a call launches; what was loaded before is not loaded again.
std::string launched(IPluginV3* plugin, int64_t batch, int64_t tokens) {
  alignas(256) static char memory[4096];
  static std::vector<char> workspace(1 << 20);
  const auto inputs = tensors(batch, tokens);
  const std::vector<const void*> in(7, memory);
  const std::vector<void*> out(4, memory);
  auto* runtime = as<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  if (runtime->onShapeChange(inputs.data(), 7, inputs.data(), 4)) return "shape refused";
  fake_log();
  void* begin = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256);
  if (runtime->enqueue(inputs.data(), inputs.data(), in.data(), out.data(), begin, nullptr)) return "enqueue failed";
  const std::string log = fake_log();
  std::string names;
  for (size_t at = 0; (at = log.find("{\"", at)) != std::string::npos; ++at) {
    const size_t key_end = log.find('"', at + 2), from = log.find('"', key_end + 1) + 1;
    const std::string key = log.substr(at + 2, key_end - at - 2);
    names += (names.empty() ? "" : " ") + (key == "kernel" ? log.substr(from, log.find('"', from) - from) : key);
    at = log.find('\n', at);
  }
  return names;
}

void expect_launches(IPluginV3* plugin, int64_t batch, int64_t tokens, const std::string& want) {
  const std::string got = launched(plugin, batch, tokens);
  expect(got == want, ("got: " + got + "; want: " + want).c_str());
}

void running() {
  fake_device(90, 132, 227 << 10, 0);
  const auto plugin = make(span_fields());
  auto* runtime = as<IPluginV3OneRuntime>(plugin.get(), PluginCapabilityType::kRUNTIME);
  const std::unique_ptr<IPluginV3> context(runtime->attachToContext(nullptr)), other(runtime->attachToContext(nullptr));
  expect_launches(context.get(), 2, 5, "span_prefill_bf16_d64 ring_update_bf16_d64");
  expect_launches(other.get(), 3, 1, "span_decode_bf16_d64 merge_chunks_bf16_d64");
  expect_launches(context.get(), 1, 1, "span_decode_bf16_d64 merge_chunks_bf16_d64");
  const auto building = make(span_fields(), TensorRTPhase::kBUILD);
  const std::unique_ptr<IPluginV3> timed(
      as<IPluginV3OneRuntime>(building.get(), PluginCapabilityType::kRUNTIME)->attachToContext(nullptr));
  expect_launches(timed.get(), 1, 1, "set span_decode_bf16_d64 merge_chunks_bf16_d64");  // zeros for lengths
  expect(taken().empty(), "no errors");

  auto wrong = tensors(2, 5);
  wrong[6].dims.d[1] = 3;
  runtime = as<IPluginV3OneRuntime>(context.get(), PluginCapabilityType::kRUNTIME);
  expect(runtime->onShapeChange(wrong.data(), 7, nullptr, 0) != 0, "span");
  expect_error("attnspan: node layer: SpanAttention: span has shape [2, 3]: must be [batch, kv_num_heads], batch = 2, "
               "kv_num_heads = 2");
  fake_device(0, 0, 0, 0);
  expect_launches(std::unique_ptr<IPluginV3>(context->clone()).get(), 2, 5, "shape refused");
  expect_error("attnspan: node layer: cudaGetDevice: no device");
}

void refusals() {
  auto fields = span_fields();
  fields.erase(fields.begin() + 1);
  expect(make(fields) == nullptr, "no plugin");
  expect_error("attnspan: node layer: SpanAttention: attribute kv_num_heads is missing: must be given");
  fields = span_fields();
  fields[0].type = PluginFieldType::kCHAR;
  expect(make(fields) == nullptr, "no plugin");
  expect_error("attnspan: node layer: attribute num_heads has plugin field type 6: must be an integer or a float");
  fields = span_fields();
  fields[0].length = 0;
  expect(make(fields) == nullptr, "no plugin");
  expect_error("attnspan: node layer: SpanAttention: attribute num_heads is []: must be of kind int");
  const DataType types[] = {DataType::kHALF, DataType::kINT64, DataType::kFLOAT};
  DataType output[1];
  const int64_t wide[] = {3}, bits[] = {128};
  const auto hash = make({{"num_heads", wide, PluginFieldType::kINT64, 1}, {"signature_bits", bits, PluginFieldType::kINT64, 1}},
                         TensorRTPhase::kBUILD, "LshHash");
  auto* build = as<IPluginV3OneBuildV2>(hash.get(), PluginCapabilityType::kBUILD);
  expect(build->getOutputDataTypes(output, 1, types, 3) != 0, "types");
  expect_error("attnspan: node layer: LshHash: projection is int64: must be float32");
  expect(build->getOutputDataTypes(output, 1, types, 2) != 0, "count");
  expect_error("attnspan: node layer: LshHash: 2 inputs are given: must be 3");
}

}  // namespace

int main() {
  setLoggerFinder(&finder);
  creators();
  serialisation();
  formats();
  running();
  refusals();
  setLoggerFinder(nullptr);
  if (failures) return 1;
  std::printf("%d checks passed\n", checks);
  return 0;
}
