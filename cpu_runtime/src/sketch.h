// Sketches of keys: two bits a dimension and a factor, from which a query estimates its score with every key.
//
// Keys are encoded W at a time with a dimension to a vector, so that transforms and sums run down the lanes. Scores come from tables of
// products, one for each two dimensions, with entries of six bits: four of them add up within a byte.
#pragma once

#include <type_traits>

#include "hash.h"
#include "kernels.h"
#include "simd.h"

namespace {

// Turns W vectors at random, x as [dim, W]: signs flipped, a Hadamard transform of the first or the last `size` dimensions, four times.
ATTNSPAN_INLINE void rotate_lanes(float* x, int64_t dim, int64_t size, const float* signs) {
  const float scale = 1.f / std::sqrt(float(size));
  for (int64_t r = 0; r < attnspan::kRounds; ++r) {
    for (int64_t d = 0; d < dim; ++d) store(x + d * W, load(x + d * W) * splat(signs[d * attnspan::kRounds + r]));
    float* part = x + (r % 2 ? dim - size : 0) * W;
    for (int64_t half = 1; half < size; half *= 2)
      for (int64_t at = 0; at < size; at += 2 * half)
        for (int64_t d = at; d < at + half; ++d) {
          const vf a = load(part + d * W), b = load(part + (d + half) * W);
          store(part + d * W, a + b);
          store(part + (d + half) * W, a - b);
        }
    for (int64_t d = 0; d < size; ++d) store(part + d * W, load(part + d * W) * splat(scale));
  }
}

ATTNSPAN_INLINE int64_t largest_power(int64_t dim) {
  int64_t size = 1;
  while (2 * size <= dim) size *= 2;
  return size;
}

void rotate_any(const attnspan::RotateTask& task) {
  const int64_t size = largest_power(task.dim);
  float* x = task.scratch;
  for (int64_t first = 0; first < task.rows; first += W) {
    const int64_t count = task.rows - first < W ? task.rows - first : W;
    std::memset(x, 0, size_t(task.dim * W * 4));
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < task.dim; ++d) x[d * W + i] = task.x[(first + i) * task.dim + d];
    rotate_lanes(x, task.dim, size, task.signs);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < task.dim; ++d) task.x[(first + i) * task.dim + d] = x[d * W + i];
  }
}

// Levels of a normal variable that lose least (Lloyd, Max), and the edge between them.
constexpr float kInner = 0.4528f, kOuter = 1.5104f, kEdge = 0.9816f;

void encode_any(const attnspan::EncodeTask& task) {
  const int64_t dim = task.rotate.dim, size = largest_power(dim), planes = (dim + 3) / 4;
  float* x = task.rotate.scratch;
  for (int64_t first = 0; first < task.rotate.rows; first += W) {
    const int64_t count = task.rotate.rows - first < W ? task.rotate.rows - first : W;
    std::memset(x, 0, size_t(dim * W * 4));
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < dim; ++d) x[d * W + i] = task.rotate.x[(first + i) * dim + d];
    rotate_lanes(x, dim, size, task.rotate.signs);
    vf square = splat(0.f), product = splat(0.f);
    for (int64_t d = 0; d < dim; ++d) square += load(x + d * W) * load(x + d * W);
    float squares[W], unit[W], factor[W], products[W];
    store(squares, square);
    for (int i = 0; i < W; ++i) unit[i] = squares[i] > 0.f ? float(std::sqrt(double(dim) / double(squares[i]))) : 1.f;
    const vf units = load(unit);
    for (int64_t p = 0; p < planes; ++p) {
      vi code{};
      for (int64_t j = 0; j < 4 && 4 * p + j < dim; ++j) {
        const vf v = load(x + (4 * p + j) * W), u = v * units;
        const vi above = u > splat(0.f);  // all bits
        const vi far = above ? u > splat(kEdge) : u < splat(-kEdge);
        code |= ((above & (2 - far)) | (~above & (1 + far))) << int(2 * j);  // 3 2 | 1 0
        const vf level = far ? splat(kOuter) : splat(kInner);
        product += v * (above ? level : -level);
      }
      for (int64_t i = 0; i < count; ++i) task.codes[(first + i) * task.stride + p] = uint8_t(code[i]);
    }
    store(products, product);
    for (int64_t i = 0; i < count; ++i) {
      factor[i] = squares[i] > 0.f ? squares[i] / (products[i] > 0.f ? products[i] : 1.f) : 0.f;
      bf16 rounded;
      from_float(factor[i], rounded);
      std::memcpy(task.codes + (first + i) * task.stride + planes, &rounded, 2);
    }
  }
}

