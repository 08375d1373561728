// SPDX-License-Identifier: Apache-2.0
//
// One vector of floats in the widest register of the ISA this file is compiled for, and the handful
// of functions the float kernels are written in.
//
//   Vec            kWidth floats: 16 with AVX-512, 8 with AVX2, 4 with NEON, 4 in plain C++
//   load*, store*  full vectors, the first n lanes (the rest read as 0, and are not touched in
//   memory), fp16 exp            <= 2 ulp between -87 and 88.72; 0 below -104, 3.4e38 (never inf)
//   above; NaN stays NaN silu, sigmoid  built on exp; softplus is scalar: it is needed once per
//   head, not once per channel
//
// max(a, b) and min(a, b) return b when either is NaN, on every ISA: max(zero, x) keeps a NaN
// visible.
#ifndef EC_CPU_SIMD_H
#define EC_CPU_SIMD_H

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"

// EC_PORTABLE selects plain C++ on machines whose compiler always offers intrinsics (aarch64).
#if !defined(EC_PORTABLE) && defined(__AVX512F__)
#define EC_SIMD_AVX512 1
#include <immintrin.h>
#elif !defined(EC_PORTABLE) && defined(__AVX2__)
#define EC_SIMD_AVX2 1
#include <immintrin.h>
#elif !defined(EC_PORTABLE) && defined(__aarch64__)
#define EC_SIMD_NEON 1
#include <arm_neon.h>
#endif

namespace ec::EC_ISA {

#if defined(EC_SIMD_AVX512)

constexpr int kWidth = 16;

struct Vec {
  __m512 v;
};

inline Vec set(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
inline Vec loadHalf(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
inline void storeHalf(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for integral n.
inline Vec scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline bool anyEqual(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ) != 0; }
inline __m128 addTo4(Vec a) {
  const __m256 high = _mm512_castps512_ps256(_mm512_shuffle_f32x4(a.v, a.v, 0x4e));
  const __m256 sum = _mm256_add_ps(_mm512_castps512_ps256(a.v), high);
  return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
}

#elif defined(EC_SIMD_AVX2)

constexpr int kWidth = 8;

struct Vec {
  __m256 v;
};

// The first n of 8 lanes.
inline __m256i laneMask(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
}

inline Vec set(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, laneMask(n))}; }
inline Vec loadHalf(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, laneMask(n), a.v); }
inline void storeHalf(uint16_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec scale2(Vec a, Vec n) {
  // Two factors: 2^128 and 2^-150 are no floats, their halves are.
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127), rest = _mm256_sub_epi32(whole, half);
  const __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 y = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, x), y)};
}
inline bool anyEqual(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)) != 0;
}
inline __m128 addTo4(Vec a) {
  return _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
}

#elif defined(EC_SIMD_NEON)

constexpr int kWidth = 4;

struct Vec {
  float32x4_t v;
};

inline Vec set(float x) { return {vdupq_n_f32(x)}; }
inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline Vec load(const float* p, int n) {
  float lanes[4] = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline Vec loadHalf(const uint16_t* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))}; }
inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }
inline void store(float* p, Vec a, int n) {
  float lanes[4];
  store(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
inline void storeHalf(uint16_t* p, Vec a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a.v))); }
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// fmax would return the NaN of either side; the header promises b.
inline Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
inline Vec scale2(Vec a, Vec n) {
  const int32x4_t whole = vcvtq_s32_f32(n.v), half = vshrq_n_s32(whole, 1);
  const int32x4_t bias = vdupq_n_s32(127), rest = vsubq_s32(whole, half);
  const float32x4_t x = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23));
  const float32x4_t y = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, bias), 23));
  return {vmulq_f32(vmulq_f32(a.v, x), y)};
}
inline bool anyEqual(Vec a, Vec b) { return vmaxvq_u32(vceqq_f32(a.v, b.v)) != 0; }

#else

constexpr int kWidth = 4;

struct Vec {
  float v[kWidth];
};

template <class F>
inline Vec lanes(F&& f) {
  Vec r;
  for (int i = 0; i < kWidth; ++i) r.v[i] = f(i);
  return r;
}

