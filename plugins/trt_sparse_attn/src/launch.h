// Ahead-of-time kernels found, loaded and launched by the CUDA runtime alone: no TensorRT, no libcuda.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "attnspan_kernels.h"
#include "node.h"

namespace attnspan {

// Error that names the call and what the runtime says, unless it succeeded.
void check(cudaError_t status, const char* call);

struct Device {
  int ordinal = -1;
  int capability = 0;  // compute capability x 10
  int multiprocessors = 0;
  size_t shared_limit = 0;  // bytes of shared memory that a block can ask for
};

// The current device. Error where there is none.
Device current_device();

// A member of a struct of arguments. type: "*" for device pointers, "i32" or "fp32", as AttnspanParameter spells them.
struct Field {
  const char* name;
  const char* type;
  size_t at;
};

// One kernel on one device. The struct of arguments that `launch` takes has a member for each parameter of the kernel; the order
// of parameters is the table's, so that kernels may change theirs.
class Kernel {
 public:
  Kernel() = default;
  // Loads `variant`. Error when no code in the library runs on the device, or a parameter has no member.
  Kernel(const std::string& variant, const Device& device, const std::vector<Field>& fields);

  // A compile-time value, such as a block size. Error where the kernel has none of that name.
  int64_t constant(const char* name) const;
  // Launches on the device that the kernel was loaded for; an empty grid is nothing to do.
  void launch(const void* arguments, int64_t x, int64_t y, cudaStream_t stream) const;

 private:
  const AttnspanKernel* kernel_ = nullptr;
  cudaKernel_t handle_ = nullptr;
  std::vector<size_t> at_;  // of each parameter, in the struct of arguments
};

// What distinguishes the kernels in this library from those of another build: 16 hexadecimal digits.
const std::string& kernels_digest();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Error unless the value fits the 32 bits that kernels take.
int32_t narrow(int64_t value, const char* what);

}  // namespace attnspan