constexpr int64_t kAhead = 4;  // blocks that are asked for before they are needed

// Sums of table entries of B groups of 64 tokens for G heads, asking for what lies `ahead` bytes ahead. A block holds `planes` rows of 64 bytes, each byte the codes of four dimensions.
#if defined(__AVX512BW__)

// Two blocks share each load of a table.
constexpr int kBlocks = 2;

template <int G, int B>
ATTNSPAN_INLINE void sum_entries(const uint8_t* block, int64_t planes, const uint8_t* table, int64_t ahead,
                                 float (*sum)[G][64]) {
  const __m512i low = _mm512_set1_epi8(15);
  const int64_t head = planes * 32, next = attnspan::sketch_block(planes);
  __m512i all[B][G], odd[B][G];  // 16-bit sums of both bytes, the odd one times 256, and of the odd ones alone
  for (int b = 0; b < B; ++b)
    for (int g = 0; g < G; ++g) all[b][g] = odd[b][g] = _mm512_setzero_si512();
  const auto entry = [](const uint8_t* t) { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(t))); };
  const auto add = [&](int64_t p, auto rows) {
    constexpr int R = decltype(rows)::value;
    __m512i code[B][2 * R];
    for (int b = 0; b < B; ++b)
      for (int r = 0; r < R; ++r) {
        const uint8_t* row = block + b * next + (p + r) * 64;
        __builtin_prefetch(row + ahead);
        const __m512i bytes = _mm512_loadu_si512(row);
        code[b][2 * r] = _mm512_and_si512(bytes, low);
        code[b][2 * r + 1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
      }
    for (int g = 0; g < G; ++g) {
      __m512i v[B];
      for (int r = 0; r < 2 * R; ++r) {
        const __m512i t = entry(table + g * head + p * 32 + r * 16);
        for (int b = 0; b < B; ++b) {
          const __m512i found = _mm512_shuffle_epi8(t, code[b][r]);
          v[b] = r == 0 ? found : _mm512_add_epi8(v[b], found);
        }
      }
      for (int b = 0; b < B; ++b) {
        all[b][g] = _mm512_add_epi16(all[b][g], v[b]);
        odd[b][g] = _mm512_add_epi16(odd[b][g], _mm512_srli_epi16(v[b], 8));
      }
    }
  };
  int64_t p = 0;
  for (; p + 2 <= planes; p += 2) add(p, std::integral_constant<int, 2>());
  if (p < planes) add(p, std::integral_constant<int, 1>());
  alignas(64) static constexpr struct Order {
    uint16_t of[64];
    constexpr Order() : of() {
      for (int i = 0; i < 64; ++i) of[i] = uint16_t(i / 2 + i % 2 * 32);
    }
  } order;
  const __m512i first = _mm512_load_si512(order.of), second = _mm512_load_si512(order.of + 32);
  for (int b = 0; b < B; ++b)
    for (int g = 0; g < G; ++g) {
      const __m512i even = _mm512_sub_epi16(all[b][g], _mm512_slli_epi16(odd[b][g], 8));
      const __m512i half[2] = {_mm512_permutex2var_epi16(even, first, odd[b][g]), _mm512_permutex2var_epi16(even, second, odd[b][g])};
      for (int i = 0; i < 2; ++i) {
        _mm512_storeu_ps(sum[b][g] + i * 32, _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(half[i]))));
        _mm512_storeu_ps(sum[b][g] + i * 32 + 16, _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(half[i], 1))));
      }
    }
}

#elif defined(__AVX2__)

constexpr int kBlocks = 1;

