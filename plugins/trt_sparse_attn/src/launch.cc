#include "launch.h"

#include <cstring>
#include <map>
#include <mutex>
#include <set>

namespace attnspan {
namespace {

constexpr int64_t kMaxGridX = 0x7fffffff, kMaxGridY = 65535;
constexpr int kFreeShared = 48 << 10;  // more has to be asked for
constexpr size_t kMostParameters = 64;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

[[noreturn]] void no_kernel(const std::string& variant, const Device& device) {
  std::set<int> archs;
  for (size_t i = 0; i < attnspan_kernel_count; ++i)
    if (variant == attnspan_kernels[i].name) archs.insert(attnspan_kernels[i].arch);
  std::string built;
  for (const int arch : archs) built += (built.empty() ? "sm_" : ", sm_") + std::to_string(arch);
  const std::string capability = std::to_string(device.capability / 10) + "." + std::to_string(device.capability % 10);
  throw Error("no kernel " + variant + " runs on this GPU of compute capability " + capability + ": the library has it for " +
              (built.empty() ? "no architecture" : built) + "; build the library with more of ATTNSPAN_CUDA_ARCHS");
}

// Kernels stay loaded until the process ends: all layers share them, and when a static is destroyed the driver may be gone.
cudaKernel_t handle_of(const AttnspanKernel* kernel, const Device& device) {
  static std::mutex& mutex = *new std::mutex;
  static auto& loaded = *new std::map<std::pair<int, const AttnspanKernel*>, cudaKernel_t>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = loaded.find({device.ordinal, kernel});
  if (found != loaded.end()) return found->second;

  cudaLibrary_t library = nullptr;
  const void* image = attnspan_kernel_image(kernel, device.capability);
  check(cudaLibraryLoadData(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0), "cudaLibraryLoadData");
  cudaKernel_t handle = nullptr;
  check(cudaLibraryGetKernel(&handle, library, kernel->symbol), "cudaLibraryGetKernel");
  // Libraries load lazily: asking for attributes loads now, and not while a stream is captured.
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, handle), "cudaFuncGetAttributes");
  if (kernel->shared_bytes > kFreeShared)
    check(cudaFuncSetAttribute(handle, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel->shared_bytes),
          "cudaFuncSetAttribute");
  loaded[{device.ordinal, kernel}] = handle;
  return handle;
}

}  // namespace

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the next call of the program must not report it again
  throw Error(std::string(call) + ": " + cudaGetErrorString(status));
}

Device current_device() {
  Device device;
  check(cudaGetDevice(&device.ordinal), "cudaGetDevice");
  device.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device.ordinal) +
                      attribute(cudaDevAttrComputeCapabilityMinor, device.ordinal);
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device.ordinal);
  device.shared_limit = size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.ordinal));
  return device;
}

Kernel::Kernel(const std::string& variant, const Device& device, const std::vector<Field>& fields) {
  kernel_ = attnspan_kernel_find(variant.c_str(), device.capability, device.shared_limit);
  if (kernel_ == nullptr) no_kernel(variant, device);
  for (int i = 0; i < kernel_->num_parameters; ++i) {
    const AttnspanParameter& parameter = kernel_->parameters[i];
    const Field* found = nullptr;
    for (const Field& field : fields) {
      const bool same = *field.type == '*' ? *parameter.type == '*' : std::strcmp(field.type, parameter.type) == 0;
      if (same && std::strcmp(field.name, parameter.name) == 0) found = &field;
    }
    if (found == nullptr || at_.size() == kMostParameters)
      throw Error("kernel " + variant + " takes " + parameter.name + " of type " + parameter.type +
                  ", which this library does not give; build kernels and library from one version");
    at_.push_back(found->at);
  }
  handle_ = handle_of(kernel_, device);
}

int64_t Kernel::constant(const char* name) const {
  const int64_t value = attnspan_kernel_constant(kernel_, name, -1);
  if (value < 0) throw Error(std::string("kernel ") + kernel_->name + " has no constant " + name);
  return value;
}

void Kernel::launch(const void* arguments, int64_t x, int64_t y, cudaStream_t stream) const {
  if (x == 0 || y == 0) return;
  if (x > kMaxGridX || y > kMaxGridY)
    throw Error(std::string(kernel_->name) + " takes a grid of " + std::to_string(x) + " x " + std::to_string(y) +
                " blocks: must be at most 2147483647 x 65535; give fewer rows or tokens at a time");
  void* values[kMostParameters];
  for (size_t i = 0; i < at_.size(); ++i)
    values[i] = const_cast<char*>(static_cast<const char*>(arguments)) + at_[i];  // only read, for all that the type says
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(x), static_cast<unsigned>(y), 1};
  config.blockDim = {static_cast<unsigned>(32 * kernel_->num_warps), 1, 1};
  config.dynamicSmemBytes = size_t(kernel_->shared_bytes);
  config.stream = stream;
  check(cudaLaunchKernelExC(&config, handle_, values), kernel_->name);
}

const std::string& kernels_digest() {
  static const std::string& digest = *new std::string([] {
    uint64_t hash = 0xcbf29ce484222325;  // FNV-1a, by words
    const auto add = [&](uint64_t word) { hash = (hash ^ word) * 0x100000001b3, hash ^= hash >> 29; };
    for (size_t i = 0; i < attnspan_kernel_count; ++i) {
      const AttnspanKernel& kernel = attnspan_kernels[i];
      for (const char* c = kernel.name; *c; ++c) add(static_cast<unsigned char>(*c));
      add(static_cast<uint64_t>(kernel.arch));
      const char* code = static_cast<const char*>(kernel.cubin);
      for (size_t at = 0; at + 8 <= kernel.cubin_bytes; at += 8) {
        uint64_t word;
        std::memcpy(&word, code + at, 8);
        add(word);
      }
    }
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
    return std::string(text);
  }());
  return digest;
}

int32_t narrow(int64_t value, const char* what) {
  if (value > 0x7fffffff)
    throw Error(std::string(what) + " is " + std::to_string(value) + ": must be below 2147483648; give fewer rows or tokens");
  return static_cast<int32_t>(value);
}

}  // namespace attnspan
