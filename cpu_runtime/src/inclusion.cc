#include "inclusion.h"

#include <algorithm>
#include <cmath>

namespace attnspan {
namespace {

// log P[Binomial(n, p) in [from, to]], p given by its logarithm and that of 1 - p.
double log_binomial(int64_t n, double log_p, double log_rest, int64_t from, int64_t to) {
  double top = -INFINITY, sum = 0;
  for (int64_t k = from; k <= to; ++k) {
    double term = std::lgamma(double(n + 1)) - std::lgamma(double(k + 1)) - std::lgamma(double(n - k + 1));
    if (k > 0) term += double(k) * log_p;
    if (k < n) term += double(n - k) * log_rest;
    if (term == -INFINITY) continue;
    if (term > top) sum = sum * std::exp(top - term), top = term;
    sum += std::exp(term - top);
  }
  return std::min(0.0, top + std::log(sum));
}

}  // namespace

std::vector<float> log_inclusion(const IndexConfig& config, int64_t max_hamming, float least) {
  const float low = std::max(kLeast, std::log(least));
  std::vector<float> out;
  for (int64_t i = 0; i <= kInclusion; ++i) {
    const double differ = 2.0 * std::asin(double(i) / double(kInclusion)) / M_PI;
    double u;
    if (config.kind == IndexKind::tables) {
      const double log_equal = double(config.bits) * std::log1p(-differ);
      u = log_binomial(config.tables, log_equal, std::log1p(-std::exp(log_equal)), config.min_collisions, config.tables);
    } else {
      u = log_binomial(config.signature_bits, std::log(differ), std::log1p(-differ), 0, max_hamming);
    }
    out.push_back(std::isnan(u) ? low : std::max(float(u), low));
  }
  return out;
}

}  // namespace attnspan
