// Which keys a query draws: a scan over packed signatures, or a walk through hash tables. Both answer with a mask of bits.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

#if defined(__AVX512VPOPCNTDQ__)

template <int WORDS>
void scan_words(const attnspan::ScanTask& task) {
  __m512i query[WORDS];
  for (int w = 0; w < WORDS; ++w) query[w] = _mm512_set1_epi64(int64_t(task.query[w]));
  const __m512i most = _mm512_set1_epi64(task.max_hamming);
  const uint64_t* p = task.signatures;
  for (int64_t g = 0; g < task.groups; ++g) {
    uint64_t mask = 0;
    for (int block = 0; block < 8; ++block, p += WORDS * attnspan::kLanes) {
      __m512i distance = _mm512_popcnt_epi64(_mm512_xor_si512(_mm512_loadu_si512(p), query[0]));
      for (int w = 1; w < WORDS; ++w) {
        const __m512i word = _mm512_loadu_si512(p + w * attnspan::kLanes);
        distance = _mm512_add_epi64(distance, _mm512_popcnt_epi64(_mm512_xor_si512(word, query[w])));
      }
      mask |= uint64_t(_mm512_cmple_epu64_mask(distance, most)) << (8 * block);
    }
    task.mask[g] = mask;
  }
}

#elif defined(__AVX2__)

// Bits set in each byte, from a table of nibbles.
ATTNSPAN_INLINE __m256i count_bytes(__m256i v) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(v, low)),
                         _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low)));
}

template <int WORDS>
void scan_words(const attnspan::ScanTask& task) {
  __m256i query[WORDS];
  for (int w = 0; w < WORDS; ++w) query[w] = _mm256_set1_epi64x(int64_t(task.query[w]));
  const __m256i above = _mm256_set1_epi64x(task.max_hamming + 1);
  const uint64_t* p = task.signatures;
  for (int64_t g = 0; g < task.groups; ++g) {
    uint64_t mask = 0;
    for (int block = 0; block < 8; ++block, p += WORDS * attnspan::kLanes)
      for (int half = 0; half < 2; ++half) {
        __m256i bytes = _mm256_setzero_si256();  // at most 8 a word: four words stay below 256
        for (int w = 0; w < WORDS; ++w) {
          const void* at = p + w * attnspan::kLanes + half * 4;
          bytes = _mm256_add_epi8(bytes, count_bytes(_mm256_xor_si256(_mm256_loadu_si256(static_cast<const __m256i*>(at)), query[w])));
        }
        const __m256i distance = _mm256_sad_epu8(bytes, _mm256_setzero_si256());
        const int drawn = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(above, distance)));
        mask |= uint64_t(drawn) << (8 * block + 4 * half);
      }
    task.mask[g] = mask;
  }
}

#else

template <int WORDS>
void scan_words(const attnspan::ScanTask& task) {
  const uint64_t* p = task.signatures;
  for (int64_t g = 0; g < task.groups; ++g) {
    uint64_t mask = 0;
    for (int i = 0; i < 64; ++i) {
      int64_t distance = 0;
      for (int w = 0; w < WORDS; ++w)
        distance += __builtin_popcountll(p[(i / 8 * WORDS + w) * attnspan::kLanes + i % 8] ^ task.query[w]);
      mask |= uint64_t(distance <= task.max_hamming) << i;
    }
    task.mask[g] = mask;
    p += WORDS * attnspan::kGroup;
  }
}

#endif

void scan_any(const attnspan::ScanTask& task) {
  switch (task.words) {
    case 1: return scan_words<1>(task);
    case 2: return scan_words<2>(task);
    default: return scan_words<4>(task);
  }
}

// count[i] += (codes[i] == code), for tokens that no bucket holds yet.
ATTNSPAN_INLINE void count_equal(const uint16_t* codes, int64_t tokens, uint16_t code, uint8_t* count) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  const __m512i wanted = _mm512_set1_epi16(int16_t(code));
  const __m512i one = _mm512_set1_epi8(1);
  for (; i + 64 <= tokens; i += 64) {
    const uint64_t low = _mm512_cmpeq_epi16_mask(_mm512_loadu_si512(codes + i), wanted);
    const uint64_t high = _mm512_cmpeq_epi16_mask(_mm512_loadu_si512(codes + i + 32), wanted);
    const __mmask64 equal = low | high << 32;
    if (equal == 0) continue;
    _mm512_storeu_si512(count + i, _mm512_mask_add_epi8(_mm512_loadu_si512(count + i), equal, _mm512_loadu_si512(count + i), one));
  }
