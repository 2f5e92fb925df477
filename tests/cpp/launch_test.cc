// The launch layer under AddressSanitizer and UndefinedBehaviorSanitizer, with the CUDA runtime of fake_cudart.cc: workspaces of
// exactly the size asked for, runtime calls that fail, several threads. test_trt_cpp_launch.py compares what is launched.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "check.h"
#include "fake_cudart.h"
#include "operation.h"

using namespace attnspan;

namespace {

constexpr int64_t kDim = 64;

Attributes span_attributes(int heads, const std::vector<int>& capacity) {
  Given given{"capacity", {}};
  for (const int each : capacity) given.values.push_back(each);
  const Given kv_heads{"kv_num_heads", {double(capacity.size())}};
  return attributes_of(schema::kSpanAttention, {{"num_heads", {double(heads)}}, kv_heads, given});
}

std::vector<std::string> span_types(bool fp8) {
  std::vector<std::string> types(5, "bfloat16");
  if (fp8) types[3] = types[4] = "float8_e4m3fn";
  types.insert(types.end(), 2, "int32");
  if (fp8) types.insert(types.end(), 2, "float32");
  return types;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

Memory memory(size_t bytes) { return Memory(static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256))); }

// The number behind "name": in a line of the log.
uint64_t number_of(const std::string& line, const std::string& name) {
  const size_t at = line.find("\"" + name + "\": ");
  return at == std::string::npos ? 0 : std::stoull(line.substr(at + name.size() + 4));
}

// A call whose parts and copies are written to, up to their last byte, in a workspace of exactly the size that was asked for.
void call(int heads, const std::vector<int>& capacity, int64_t batch, int64_t tokens, bool fp8, bool building) {
  const auto operation = make_operation(schema::kSpanAttention, span_attributes(heads, capacity), building);
  operation->prepare(span_types(fp8), kDim);
  const size_t size = operation->workspace(batch, kDim);
  const std::unique_ptr<char[]> exact(new char[size + 256]);
  char* begin = exact.get() + (256 - reinterpret_cast<uintptr_t>(exact.get()) % 256) % 256;
  const Memory other = memory(1 << 12);
  const void* inputs[9];
  void* outputs[4];
  for (const void*& each : inputs) each = other.get();
  for (int i = 5; i < 9; ++i) inputs[i] = other.get() + 4;  // at no multiple of 16
  for (void*& each : outputs) each = other.get();
  fake_log();
  operation->run(inputs, outputs, batch, tokens, begin, nullptr);
  const std::string log = fake_log();
  size_t launches = 0;
  for (size_t from = 0, to; (to = log.find('\n', from)) != std::string::npos; from = to + 1) {
    const std::string line = log.substr(from, to - from);
    const uint64_t bytes = number_of(line, "copy") + number_of(line, "set");
    const auto fill = [&](uint64_t at, uint64_t count) {
      const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
      expect(at >= first && at + count <= first + size, "inside the workspace");
      std::memset(reinterpret_cast<char*>(at), 1, count);
    };
    if (bytes) fill(number_of(line, "to"), bytes);
    if (line.find("\"kernel\"") == std::string::npos) continue;
    ++launches;
    if (number_of(line, "part") == 0) continue;
    const uint64_t rows = (number_of(line, "workers") + batch * capacity.size()) * (heads / capacity.size());
    if (number_of(line, "workers")) {
      fill(number_of(line, "part"), rows * kDim * 4);
      fill(number_of(line, "part_lse"), rows * 4);
    }
  }
  expect(launches == (batch && tokens ? 2 : 0), "launches", double(launches));
}

template <class Body>
std::string error_of(Body body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

void failures_of_the_runtime() {
  for (const char* name : {"cudaGetDevice", "cudaLibraryLoadData", "cudaMalloc", "cudaMemcpy", "cudaStreamSynchronize"}) {
    fake_device(90, 132, 227 << 10, 100 + name[5]);  // nothing is loaded for this ordinal
    const auto operation = make_operation(schema::kSpanAttention, span_attributes(4, {128, 192}), false);
    fake_fail(name);
    const std::string error = error_of([&] { operation->prepare(span_types(false), kDim); });
    expect(error == std::string(name) + ": out of memory", error.c_str());
    fake_fail("");
    operation->prepare(span_types(false), kDim);  // it can be tried again
  }
}

void another_device_and_type() {
  const auto operation = make_operation(schema::kSpanAttention, span_attributes(4, {128, 192}), false);
  for (const int capability : {80, 90, 80})
    for (const bool fp8 : {false, true}) {
      fake_device(capability, 10, capability == 80 ? 163 << 10 : 227 << 10, capability);
      const std::string error = error_of([&] { operation->prepare(span_types(fp8), kDim); });
      expect(error.empty() == !(capability == 80 && fp8), error.c_str());
    }
}

void threads() {
  fake_device(89, 20, 99 << 10, 7);
  fake_log();
  run_threads(nullptr, 40, [](void*, int64_t i) {
    const auto operation = make_operation(schema::kSpanAttention, span_attributes(4, {128, 192}), false);
    operation->prepare(span_types(i % 2), kDim);
  }, nullptr);
  std::string log = fake_log();
  int loads = 0;
  for (size_t at = 0; (at = log.find("\"load\"", at)) != std::string::npos; ++at) ++loads;
  expect(loads == 8, "each kernel of two types is loaded once", loads, 8);
}

void other_ops() {
  fake_device(90, 132, 227 << 10, 0);
  const Memory other = memory(256);
  const void* inputs[4] = {other.get(), other.get(), other.get(), other.get()};
  void* outputs[2] = {other.get(), other.get()};
  for (const auto& [op, given] : std::vector<std::pair<const schema::Op*, std::vector<Given>>>{
           {&schema::kLshHash, {{"num_heads", {3}}, {"signature_bits", {64}}}},
           {&schema::kLshHash, {{"num_heads", {3}}, {"bits", {7}}, {"tables", {10}}}},
           {&schema::kMergeAttention, {{"num_heads", {3}}}}}) {
    const auto operation = make_operation(*op, attributes_of(*op, given), false);
    operation->prepare({"float16", "float32", "float16", "float32"}, kDim);
    fake_log();
    operation->run(inputs, outputs, 2, 5, nullptr, nullptr);
    expect(std::string(fake_log()).find("\"kernel\"") != std::string::npos, op->name);
    expect(operation->workspace(2, kDim) == 0, "no workspace");
  }
}

}  // namespace

int main() {
  fake_device(90, 132, 227 << 10, 0);
  for (const bool fp8 : {false, true})
    for (const bool building : {false, true})
      for (const int64_t batch : {0, 1, 3, 33})
        for (const int64_t tokens : {0, 1, 2, 300}) {
          call(1, {128}, batch, tokens, fp8, building);
          call(40, {128, 192, 1000, 130, 128}, batch, tokens, fp8, building);
        }
  failures_of_the_runtime();
  another_device_and_type();
  threads();
  other_ops();
  if (failures) return 1;
  std::printf("%d checks passed\n", checks);
  return 0;
}
