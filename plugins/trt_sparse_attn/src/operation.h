// What each op does on the GPU: which kernels, with which arguments and grids. Sizes and pointers in, launches out; no TensorRT.
#pragma once

#include <memory>

#include "launch.h"

namespace attnspan {

// One node at run time. Inputs and outputs are device pointers in the order of the op's table.
class Operation {
 public:
  virtual ~Operation() = default;

  // Bytes of scratch memory that `run` takes for `batch` rows or fewer. An engine fixes them when it is built, and one that was
  // built with the plugin in Python runs with this one: they are the same in both.
  virtual size_t workspace(int64_t batch, int64_t dim) const;
  // Loads the kernels for the current device, where not done yet. types: the inputs', NumPy's names; dim: elements of a head.
  virtual void prepare(const std::vector<std::string>& types, int64_t dim) = 0;
  // Enqueues the work of [batch, tokens] on the stream, after `prepare`. Does not wait for it, nor allocate.
  virtual void run(const void* const* inputs, void* const* outputs, int64_t batch, int64_t tokens, void* workspace,
                   cudaStream_t stream) const = 0;
};

// The operation of a node, whose attributes were checked by attributes_of. building: a builder runs it, which times plugins on
// whatever its buffers hold: lengths of the kind would reach memory of others, and zeros are read instead.
std::unique_ptr<Operation> make_operation(const schema::Op& op, const Attributes& attributes, bool building);
std::unique_ptr<Operation> make_span_attention(const Attributes& attributes, bool building);

// Error unless the pointers are given, and multiples of 16 bytes as kernels assume. names: of the ports.
void check_pointers(const schema::Op& op, const schema::Port* ports, const void* const* pointers, int count);

// Part of a variant's name: "fp16_d64", "bf16_fp8_d128".
std::string suffix_of(const std::string& type, bool fp8, int64_t dim);

}  // namespace attnspan
