// The ops of the table in plugin_schema.h for ONNX Runtime's CUDA execution provider. No TensorRT.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

namespace attnspan {

// Adds them to a domain that has the ops for CPUs already: ONNX Runtime takes types and shapes from the first op of a name, and
// refuses a second library with ops of the same domain.
void add_cuda_ops(Ort::CustomOpDomain& domain);

}  // namespace attnspan