#endif
  for (; i < tokens; ++i) count[i] = uint8_t(count[i] + (codes[i] == code));
}

// Tables after which counts are cut to kEnough, so that none of them passes 255.
constexpr int64_t kBatch = 240;
constexpr uint8_t kEnough = 8;

// ++count[id] of each of `size` ids.
ATTNSPAN_INLINE void count_ids(const uint16_t* ids, int64_t size, uint8_t* count) {
  int64_t i = 0;
  for (; i + 4 <= size; i += 4) {
    uint64_t four;  // one load for four ids
    std::memcpy(&four, ids + i, 8);
    ++count[four & 0xffff];
    ++count[four >> 16 & 0xffff];
    ++count[four >> 32 & 0xffff];
    ++count[four >> 48];
  }
  for (; i < size; ++i) ++count[ids[i]];
}

// Buckets are copied behind one another first and counted afterwards: counting waits for its own stores, and while it does so between
// two buckets, fewer of them are fetched at a time.
bool walk_any(const attnspan::WalkTask& task) {
  constexpr int64_t kStartAhead = 32, kIdsAhead = 8;  // tables: far enough for memory, few enough for the requests that a core can have
  const int64_t padded = (task.tokens + attnspan::kGroup - 1) / attnspan::kGroup * attnspan::kGroup;
  std::memset(task.count, 0, size_t(padded));
  const auto start = [&](int64_t l) { return task.start + l * (task.buckets + 1) + task.code[l]; };
  // 65536 is stored as 0: only the end of a whole segment is.
  const auto end_of = [&](int64_t l) { return start(l)[1] + (start(l)[1] < start(l)[0] ? attnspan::kSegment : 0); };
  int64_t listed = 0;
  const auto count_listed = [&] {
    count_ids(task.list, listed, task.count);
    listed = 0;
  };
  for (int64_t l = 0; l < kStartAhead && l < task.tables; ++l) __builtin_prefetch(start(l));
  for (int64_t l = 0; l < task.tables; ++l) {
    if (l + kStartAhead < task.tables) __builtin_prefetch(start(l + kStartAhead));
    if (l + kIdsAhead < task.tables && task.sorted[l + kIdsAhead] > 0) {
      const uint16_t* next = task.ids + (l + kIdsAhead) * task.stride;
      const int64_t end = end_of(l + kIdsAhead);
      for (int64_t i = start(l + kIdsAhead)[0]; i < end; i += 32) __builtin_prefetch(next + i);
    }
    if (l > 0 && l % kBatch == 0) {
      count_listed();
      for (int64_t i = 0; i < padded; ++i) task.count[i] = task.count[i] < kEnough ? task.count[i] : kEnough;
    }
    const uint16_t* ids = task.ids + l * task.stride;
    const int64_t sorted = task.sorted[l];
    if (sorted > task.tokens) return false;
    if (sorted > 0) {  // before the first sorting bucket starts are what an earlier row left
      const int64_t begin = start(l)[0], end = end_of(l), size = end - begin;
      if (end > sorted) return false;
      if (listed + size > attnspan::kSegment) count_listed();
      std::memcpy(task.list + listed, ids + begin, size_t(size) * 2);
      listed += size;
    }
    if (sorted < task.tokens) count_equal(ids + sorted, task.tokens - sorted, task.code[l], task.count + sorted);
  }
  count_listed();
  for (int64_t g = 0; g < padded / attnspan::kGroup; ++g) {
    const uint8_t* count = task.count + g * attnspan::kGroup;
#if defined(__AVX512BW__)
    task.mask[g] = _mm512_cmpge_epu8_mask(_mm512_loadu_si512(count), _mm512_set1_epi8(int8_t(task.min_collisions)));
#else
    uint64_t mask = 0;
    for (int i = 0; i < 64; ++i) mask |= uint64_t(count[i] >= task.min_collisions) << i;
    task.mask[g] = mask;
#endif
  }
  return true;
}

// Here, and not with its only caller, because it takes the instruction that counts bits.
attnspan::Overlap overlap_any(const uint64_t* mask, int64_t heads, int64_t groups) {
  attnspan::Overlap found{};
  for (int64_t g = 0; g < groups; ++g) {
    uint64_t any = 0;
    for (int64_t i = 0; i < heads; ++i) any |= mask[i * groups + g], found.apart += __builtin_popcountll(mask[i * groups + g]);
    found.together += __builtin_popcountll(any);
  }
  return found;
}

}  // namespace
