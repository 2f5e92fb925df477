// The library that ONNX Runtime loads: the ops of domain `attnspan`.
#include "lsh_op.h"
#include "span_op.h"

namespace {

template <class Op>
std::vector<Op> for_all_types() {
  std::vector<Op> all;
  for (DType activation : {DType::f32, DType::f16, DType::bf16})
    for (DType cache : {DType::f32, DType::f16, DType::bf16, DType::i8}) all.emplace_back(activation, cache);
  return all;
}

const Ort::CustomOpDomain& ops() {
  // ONNX Runtime keeps pointers to these for as long as any session lives.
  static const std::vector<SpanOp> span = for_all_types<SpanOp>();
  static const std::vector<LshOp> lsh = for_all_types<LshOp>();
  static const Ort::CustomOpDomain domain = [] {
    Ort::CustomOpDomain d("attnspan");
    for (const SpanOp& op : span) d.Add(&op);
    for (const LshOp& op : lsh) d.Add(&op);
    return d;
  }();
  return domain;
}

}  // namespace

// Nanoseconds spent in LshAttention since the last reset, added over threads: hash, retrieve, attend, update. Zero unless
// ATTNSPAN_PROFILE is 1.
extern "C" __attribute__((visibility("default"))) void attnspan_lsh_profile(int64_t* out4, int reset) {
  attnspan::lsh_profile(out4, reset != 0);
}

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                              const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) {
    const OrtApi* oldest = base->GetApi(1);
    const std::string what = std::string("libattnspan_ort was built for ONNX Runtime 1.") + std::to_string(ORT_API_VERSION) +
                             " or newer; this is " + base->GetVersionString() + ". Upgrade with: pip install 'onnxruntime>=1.25'";
    return oldest->CreateStatus(ORT_NOT_IMPLEMENTED, what.c_str());
  }
  Ort::InitApi(api);
  try {
    Ort::UnownedSessionOptions(options).Add(ops());
    return nullptr;
  } catch (const Ort::Exception& e) {
    return api->CreateStatus(e.GetOrtErrorCode(), e.what());
  }
}
