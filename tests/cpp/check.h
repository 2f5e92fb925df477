// What the tests of the core share: counted checks, a pool of two threads, random numbers.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

namespace {

int failures = 0, checks = 0;

inline void expect(bool good, const char* what, double got = 0, double want = 0) {
  ++checks;
  if (good) return;
  ++failures;
  std::printf("FAILED: %s (got %g, want %g)\n", what, got, want);
}

inline void run_threads(void*, int64_t count, void (*body)(void*, int64_t), void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next++) < count;) body(context, i);
  };
  std::thread other(work);
  work();
  other.join();
}

std::mt19937 random_bits(1);

inline std::vector<float> normal(int64_t n) {
  std::normal_distribution<float> d;
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = d(random_bits);
  return v;
}

}  // namespace
