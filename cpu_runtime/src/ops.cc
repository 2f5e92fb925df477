// The library that ONNX Runtime loads: the ops of domain `attnspan`.
#include "hash_op.h"
#include "lsh_op.h"
#include "merge_op.h"
#include "span_op.h"
#ifdef ATTNSPAN_ORT_CUDA  // libattnspan_ort_cuda.so: these ops and those of the CUDA provider in one domain
#include "ort_ops.h"
#endif

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
  static const std::vector<HashOp> hash{HashOp(DType::f32), HashOp(DType::f16), HashOp(DType::bf16)};
  static const std::vector<MergeOp> merge{MergeOp(DType::f32), MergeOp(DType::f16), MergeOp(DType::bf16)};
  static const Ort::CustomOpDomain domain = [] {
    Ort::CustomOpDomain d("attnspan");
    for (const SpanOp& op : span) d.Add(&op);
    for (const LshOp& op : lsh) d.Add(&op);
    for (const HashOp& op : hash) d.Add(&op);
    for (const MergeOp& op : merge) d.Add(&op);
#ifdef ATTNSPAN_ORT_CUDA
    attnspan::add_cuda_ops(d);
#endif
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

// Decode steps of a KV head of a row that had a guard since the last reset, and those of them that it made exact.
extern "C" __attribute__((visibility("default"))) void attnspan_lsh_guarded(int64_t* out2, int reset) {
  attnspan::lsh_guarded(out2, reset != 0);
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
