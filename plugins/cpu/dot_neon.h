// SPDX-License-Identifier: Apache-2.0
//
// Block times int8 activations with NEON's dot product (Cortex-A76 and later). Contract:
// dot_portable.h.
//
// A register of weights is 4 rows x 4 columns, so one activation dword, taken by lane, serves it.
#ifndef EC_CPU_DOT_NEON_H
#define EC_CPU_DOT_NEON_H

#include <arm_neon.h>

#include "acts.h"

namespace ec::EC_ISA {

constexpr int kTileTokens = 8;
constexpr int kPrefetchBlocks = 4;
constexpr int kRowRegisters = kBlockRows / 4;

// Registers of 4 rows that M tokens take at once: their sums stay within half of the 32 registers.
constexpr int registersPerPass(int tokens) { return tokens == 1 ? 8 : tokens <= 4 ? 4 : 2; }

// Weights come once per token: fetch them ahead of the hardware prefetcher.
inline void prefetchBlock(const uint8_t* block, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(block + i);
}

inline float32x4_t loadScales(const uint8_t* scales) {
  uint16x4_t halves;
  std::memcpy(&halves, scales, 8);
  return vcvt_f32_f16(vreinterpret_f16_u16(halves));
}

// out[4] = fma(float(dot), scale_w * scale_x, out)
inline void accumulate(int32x4_t dot, float32x4_t scaleW, float scaleX, float* out) {
  const float32x4_t scale = vmulq_f32(scaleW, vdupq_n_f32(scaleX));
  vst1q_f32(out, vfmaq_f32(vld1q_f32(out), vcvtq_f32_s32(dot), scale));
}

inline int8x16_t lowNibbles(uint8x16_t pairs) {
  return vreinterpretq_s8_u8(vandq_u8(pairs, vdupq_n_u8(15)));
}
inline int8x16_t highNibbles(uint8x16_t pairs) { return vreinterpretq_s8_u8(vshrq_n_u8(pairs, 4)); }

template <int M>
void sdotU4(const uint8_t* block, int64_t groups, const Acts& x, const int32_t* rows, float* out) {
  constexpr int kRegs = registersPerPass(M);
  std::memset(out, 0, M * kBlockRows * sizeof(float));
  for (int64_t g = 0; g < groups; ++g, block += kU4BlockBytes) {
    if (M == 1) prefetchBlock(block + kPrefetchBlocks * kU4BlockBytes, kU4BlockBytes);
    for (int first = 0; first < kRowRegisters; first += kRegs) {
      int32x4_t dot[M][kRegs];
      for (int m = 0; m < M; ++m) {
        for (auto& d : dot[m]) d = vdupq_n_s32(x.correction[rows[m] * x.groups + g]);
      }
      for (int octet = 0; octet < 8; ++octet) {
        int8x16_t low[kRegs], high[kRegs];
        for (int r = 0; r < kRegs; ++r) {
          const uint8x16_t pairs = vld1q_u8(block + octet * 128 + (first + r) * 16);
          low[r] = lowNibbles(pairs);
          high[r] = highNibbles(pairs);
        }
        for (int m = 0; m < M; ++m) {
          const int8x8_t q = vld1_s8(x.q + (rows[m] * x.groups + g) * kGroup + octet * 8);
          for (int r = 0; r < kRegs; ++r) {
            dot[m][r] = vdotq_lane_s32(dot[m][r], low[r], q, 0);
            dot[m][r] = vdotq_lane_s32(dot[m][r], high[r], q, 1);
          }
        }
      }
      for (int r = 0; r < kRegs; ++r) {
        const float32x4_t scaleW = loadScales(block + 1024 + (first + r) * 8);
        for (int m = 0; m < M; ++m) {
          accumulate(dot[m][r], scaleW, x.scale[rows[m] * x.groups + g],
                     out + m * kBlockRows + (first + r) * 4);
        }
      }
    }
  }
}

template <int M>
void sdotI8(const uint8_t* block, int64_t groups, const Acts& x, const int32_t* rows, float* out) {
  constexpr int kRegs = registersPerPass(M);
  std::memset(out, 0, M * kBlockRows * sizeof(float));
  for (int64_t g = 0; g < groups; ++g, block += kI8BlockBytes) {
    if (M == 1) prefetchBlock(block + kPrefetchBlocks * kI8BlockBytes, kI8BlockBytes);
    const int8_t* codes = reinterpret_cast<const int8_t*>(block);
    for (int first = 0; first < kRowRegisters; first += kRegs) {
      int32x4_t dot[M][kRegs];
      for (auto& token : dot) {
        for (auto& d : token) d = vdupq_n_s32(0);
      }
      for (int pair = 0; pair < 8; ++pair) {
        int8x16_t even[kRegs], odd[kRegs];
        for (int r = 0; r < kRegs; ++r) {
          even[r] = vld1q_s8(codes + pair * 256 + (first + r) * 16);
          odd[r] = vld1q_s8(codes + pair * 256 + 128 + (first + r) * 16);
        }
        for (int m = 0; m < M; ++m) {
          const int8x8_t q = vld1_s8(x.q + (rows[m] * x.groups + g) * kGroup + pair * 8);
          for (int r = 0; r < kRegs; ++r) {
            dot[m][r] = vdotq_lane_s32(dot[m][r], even[r], q, 0);
            dot[m][r] = vdotq_lane_s32(dot[m][r], odd[r], q, 1);
          }
        }
      }
      for (int r = 0; r < kRegs; ++r) {
        const float32x4_t scaleW = loadScales(block + 2048 + (first + r) * 8);
        for (int m = 0; m < M; ++m) {
          accumulate(dot[m][r], scaleW, x.scale[rows[m] * x.groups + g],
                     out + m * kBlockRows + (first + r) * 4);
        }
      }
    }
  }
}

#if !defined(__ARM_FEATURE_MATMUL_INT8)
template <int M>
void dotU4(const uint8_t* block, int64_t groups, const Acts& x, const int32_t* rows, float* out) {
  sdotU4<M>(block, groups, x, rows, out);
}
template <int M>
void dotI8(const uint8_t* block, int64_t groups, const Acts& x, const int32_t* rows, float* out) {
  sdotI8<M>(block, groups, x, rows, out);
}
#endif

}  // namespace ec::EC_ISA

#endif  // EC_CPU_DOT_NEON_H
