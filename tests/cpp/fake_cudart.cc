// Stands for the CUDA runtime in tests of the launch layer: one device of any kind, host memory, launches written down.
#include "fake_cudart.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>

#include "attnspan_kernels.h"

namespace {

struct {
  int capability = 0, multiprocessors = 0, shared_limit = 0, ordinal = 0;
} device;
struct Loaded {
  const AttnspanKernel* kernel;
  const char* image;
  int shared = 48 << 10;  // that a block may have
};
std::mutex mutex;
std::string log_text;
std::string failing;  // name of the call that fails

cudaError_t fail_if(const char* call) {
  const std::lock_guard<std::mutex> lock(mutex);
  return failing == call ? cudaErrorMemoryAllocation : cudaSuccess;
}

void write(const std::string& line) {
  const std::lock_guard<std::mutex> lock(mutex);
  log_text += line + "\n";
}

std::string hex(const void* pointer) {
  char text[32];
  std::snprintf(text, sizeof text, "%llu", static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(pointer)));
  return text;
}

std::string shown(const AttnspanParameter& parameter, const void* value) {
  if (*parameter.type == '*') {
    const void* pointer;
    std::memcpy(&pointer, value, sizeof pointer);
    return hex(pointer);
  }
  char text[32];
  if (std::strcmp(parameter.type, "fp32") == 0) {
    float number;
    std::memcpy(&number, value, sizeof number);
    std::snprintf(text, sizeof text, "%.17g", double{number});
  } else {
    int32_t number;
    std::memcpy(&number, value, sizeof number);
    std::snprintf(text, sizeof text, "%d", number);
  }
  return text;
}

}  // namespace

extern "C" {

void fake_device(int capability, int multiprocessors, int shared_limit, int ordinal) {
  device = {capability, multiprocessors, shared_limit, ordinal};
}

void fake_fail(const char* call) { failing = call; }

const char* fake_log() {
  static std::string taken;
  const std::lock_guard<std::mutex> lock(mutex);
  taken.swap(log_text);
  log_text.clear();
  return taken.c_str();
}

cudaError_t CUDARTAPI cudaGetDevice(int* ordinal) {
  *ordinal = device.ordinal;
  return device.capability ? fail_if("cudaGetDevice") : cudaErrorNoDevice;
}

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *value = device.capability / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = device.capability % 10; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_limit; return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t CUDARTAPI cudaGetLastError() { return cudaSuccess; }
const char* CUDARTAPI cudaGetErrorString(cudaError_t error) { return error == cudaErrorNoDevice ? "no device" : "out of memory"; }

cudaError_t CUDARTAPI cudaMalloc(void** memory, size_t bytes) {
  if (const cudaError_t failed = fail_if("cudaMalloc")) return failed;
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (const cudaError_t failed = fail_if("cudaMemcpy")) return failed;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamSynchronize(cudaStream_t) { return fail_if("cudaStreamSynchronize"); }

cudaError_t CUDARTAPI cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  write("{\"copy\": " + std::to_string(bytes) + ", \"to\": " + hex(to) + ", \"from\": " + hex(from) + ", \"stream\": " +
        hex(stream) + "}");
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  write("{\"set\": " + std::to_string(bytes) + ", \"to\": " + hex(to) + ", \"value\": " + std::to_string(value) +
        ", \"stream\": " + hex(stream) + "}");
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaLibraryLoadData(cudaLibrary_t* library, const void* code, cudaJitOption*, void**, unsigned,
                                          cudaLibraryOption*, void**, unsigned) {
  if (const cudaError_t failed = fail_if("cudaLibraryLoadData")) return failed;
  for (size_t i = 0; i < attnspan_kernel_count; ++i) {
    const AttnspanKernel& kernel = attnspan_kernels[i];
    const bool native = kernel.cubin == code;
    if (!native && kernel.ptx != code) continue;
    static auto& all = *new std::set<Loaded*>;  // loaded until the process ends
    auto* loaded = new Loaded{&kernel, native ? "cubin" : "ptx"};
    const std::lock_guard<std::mutex> lock(mutex);
    all.insert(loaded);
    *library = reinterpret_cast<cudaLibrary_t>(loaded);
    log_text += std::string("{\"load\": \"") + kernel.name + "\", \"arch\": " + std::to_string(kernel.arch) + ", \"image\": \"" +
                loaded->image + "\"}\n";
    return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t CUDARTAPI cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t library, const char* name) {
  auto* loaded = reinterpret_cast<Loaded*>(library);
  if (std::strcmp(loaded->kernel->symbol, name) != 0) return cudaErrorInvalidValue;
  *kernel = reinterpret_cast<cudaKernel_t>(loaded);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  auto* loaded = static_cast<Loaded*>(const_cast<void*>(function));
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize || value > device.shared_limit) return cudaErrorInvalidValue;
  loaded->shared = value;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** values) {
  const auto* loaded = static_cast<const Loaded*>(function);
  const AttnspanKernel& kernel = *loaded->kernel;
  if (config->dynamicSmemBytes > size_t(loaded->shared) || config->numAttrs) return cudaErrorInvalidValue;
  const auto& grid = config->gridDim;
  std::string line = std::string("{\"kernel\": \"") + kernel.name + "\", \"arch\": " + std::to_string(kernel.arch) +
                     ", \"image\": \"" + loaded->image + "\", \"grid\": [" + std::to_string(grid.x) + ", " +
                     std::to_string(grid.y) + ", " + std::to_string(grid.z) + "], \"threads\": " +
                     std::to_string(config->blockDim.x) + ", \"shared\": " + std::to_string(config->dynamicSmemBytes) +
                     ", \"stream\": " + hex(config->stream) + ", \"arguments\": {";
  for (int i = 0; i < kernel.num_parameters; ++i)
    line += (i ? ", \"" : "\"") + std::string(kernel.parameters[i].name) + "\": " + shown(kernel.parameters[i], values[i]);
  write(line + "}}");
  return cudaSuccess;
}

}  // extern "C"
