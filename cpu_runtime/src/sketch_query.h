// A query's side of sketches: its table of products, and how likely it draws what.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace attnspan {

// Probabilities follow e^(sharpness * estimated score): below 1, since the estimate errs.
constexpr float kSharpness = 0.85f;
// Least probability, as a share of the fraction to draw: no key goes unseen, and no weight grows without bound.
constexpr float kLeastShare = 0.0625f;
// Groups of 64 keys that the offset is found from, at most.
constexpr int64_t kOffsetGroups = 32;

struct SketchQuery {
  float step, offset;  // a sum of entries stands for step * sum + offset
};

// Fills table [pairs of dimensions, 16] for a rotated, scaled query [dim]; entries up to 63.
SketchQuery sketch_query(const float* query, int64_t dim, uint8_t* table);

// c such that the sum of min(1, max(floor, e^(y + c))) over y is about `wanted`. y: whole groups of any floats; what no key of good length gives is cut.
float sketch_offset(const float* y, int64_t count, double wanted, double floor);

// Logarithms of evenly spread thresholds, neighbours far apart; a group more than kThresholds, so that reading may start anywhere.
const std::vector<float>& log_thresholds();

}  // namespace attnspan
