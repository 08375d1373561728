// SPDX-License-Identifier: Apache-2.0
//
// Block times int8 activations with the 8-bit matrix product (Neoverse V1 and later). Contract:
// dot_portable.h.
//
// smmla multiplies 2 tokens x 8 columns by 2 rows x 8 columns: twice the work of a dot product. The
// operand of two rows is a zip of two registers of 4 rows x 4 columns. A lone token gains nothing
// and takes the dot product.
#ifndef EC_CPU_DOT_I8MM_H
#define EC_CPU_DOT_I8MM_H

#include "dot_neon.h"

namespace ec::EC_ISA {

// Sums of 2 tokens and 4 rows: (t0 r0, t0 r1, t1 r0, t1 r1), (t0 r2, t0 r3, t1 r2, t1 r3).
struct PairSums {
  int32x4_t upper, lower;

  void add(int8x16_t tokens, int8x16_t rows01, int8x16_t rows23) {
    upper = vmmlaq_s32(upper, tokens, rows01);
    lower = vmmlaq_s32(lower, tokens, rows23);
  }
  int32x4_t first() const { return vcombine_s32(vget_low_s32(upper), vget_low_s32(lower)); }
  int32x4_t second() const { return vcombine_s32(vget_high_s32(upper), vget_high_s32(lower)); }
};

// Columns 8i .. 8i+7 of rows 0, 1 and of rows 2, 3, from columns 8i .. 8i+3 and 8i+4 .. 8i+7 of 4
// rows.
inline int8x16_t rows01(int8x16_t low, int8x16_t high) {
  return vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(low), vreinterpretq_s32_s8(high)));
}
inline int8x16_t rows23(int8x16_t low, int8x16_t high) {
  return vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(low), vreinterpretq_s32_s8(high)));
}

// `weights(octet, register, low, high)` gives 4 rows x 8 columns. An odd last token is paired with
// itself.
template <int M, class Weights>
void multiplyPairs(const Acts& x, const int32_t* rows, int64_t g, bool corrected,
                   const uint8_t* scales, const Weights& weights, float* out) {
  constexpr int kPairs = (M + 1) / 2, kRegs = kPairs <= 2 ? 4 : 2;
  const auto at = [&](int m) { return rows[m < M ? m : M - 1] * x.groups + g; };
  for (int first = 0; first < kRowRegisters; first += kRegs) {
    PairSums sums[kPairs][kRegs];
    for (auto& pair : sums) {
      for (PairSums& s : pair) s.upper = s.lower = vdupq_n_s32(0);
    }
    for (int octet = 0; octet < 8; ++octet) {
      int8x16_t tokens[kPairs];
      for (int p = 0; p < kPairs; ++p) {
        tokens[p] = vcombine_s8(vld1_s8(x.q + at(2 * p) * kGroup + octet * 8),
                                vld1_s8(x.q + at(2 * p + 1) * kGroup + octet * 8));
      }
      for (int r = 0; r < kRegs; ++r) {
        int8x16_t low, high;
        weights(octet, first + r, low, high);
        const int8x16_t upper = rows01(low, high), lower = rows23(low, high);
        for (int p = 0; p < kPairs; ++p) sums[p][r].add(tokens[p], upper, lower);
      }
    }
    for (int r = 0; r < kRegs; ++r) {
      const float32x4_t scaleW = loadScales(scales + (first + r) * 8);
      for (int m = 0; m < M; ++m) {
        int32x4_t dot = m % 2 ? sums[m / 2][r].second() : sums[m / 2][r].first();
        if (corrected) dot = vaddq_s32(dot, vdupq_n_s32(x.correction[at(m)]));
        accumulate(dot, scaleW, x.scale[at(m)], out + m * kBlockRows + (first + r) * 4);
      }
    }
  }
}

template <int M>
void dotU4(const uint8_t* block, int64_t groups, const Acts& x, const int32_t* rows, float* out) {
  if constexpr (M == 1) {
    sdotU4<1>(block, groups, x, rows, out);
  } else {
    std::memset(out, 0, M * kBlockRows * sizeof(float));
    for (int64_t g = 0; g < groups; ++g, block += kU4BlockBytes) {
      const auto weights = [block](int octet, int reg, int8x16_t& low, int8x16_t& high) {
        const uint8x16_t pairs = vld1q_u8(block + octet * 128 + reg * 16);
        low = lowNibbles(pairs);
        high = highNibbles(pairs);
      };
      multiplyPairs<M>(x, rows, g, true, block + 1024, weights, out);
    }
  }
}

template <int M>
void dotI8(const uint8_t* block, int64_t groups, const Acts& x, const int32_t* rows, float* out) {
  if constexpr (M == 1) {
    sdotI8<1>(block, groups, x, rows, out);
  } else {
    std::memset(out, 0, M * kBlockRows * sizeof(float));
    for (int64_t g = 0; g < groups; ++g, block += kI8BlockBytes) {
      const int8_t* codes = reinterpret_cast<const int8_t*>(block);
      const auto weights = [codes](int octet, int reg, int8x16_t& low, int8x16_t& high) {
        low = vld1q_s8(codes + octet * 256 + reg * 16);
        high = vld1q_s8(codes + octet * 256 + 128 + reg * 16);
      };
      multiplyPairs<M>(x, rows, g, false, block + 2048, weights, out);
    }
  }
}

}  // namespace ec::EC_ISA

#endif  // EC_CPU_DOT_I8MM_H
