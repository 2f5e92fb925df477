// The probability that hashing draws a key, as a function of its cosine with the query.
#pragma once

#include <cstdint>
#include <vector>

#include "index.h"

namespace attnspan {

// log u at kInclusion + 1 angles: point i is for sin(theta / 2) = i / kInclusion, so that small angles, where u turns from likely to
// certain, lie apart. Not below log(least), nor kLeast. Tables: at least min_collisions of `tables` codes are equal, each with
// probability p^bits, p = 1 - theta / pi (paper, equation 10). Signatures: at most max_hamming of the bits differ, each with
// probability theta / pi.
std::vector<float> log_inclusion(const IndexConfig& config, int64_t max_hamming, float least = 0.f);
constexpr float kLeast = -80.f;

}  // namespace attnspan
