// The C++ core without ONNX Runtime: its ops against naive loops over positions, on several threads, meant to run under
// AddressSanitizer and UndefinedBehaviorSanitizer (cmake -DATTNSPAN_TESTS=ON -DATTNSPAN_SANITIZE=ON). Buffers have exactly the size
// they need, so that one element too far is caught.
#include <cmath>
#include <map>
#include <string>

#include "check.h"
#include "lsh_test.h"
#include "span.h"

using namespace attnspan;

namespace {

// One sequence fed in chunks. The oracle keeps every token ever seen, in a map by position, and never heard of slots.
void sequence(const Kernels& kernels, DType cache, int64_t heads, std::vector<int64_t> capacity, int64_t dim, int64_t sink,
              std::vector<int64_t> chunks, float softcap) {
  SpanConfig config;
  config.heads = heads, config.kv_heads = int64_t(capacity.size()), config.capacity = capacity, config.sink = sink;
  config.softcap = softcap;
  expect(config.check().empty(), "configuration");
  const int64_t kv = config.kv_heads, group = heads / kv, slots = config.offset().back(), size = size_of(cache);
  std::vector<char> past_key(size_t(slots * dim * size)), past_value(past_key.size());
  const std::vector<float> scales(size_t(kv), 0.04f);
  struct Token {
    std::vector<float> key, value;
  };
  std::vector<std::map<int64_t, Token>> seen(static_cast<size_t>(kv));
  int32_t length = 0;
  for (const int64_t tokens : chunks) {
    const auto query = normal(tokens * heads * dim), key = normal(tokens * kv * dim), value = normal(tokens * kv * dim);
    std::vector<float> output(query.size()), lse(size_t(heads * tokens));
    std::vector<int32_t> span;
    for (int64_t c : capacity) span.push_back(int32_t(sink + 1 + random_bits() % uint64_t(c - sink)));
    SpanCall call{};
    call.batch = 1, call.tokens = tokens, call.head_dim = dim, call.activation = DType::f32, call.cache = cache;
    call.query = query.data(), call.key = key.data(), call.value = value.data();
    call.past_key = past_key.data(), call.past_value = past_value.data();
    call.length = &length, call.span = span.data(), call.output = output.data(), call.lse = lse.data();
    if (cache == DType::i8) call.key_scale = call.value_scale = scales.data();
    expect(check_call(config, call).empty(), "call");
    span_attention(config, call, kernels, {run_threads, nullptr});

    const float scale = cache == DType::i8 ? 0.04f : 1.f;
    const auto stored = [&](const float* x) {
      std::vector<float> back(static_cast<size_t>(dim));
      std::vector<char> bytes(size_t(dim * size));
      kernels.store(cache, x, scale, bytes.data(), dim);
      kernels.load(cache, bytes.data(), scale, back.data(), dim);
      return back;
    };
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < kv; ++h)
        seen[size_t(h)][length + t] = {stored(&key[size_t((t * kv + h) * dim)]), stored(&value[size_t((t * kv + h) * dim)])};
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t h = head / group, at = length + t;
        double top = -INFINITY, sum = 0;
        std::vector<double> out(size_t(dim), 0.0);
        std::vector<std::pair<double, const Token*>> scores;
        for (const auto& [p, token] : seen[size_t(h)]) {
          if (p > at || (p >= sink && at - p >= span[size_t(h)] - sink)) continue;
          double s = 0;
          for (int64_t d = 0; d < dim; ++d) s += double(query[size_t((t * heads + head) * dim + d)]) * double(token.key[size_t(d)]);
          s /= std::sqrt(double(dim));
          if (softcap != 0.f) s = softcap * std::tanh(s / softcap);
          scores.emplace_back(s, &token);
          top = std::max(top, s);
        }
        for (const auto& [s, token] : scores) {
          sum += std::exp(s - top);
          for (int64_t d = 0; d < dim; ++d) out[size_t(d)] += std::exp(s - top) * double(token->value[size_t(d)]);
        }
        const double want_lse = top + std::log(sum), got_lse = double(lse[size_t(head * tokens + t)]);
        expect(std::abs(got_lse - want_lse) < 1e-4, "lse", got_lse, want_lse);
        for (int64_t d = 0; d < dim; ++d) {
          const double got = double(output[size_t((t * heads + head) * dim + d)]), want = out[size_t(d)] / sum;
          expect(std::abs(got - want) < 5e-5, "output", got, want);
        }
      }
    length += int32_t(tokens);
  }
}

void conversions(const Kernels& kernels) {
  // Every finite half and bfloat16 survives a round trip through float.
  for (const DType type : {DType::f16, DType::bf16})
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      const uint16_t in = uint16_t(bits);
      uint16_t out = 0;
      float wide = 0;
      kernels.load(type, &in, 1.f, &wide, 1);
      kernels.store(type, &wide, 1.f, &out, 1);
      if (!std::isnan(wide)) expect(in == out, "16-bit round trip", out, in);
    }
  const float ties[] = {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 126.5f, 127.5f, -200.f, 1e9f};
  const int8_t want[] = {0, 2, 2, 0, -2, 126, 127, -127, 127};
  int8_t got[9];
  kernels.store(DType::i8, ties, 1.f, got, 9);
  for (int i = 0; i < 9; ++i) expect(got[i] == want[i], "int8 rounding", got[i], want[i]);
}

}  // namespace

int main() {
  const char* names = nullptr;
  expect(select_kernels("no such set", &names) == nullptr, "an unknown instruction set is refused");
  std::printf("instruction sets: %s\n", names);
  std::string list = names;
  for (size_t start = 0; start < list.size();) {
    const size_t end = std::min(list.find(' ', start), list.size());
    const Kernels& kernels = *select_kernels(list.substr(start, end - start).c_str(), nullptr);
    start = end + 1;
    conversions(kernels);
    lsh_tests(kernels);
    for (const DType cache : {DType::f32, DType::f16, DType::bf16, DType::i8}) {
      sequence(kernels, cache, 4, {70, 97}, 24, 8, {1, 1, 5, 64, 65, 1, 1, 1, 130, 1, 3, 1}, 0.f);
      sequence(kernels, cache, 3, {9}, 8, 8, {1, 7, 1, 1, 2, 40, 1}, 2.f);
      sequence(kernels, cache, 5, {600}, 16, 0, {555, 1, 44, 1, 1, 1, 1}, 0.f);
      sequence(kernels, cache, 2, {100}, 64, 8, {70, 1, 65, 33, 2}, 0.f);  // multiples of 32: matrix units
      sequence(kernels, cache, 3, {300}, 32, 64, {200, 129, 64}, 3.f);
    }
  }
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}
