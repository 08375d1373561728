// SPDX-License-Identifier: Apache-2.0
//
// Block times int8 activations in plain C++. The other dot_<isa>.h files keep this contract:
//
//   dotU4<M>, dotI8<M>: one block row (32 weight rows, `groups` blocks) times M <= kTileTokens rows
//   of activations. out[m][r] = sum over groups g, in ascending order, of  fma(float(dot),
//   scale_w[g][r] * scale_x[m][g], out) with dot the exact integer sum over the 64 columns of the
//   group.
//
// The order and the roundings are the same on every ISA and for every M, so the results are too,
// bit by bit.
#ifndef EC_CPU_DOT_PORTABLE_H
#define EC_CPU_DOT_PORTABLE_H

#include "acts.h"

namespace ec::EC_ISA {

constexpr int kTileTokens = 8;

// out += float(dot) * scale, one token.
inline void accumulate(const int32_t* dot, const uint8_t* scales, float scaleX, float* out) {
  for (int r = 0; r < kBlockRows; ++r) {
    uint16_t half;
    std::memcpy(&half, scales + 2 * r, 2);
    out[r] = std::fma(static_cast<float>(dot[r]), h2f(half) * scaleX, out[r]);
  }
}

template <int M>
void dotU4(const uint8_t* block, int64_t groups, const Acts& x, const int32_t* rows, float* out) {
  std::memset(out, 0, M * kBlockRows * sizeof(float));
  for (int64_t g = 0; g < groups; ++g, block += kU4BlockBytes) {
    for (int m = 0; m < M; ++m) {
      const int64_t at = rows[m] * x.groups + g;
      const int8_t* q = x.q + at * kGroup;
      int32_t dot[kBlockRows];
      for (int32_t& d : dot) d = x.correction[at];
      for (int octet = 0; octet < 8; ++octet, q += 8) {
        const uint8_t* code = block + octet * kBlockRows * 4;
        for (int r = 0; r < kBlockRows; ++r, code += 4) {
          dot[r] += (code[0] & 15) * q[0] + (code[1] & 15) * q[1] + (code[2] & 15) * q[2] +
                    (code[3] & 15) * q[3] + (code[0] >> 4) * q[4] + (code[1] >> 4) * q[5] +
                    (code[2] >> 4) * q[6] + (code[3] >> 4) * q[7];
        }
      }
      accumulate(dot, block + 1024, x.scale[at], out + m * kBlockRows);
    }
  }
}

template <int M>
void dotI8(const uint8_t* block, int64_t groups, const Acts& x, const int32_t* rows, float* out) {
  std::memset(out, 0, M * kBlockRows * sizeof(float));
  for (int64_t g = 0; g < groups; ++g, block += kI8BlockBytes) {
    for (int m = 0; m < M; ++m) {
      const int64_t at = rows[m] * x.groups + g;
      const int8_t* q = x.q + at * kGroup;
      int32_t dot[kBlockRows] = {};
      for (int quad = 0; quad < 16; ++quad, q += 4) {
        const int8_t* code = reinterpret_cast<const int8_t*>(block) + quad * kBlockRows * 4;
        for (int r = 0; r < kBlockRows; ++r, code += 4) {
          dot[r] += code[0] * q[0] + code[1] * q[1] + code[2] * q[2] + code[3] * q[3];
        }
      }
      accumulate(dot, block + 2048, x.scale[at], out + m * kBlockRows);
    }
  }
}

}  // namespace ec::EC_ISA

#endif  // EC_CPU_DOT_PORTABLE_H
