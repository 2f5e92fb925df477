// From the logits of one row to its next token.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace attnspan {

struct Sampling {
  double temperature = 0;  // 0: the likeliest token
  int64_t top_k = 0;       // 0: all
  double top_p = 1;        // 1: all
  uint64_t seed = 0;

  // UserError for a value out of range.
  void check() const;
};

// Chooses the tokens of one row; rows draw from streams of their own.
class Sampler {
 public:
  Sampler(const Sampling& sampling, int64_t row);

  // logits [vocab]. std::runtime_error when they are not numbers.
  int64_t pick(const float* logits, int64_t vocab);

 private:
  Sampling how_;
  std::mt19937_64 random_;
  std::vector<float> weights_, sorted_;
};

// Sets to 0 the weights that top-k and top-p leave out; of equal weights at the border all stay. `scratch` is overwritten.
void keep_likely(std::vector<float>& weights, int64_t top_k, double top_p, std::vector<float>& scratch);

}  // namespace attnspan
