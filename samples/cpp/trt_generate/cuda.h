// CUDA's runtime with errors as exceptions and memory that frees itself.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "error.h"

namespace attnspan {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

struct FreeDevice {
  void operator()(void* data) const { cudaFree(data); }
};
struct FreeHost {
  void operator()(void* data) const { cudaFreeHost(data); }
};

using DeviceMemory = std::unique_ptr<void, FreeDevice>;
using PinnedMemory = std::unique_ptr<void, FreeHost>;

// Zeros on the device. UserError when there is no room.
inline DeviceMemory device_zeros(size_t bytes, const char* what) {
  void* data = nullptr;
  if (cudaMalloc(&data, bytes > 0 ? bytes : 1) != cudaSuccess) {
    cudaGetLastError();  // it is told here
    throw UserError("not enough GPU memory for " + std::string(what) + " of " + std::to_string(bytes) +
                    " bytes: give fewer prompts, or export with a smaller --n-max or --density");
  }
  DeviceMemory memory(data);
  check(cudaMemset(data, 0, bytes), "cudaMemset");
  return memory;
}

// Memory of the CPU that copies in a stream can use.
inline PinnedMemory pinned_zeros(size_t bytes) {
  void* data = nullptr;
  check(cudaMallocHost(&data, bytes), "cudaMallocHost");
  for (size_t i = 0; i < bytes; ++i) static_cast<char*>(data)[i] = 0;
  return PinnedMemory(data);
}

}  // namespace attnspan
