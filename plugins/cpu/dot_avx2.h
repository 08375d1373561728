// SPDX-License-Identifier: Apache-2.0
//
// Block times int8 activations with AVX2. Contract: dot_portable.h.
#ifndef EC_CPU_DOT_AVX2_H
#define EC_CPU_DOT_AVX2_H

#include <immintrin.h>

#include "acts.h"

namespace ec::EC_ISA {

constexpr int kTileTokens = 8;
constexpr int kPrefetchBlocks = 4;
constexpr int kQuarterRows = 8;  // rows in one register

// Weights come once per token: fetch them ahead of the hardware prefetcher, which stops at page
// borders.
inline void prefetchBlock(const uint8_t* block, int bytes) {
  for (int i = 0; i < bytes; i += 64)
    _mm_prefetch(reinterpret_cast<const char*>(block) + i, _MM_HINT_T0);
}

inline __m256i broadcast4(const int8_t* q) {
  int32_t bytes;
  std::memcpy(&bytes, q, 4);
  return _mm256_set1_epi32(bytes);
}

// Ends one use of `weight` before the next: left alone, GCC computes all products first and keeps
// them in memory.
inline void keepOrder(__m256i& sum, __m256i& weight) { asm("" : "+x"(sum), "+x"(weight)); }

inline __m256i load32(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// out[8] = fma(float(dot), scale_w * scale_x, out)
inline void accumulate(__m256i dot, __m256 scaleW, float scaleX, float* out) {
  const __m256 scale = _mm256_mul_ps(scaleW, _mm256_set1_ps(scaleX));
  _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, _mm256_loadu_ps(out)));
}

inline __m256 loadScales(const uint8_t* scales) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
}

template <int M>
void dotU4(const uint8_t* block, int64_t groups, const Acts& x, const int32_t* rows, float* out) {
  const __m256i low4 = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  std::memset(out, 0, M * kBlockRows * sizeof(float));
  for (int64_t g = 0; g < groups; ++g, block += kU4BlockBytes) {
    if (M == 1) prefetchBlock(block + kPrefetchBlocks * kU4BlockBytes, kU4BlockBytes);
    const int8_t* q[M];
    for (int m = 0; m < M; ++m) q[m] = x.q + (rows[m] * x.groups + g) * kGroup;
    for (int quarter = 0; quarter < kBlockRows / kQuarterRows; ++quarter) {
      const uint8_t* codes = block + quarter * 4 * kQuarterRows;
      __m256i dot[M];
      for (int m = 0; m < M; ++m) dot[m] = _mm256_setzero_si256();
      for (int half = 0; half < 2; ++half) {
        // 16-bit sums of 8 products of pairs: at most 8 * 2 * 15 * 127 = 30480.
        __m256i sum[M];
        for (int m = 0; m < M; ++m) sum[m] = _mm256_setzero_si256();
        for (int i = 0; i < 4; ++i) {
          const int octet = half * 4 + i;
          const __m256i pair = load32(codes + octet * kBlockRows * 4);
          __m256i low = _mm256_and_si256(pair, low4);
          __m256i high = _mm256_and_si256(_mm256_srli_epi16(pair, 4), low4);
          for (int m = 0; m < M; ++m) {
            const int8_t* x8 = q[m] + octet * 8;
            sum[m] = _mm256_add_epi16(sum[m], _mm256_maddubs_epi16(low, broadcast4(x8)));
            keepOrder(sum[m], low);
            sum[m] = _mm256_add_epi16(sum[m], _mm256_maddubs_epi16(high, broadcast4(x8 + 4)));
            keepOrder(sum[m], high);
          }
        }
        for (int m = 0; m < M; ++m)
          dot[m] = _mm256_add_epi32(dot[m], _mm256_madd_epi16(sum[m], ones));
      }
      const __m256 scaleW = loadScales(block + 1024 + quarter * 2 * kQuarterRows);
      for (int m = 0; m < M; ++m) {
        const int64_t at = rows[m] * x.groups + g;
        const __m256i exact = _mm256_add_epi32(dot[m], _mm256_set1_epi32(x.correction[at]));
        accumulate(exact, scaleW, x.scale[at], out + m * kBlockRows + quarter * kQuarterRows);
      }
    }
  }
}

template <int M>
void dotI8(const uint8_t* block, int64_t groups, const Acts& x, const int32_t* rows, float* out) {
  const __m256i ones = _mm256_set1_epi16(1);
  std::memset(out, 0, M * kBlockRows * sizeof(float));
  for (int64_t g = 0; g < groups; ++g, block += kI8BlockBytes) {
    if (M == 1) prefetchBlock(block + kPrefetchBlocks * kI8BlockBytes, kI8BlockBytes);
    const int8_t* q[M];
    for (int m = 0; m < M; ++m) q[m] = x.q + (rows[m] * x.groups + g) * kGroup;
    for (int quarter = 0; quarter < kBlockRows / kQuarterRows; ++quarter) {
      const uint8_t* codes = block + quarter * 4 * kQuarterRows;
      __m256i dot[M];
      for (int m = 0; m < M; ++m) dot[m] = _mm256_setzero_si256();
      for (int quad = 0; quad < 16; ++quad) {
        // maddubs wants one unsigned side: |w| and x with the sign of w. Pairs stay below 2 * 128 *
        // 127 < 2^15.
        const __m256i weight = load32(codes + quad * kBlockRows * 4);
        __m256i magnitude = _mm256_abs_epi8(weight);
        for (int m = 0; m < M; ++m) {
          const __m256i signedX = _mm256_sign_epi8(broadcast4(q[m] + quad * 4), weight);
          const __m256i pairs = _mm256_maddubs_epi16(magnitude, signedX);
          dot[m] = _mm256_add_epi32(dot[m], _mm256_madd_epi16(pairs, ones));
          keepOrder(dot[m], magnitude);
        }
      }
      const __m256 scaleW = loadScales(block + 2048 + quarter * 2 * kQuarterRows);
      for (int m = 0; m < M; ++m) {
        const int64_t at = rows[m] * x.groups + g;
        accumulate(dot[m], scaleW, x.scale[at], out + m * kBlockRows + quarter * kQuarterRows);
      }
    }
  }
}

}  // namespace ec::EC_ISA

#endif  // EC_CPU_DOT_AVX2_H
