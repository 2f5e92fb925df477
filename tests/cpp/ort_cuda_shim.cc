// The ops of ort_ops.cc alone, for ONNX Runtime to load; built with ATTNSPAN_ORT_PROVIDER as the CPU's, it runs them on host memory.
#include "ort_ops.h"

extern "C" OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  Ort::InitApi(base->GetApi(ORT_API_VERSION));
  static Ort::CustomOpDomain& domain = *new Ort::CustomOpDomain([] {
    Ort::CustomOpDomain made("attnspan");
    attnspan::add_cuda_ops(made);
    return made;
  }());
  Ort::UnownedSessionOptions(options).Add(domain);
  return nullptr;
}
