#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "error.h"

namespace attnspan {

void Sampling::check() const {
  if (!(temperature >= 0 && temperature <= 100)) throw UserError("temperature must be from 0 to 100; change --temperature");
  if (top_k < 0) throw UserError("top_k is " + std::to_string(top_k) + ": must be 0 or more; change --top-k");
  if (!(top_p > 0 && top_p <= 1)) throw UserError("top_p must be above 0 and at most 1; change --top-p");
}

Sampler::Sampler(const Sampling& sampling, int64_t row) : how_(sampling) {
  std::seed_seq seed{static_cast<uint32_t>(sampling.seed), static_cast<uint32_t>(sampling.seed >> 32),
                     static_cast<uint32_t>(row)};
  random_.seed(seed);
}

int64_t Sampler::pick(const float* logits, int64_t vocab) {
  const float* best = std::max_element(logits, logits + vocab);
  const bool missing = std::any_of(logits, logits + vocab, [](float x) { return std::isnan(x); });
  if (missing || !std::isfinite(*best))
    throw std::runtime_error("the model produced no usable logits: infinite, or not a number");
  if (how_.temperature == 0) return best - logits;
  weights_.resize(static_cast<size_t>(vocab));
  // A tiny one leaves the best alone; as a float it must not become 0 itself.
  const float temperature = std::max(static_cast<float>(how_.temperature), std::numeric_limits<float>::min());
  for (int64_t i = 0; i < vocab; ++i) weights_[static_cast<size_t>(i)] = std::exp((logits[i] - *best) / temperature);
  keep_likely(weights_, how_.top_k, how_.top_p, sorted_);
  double total = 0;
  for (const float weight : weights_) total += weight;
  const double drawn = std::uniform_real_distribution<double>(0, total)(random_);
  double reached = 0;
  int64_t last = best - logits;
  for (int64_t i = 0; i < vocab; ++i) {
    const float weight = weights_[static_cast<size_t>(i)];
    if (weight == 0) continue;
    last = i;
    if ((reached += weight) > drawn) break;
  }
  return last;
}

void keep_likely(std::vector<float>& weights, int64_t top_k, double top_p, std::vector<float>& scratch) {
  const auto cut = [&](float least) {
    for (float& weight : weights)
      if (weight < least) weight = 0;
  };
  if (top_k > 0 && top_k < static_cast<int64_t>(weights.size())) {
    scratch = weights;
    std::nth_element(scratch.begin(), scratch.begin() + (top_k - 1), scratch.end(), std::greater<>());
    cut(scratch[static_cast<size_t>(top_k - 1)]);
  }
  if (top_p < 1) {
    scratch = weights;
    std::sort(scratch.begin(), scratch.end(), std::greater<>());
    double total = 0, reached = 0;
    for (const float weight : scratch) total += weight;
    for (const float weight : scratch) {
      reached += weight;
      if (reached >= top_p * total) {  // the token that crosses top_p stays
        cut(weight);
        break;
      }
    }
  }
}

}  // namespace attnspan