template <int G, int B>
ATTNSPAN_INLINE void sum_entries(const uint8_t* block, int64_t planes, const uint8_t* table, int64_t, float (*sum)[G][64]) {
  static_assert(B == 1);
  const __m256i low = _mm256_set1_epi8(15), even = _mm256_set1_epi16(255);
  for (int side = 0; side < 2; ++side)
    for (int g = 0; g < G; ++g) {
      __m256i evens = _mm256_setzero_si256(), odds = evens;
      for (int64_t p = 0; p < planes; ++p) {
        const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + p * 64 + side * 32));
        const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table + g * planes * 32 + p * 32));
        const __m256i v = _mm256_add_epi8(
            _mm256_shuffle_epi8(_mm256_permute2x128_si256(pair, pair, 0x00), _mm256_and_si256(code, low)),
            _mm256_shuffle_epi8(_mm256_permute2x128_si256(pair, pair, 0x11), _mm256_and_si256(_mm256_srli_epi16(code, 4), low)));
        evens = _mm256_add_epi16(evens, _mm256_and_si256(v, even));
        odds = _mm256_add_epi16(odds, _mm256_srli_epi16(v, 8));
      }
      alignas(32) uint16_t e[16], o[16];
      _mm256_store_si256(reinterpret_cast<__m256i*>(e), evens);
      _mm256_store_si256(reinterpret_cast<__m256i*>(o), odds);
      for (int i = 0; i < 16; ++i) sum[0][g][side * 32 + 2 * i] = e[i], sum[0][g][side * 32 + 2 * i + 1] = o[i];
    }
}

#else

constexpr int kBlocks = 1;

template <int G, int B>
ATTNSPAN_INLINE void sum_entries(const uint8_t* block, int64_t planes, const uint8_t* table, int64_t, float (*sum)[G][64]) {
  static_assert(B == 1);
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < 64; ++i) {
      int32_t s = 0;
      for (int64_t p = 0; p < planes; ++p) {
        const uint8_t code = block[p * 64 + i], *t = table + (g * planes + p) * 32;
        s += t[code & 15] + t[16 + (code >> 4)];
      }
      sum[0][g][i] = float(s);
    }
}

#endif

template <int G, int B>
ATTNSPAN_INLINE void score_blocks(const attnspan::SketchTask& task, int64_t first) {
  const uint8_t* block = task.blocks + first * attnspan::sketch_block(task.planes);
  alignas(64) float sum[B][G][64];
  const int64_t ahead = first + B + kAhead <= task.groups ? kAhead * attnspan::sketch_block(task.planes) : 0;
  sum_entries<G, B>(block, task.planes, task.table, ahead, sum);
  for (int b = 0; b < B; ++b) {
    const bf16* factor = reinterpret_cast<const bf16*>(block + b * attnspan::sketch_block(task.planes) + task.planes * 64);
    for (int t = 0; t < 64; t += W) {
      const vf f = load(factor + t);
      for (int g = 0; g < G; ++g)
        store(task.out + (g * task.groups + first + b) * 64 + t,
              f * (load(sum[b][g] + t) * splat(task.step[g]) + splat(task.offset[g])) + splat(task.bias[g]));
    }
  }
}

template <int G>
void score_groups(const attnspan::SketchTask& task) {
  int64_t i = 0;
  for (; i + kBlocks <= task.groups; i += kBlocks) score_blocks<G, kBlocks>(task, i);
  for (; i < task.groups; ++i) score_blocks<G, 1>(task, i);
}

void score_any(const attnspan::SketchTask& task) {
  switch (task.heads) {
    case 1: return score_groups<1>(task);
    case 2: return score_groups<2>(task);
    case 3: return score_groups<3>(task);
    default: return score_groups<4>(task);
  }
}

int64_t draw_any(const attnspan::DrawTask& task) {
  const vf floor = splat(task.floor), zero = splat(0.f);
  int64_t count = 0;
  for (int64_t g = 0; g < task.groups; ++g) {
    const int64_t first = (task.first_group + g) * 64;
    const float* threshold = task.thresholds + attnspan::threshold_start(task.seed, task.first_group + g);
    for (int64_t t = 0; t < 64; t += W) {
      vf log_p = max(load(task.scores + g * 64 + t), floor);
      log_p = log_p < zero ? log_p : zero;
      uint32_t drawn = positive(log_p - load(threshold + t));
      if (drawn == 0) continue;
      float p[W];
      store(p, log_p);
      for (; drawn; drawn &= drawn - 1) {
        const int lane = __builtin_ctz(drawn);
        const int64_t token = first + t + lane;
        if (token < task.from || token >= task.to) continue;
        task.id[count] = int32_t(token);
        task.log_p[count++] = p[lane];
      }
    }
  }
  return count;
}

}  // namespace
