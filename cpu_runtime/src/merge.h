// MergeAttention on the CPU: attention over all keys from attention over two parts of them, by log-sum-exp.
#pragma once

#include <cstdint>

#include "span.h"

namespace attnspan {

// Outputs [batch, tokens, heads * head_dim], lse [batch, heads, tokens]; merged_lse may be null. A part whose lse is -inf has no keys:
// its output is not read. Where neither has any: zeros and -inf.
struct MergeCall {
  int64_t batch, tokens, heads, head_dim;
  DType activation;
  const void* part[2];
  const float* part_lse[2];
  void* output;
  float* lse;
};

// Merges two parts of one query head: output [head_dim] in fp32, and its log-sum-exp. part: of type `type`; scratch [head_dim].
float merge_head(const Kernels& kernels, DType type, const void* const part[2], const float lse[2], int64_t dim, float* output,
                 float* scratch);

void merge_attention(const MergeCall& call, const Kernels& kernels, const Parallel& parallel);

}  // namespace attnspan