inline Vec set(float x) {
  return lanes([&](int) { return x; });
}
inline Vec load(const float* p) {
  return lanes([&](int i) { return p[i]; });
}
inline Vec load(const float* p, int n) {
  return lanes([&](int i) { return i < n ? p[i] : 0.0f; });
}
inline Vec loadHalf(const uint16_t* p) {
  return lanes([&](int i) { return h2f(p[i]); });
}
inline void store(float* p, Vec a) {
  for (int i = 0; i < kWidth; ++i) p[i] = a.v[i];
}
inline void store(float* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
inline void storeHalf(uint16_t* p, Vec a) {
  for (int i = 0; i < kWidth; ++i) p[i] = f2h(a.v[i]);
}
inline Vec operator+(Vec a, Vec b) {
  return lanes([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return lanes([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return lanes([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return lanes([&](int i) { return a.v[i] / b.v[i]; });
}
// Two roundings: std::fma is a library call of some 10 ns where the CPU's baseline lacks the
// instruction.
inline Vec fma(Vec a, Vec b, Vec c) {
  return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec max(Vec a, Vec b) {
  return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec round(Vec a) {
  // Adding and taking away 1.5 * 2^23 leaves the nearest integer for |a| < 2^22; exp needs |a| <=
  // 150.
  return lanes([&](int i) { return (a.v[i] + 12582912.0f) - 12582912.0f; });
}
inline Vec scale2(Vec a, Vec n) {
  return lanes([&](int i) {
    // A NaN has no integer: its lane of `a` is NaN already.
    const int whole = n.v[i] == n.v[i] ? static_cast<int>(n.v[i]) : 0, half = whole >> 1;
    const uint32_t bits[2] = {static_cast<uint32_t>(half + 127) << 23,
                              static_cast<uint32_t>(whole - half + 127) << 23};
    float factor[2];
    std::memcpy(factor, bits, sizeof factor);
    return a.v[i] * factor[0] * factor[1];
  });
}
inline bool anyEqual(Vec a, Vec b) {
  bool any = false;
  for (int i = 0; i < kWidth; ++i) any |= a.v[i] == b.v[i];
  return any;
}

#endif

inline Vec zero() { return set(0.0f); }

inline Vec loadHalf(const uint16_t* p, int n) {
  uint16_t lanes[kWidth] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return loadHalf(lanes);
}

inline void storeHalf(uint16_t* p, Vec a, int n) {
  uint16_t lanes[kWidth];
  storeHalf(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// Lanes are added as a tree whose shape depends on kWidth only: lane i + lane i + w, for w = kWidth
// / 2 .. 1.
#if defined(EC_SIMD_AVX512) || defined(EC_SIMD_AVX2)
inline float reduceAdd(Vec a) {
  __m128 sum = addTo4(a);
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
#else
inline float reduceAdd(Vec a) {
  float lane[kWidth];
  store(lane, a);
  for (int w = kWidth / 2; w > 0; w /= 2) {
    for (int i = 0; i < w; ++i) lane[i] += lane[i + w];
  }
  return lane[0];
}
#endif

inline float reduceMax(Vec a) {
  float lane[kWidth];
  store(lane, a);
  for (int w = kWidth / 2; w > 0; w /= 2) {
    for (int i = 0; i < w; ++i) lane[i] = lane[i] > lane[i + w] ? lane[i] : lane[i + w];
  }
  return lane[0];
}

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2; exp(r) by a polynomial of degree 7.
// ln 2 is split so that n * (its high part) is exact with and without a fused multiply.
inline Vec exp(Vec x) {
  x = min(set(88.7228317f), max(set(-104.0f), x));
  const Vec n = round(x * set(1.44269504f));
  Vec r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  Vec p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  return scale2(fma(p, r * r, r) + set(1.0f), n);
}

inline Vec sigmoid(Vec x) { return set(1.0f) / (set(1.0f) + exp(zero() - x)); }
inline Vec silu(Vec x) { return x / (set(1.0f) + exp(zero() - x)); }
inline Vec relu2(Vec x) {
  const Vec r = max(zero(), x);
  return r * r;
}

inline float exp(float x) {
  float lane[kWidth];
  store(lane, exp(set(x)));
  return lane[0];
}

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

}  // namespace ec::EC_ISA

#endif
