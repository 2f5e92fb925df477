#include "sketch_query.h"

#include <algorithm>
#include <cmath>

namespace attnspan {
namespace {

constexpr float kLevel[4] = {-1.5104f, -0.4528f, 0.4528f, 1.5104f};
constexpr struct Levels {  // of a pair of dimensions, by its code
  float even[16], odd[16];
  constexpr Levels() : even(), odd() {
    for (int c = 0; c < 16; ++c) even[c] = kLevel[c & 3], odd[c] = kLevel[c >> 2];
  }
} kLevels;
constexpr float kTop = 63.f;  // four entries add up within a byte
constexpr float kMost = 1e6f;
constexpr int64_t kBins = 256;
constexpr double kRange = 24.0;  // nats below the largest score that the histogram tells apart

// e^-distance from the largest score, at the middle of a bin.
double bin_weight(int64_t i) {
  static const std::vector<double> table = [] {
    std::vector<double> w;
    for (int64_t k = 0; k < kBins; ++k) w.push_back(std::exp(-(double(k) + 0.5) * (kRange / double(kBins))));
    return w;
  }();
  return table[size_t(i)];
}

}  // namespace

const std::vector<float>& log_thresholds() {
  static const std::vector<float> table = [] {
    std::vector<float> t;
    for (int64_t i = 0; i < kThresholds + kGroup; ++i)
      t.push_back(float(std::log((double(i * kThresholdStep % kThresholds) + 0.5) / double(kThresholds))));
    return t;
  }();
  return table;
}

SketchQuery sketch_query(const float* q, int64_t dim, uint8_t* table) {
  const int64_t pairs = (dim + 3) / 4 * 2;
  const auto at = [&](int64_t d) { return d < dim ? q[d] : 0.f; };
  float largest = 0.f;
  double sum = 0.;
  for (int64_t n = 0; n < pairs; ++n) {
    const float most = kLevel[3] * (std::fabs(at(2 * n)) + std::fabs(at(2 * n + 1)));
    largest = std::max(largest, most);
    sum += double(most);
  }
  SketchQuery out;
  out.step = largest > 0.f ? 2.f * largest / kTop : 1.f;
  out.offset = -float(sum);
  const float inverse = 1.f / out.step;
  for (int64_t n = 0; n < pairs; ++n) {
    const float even = at(2 * n), odd = at(2 * n + 1), most = kLevel[3] * (std::fabs(even) + std::fabs(odd));
    int32_t entry[16];
    for (int c = 0; c < 16; ++c) {  // cut to whole numbers after adding a half: none is below 0
      const float value = (kLevels.even[c] * even + kLevels.odd[c] * odd + most) * inverse + 0.5f;
      entry[c] = int32_t(value < kTop ? value : kTop);
    }
    for (int c = 0; c < 16; ++c) table[n * 16 + c] = uint8_t(entry[c]);
  }
  return out;
}

float sketch_offset(const float* y, int64_t count, double wanted, double floor) {
  // A damaged buffer may hold factors that are no numbers.
  const auto sane = [](float v) { return v > -kMost ? std::min(v, kMost) : -kMost; };
  float top = -kMost;
  for (int64_t i = 0; i < count; ++i) top = std::max(top, sane(y[i]));
  int32_t bin[kBins] = {}, of[kGroup];
  for (int64_t first = 0; first < count; first += kGroup) {  // whole groups: two plain loops, of which the first becomes vectors
    for (int64_t i = 0; i < kGroup; ++i) of[i] = int32_t(std::min((top - sane(y[first + i])) * float(double(kBins) / kRange), float(kBins - 1)));
    for (int64_t i = 0; i < kGroup; ++i) ++bin[of[i]];
  }
  // Bins in order of falling weight: the first are drawn for certain, the last with the least probability; sums of what lies before.
  constexpr double width = kRange / double(kBins);
  double keys[kBins + 1] = {}, weights[kBins + 1] = {};
  for (int64_t i = 0; i < kBins; ++i) {
    keys[i + 1] = keys[i] + double(bin[i]);
    weights[i + 1] = weights[i] + double(bin[i]) * bin_weight(i);
  }
  const double log_floor = std::log(floor);
  double low = -10., high = kRange + 10.;
  for (int step = 0; step < 24; ++step) {
    const double c = (low + high) / 2;
    const auto at = [](double bin) { return int64_t(std::clamp(std::ceil(bin), 0., double(kBins))); };
    const int64_t sure = at(c / width - 0.5), least = std::max(sure, at((c - log_floor) / width - 0.5));
    const double drawn = keys[sure] + std::exp(c) * (weights[least] - weights[sure]) + floor * (keys[kBins] - keys[least]);
    (drawn < wanted ? low : high) = c;
  }
  return float((low + high) / 2 - double(top));
}

}  // namespace attnspan
