// LshHash on the CPU: what vectors are hashed to, as LshAttention draws keys by.
#pragma once

#include <cstdint>

#include "lsh.h"

namespace attnspan {

// x [batch, tokens, heads * head_dim]; mean [batch, heads, head_dim], or null for zeros; codes [batch, tokens, heads, words], words of
// 32 bits: those of a signature, or the 16-bit codes of tables, one after another.
struct CodesCall {
  int64_t batch, tokens, heads;
  DType activation;
  const void* x;
  const float* mean;
  void* codes;
};

// 32-bit words of a vector.
inline int64_t code_words(const IndexConfig& index) {
  return index.kind == IndexKind::tables ? index.tables / 2 : index.signature_bits / 32;
}

// Cuts the codes of all tables, [tables], out of the bits of a vector.
void cut_codes(const IndexConfig& index, const uint64_t* bits, uint16_t* codes);

void hash_codes(const CodesCall& call, const IndexConfig& index, const LshTables& tables, const Kernels& kernels, const Parallel& parallel);

}  // namespace attnspan
