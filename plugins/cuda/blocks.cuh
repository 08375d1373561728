// SPDX-License-Identifier: Apache-2.0
//
// Blocks of 32 rows x 64 columns (docs/bundle-format.md) as operands of mma.m16n8k16.
//
// With g = lane / 4 and t = lane % 4, a lane reads the codes of rows 4g .. 4g+3 in octets t and t +
// 4 of the columns: 16-byte loads, no shuffle. Rows 4g and 4g+1 are rows g and g+8 of a first tile,
// 4g+2 and 4g+3 of a second. Inside an octet the columns come as (0,2) (1,3) (4,6) (5,7), the order
// in which two nibbles of a word turn into two halves; activations are stored in the same order.
//
// Codes are exact as halves. Activations are halves times a power of two for each row, or for each
// 64 columns, so that no size of an activation overflows: relu2 of a wild row may reach 1e10.
//
// For a few rows a code goes into the mma as it lies: its bits alone are a half, subnormal, worth
// code 2^-24, or 16 times that for the upper nibbles, whose activations are a 16th. That is half
// the instructions. What the offset of the codes adds, the sum of the activations times it, is
// where the sum of a block starts.
#ifndef EC_CUDA_BLOCKS_CUH
#define EC_CUDA_BLOCKS_CUH

#include "platform.h"

namespace ec::cuda {

__device__ __forceinline__ uint32_t asWord(__half2 h) {
  uint32_t word;
  memcpy(&word, &h, sizeof word);
  return word;
}
__device__ __forceinline__ __half2 asHalves(uint32_t word) {
  __half2 h;
  memcpy(&h, &word, sizeof h);
  return h;
}
__device__ __forceinline__ __half2 both(uint16_t bits) {
  return __half2half2(__ushort_as_half(bits));
}

// Eight columns of one row: (0,2) (1,3) (4,6) (5,7).
struct Octet {
  __half2 pair[4];
};

// Codes of a block as a few rows take them: kPieces of 16 bytes for each lane. A stored code is
// kOffset more than its value; the upper half of an octet's activations is multiplied by kUpper.
struct U4 {
  static constexpr int kBytes = kU4BlockBytes, kScales = 1024, kPieces = 2;
  static constexpr float kOffset = 8.f, kUpper = 1.f / 16;
  struct Codes {
    uint4 octet[2];
  };
  static __device__ __forceinline__ int piece(int i, int g, int t) {
    return ((t + 4 * i) * 32 + 4 * g) * 4;
  }
  static __device__ __forceinline__ Codes fromPieces(const uint4* first) {
    return {{first[0], first[kWarp]}};
  }
  static __device__ __forceinline__ void stored(const Codes& codes, int octet, int r,
                                                uint32_t (&pair)[4]) {
    const uint32_t word = (&codes.octet[octet].x)[r], next = word >> 8;
    pair[0] = word & 0x000f000fu;
    pair[1] = next & 0x000f000fu;
    pair[2] = word & 0x00f000f0u;
    pair[3] = next & 0x00f000f0u;
  }
  // 0x6400 is 1024 as a half, whose last bit is worth 1: a code in the low bits adds itself.
  static __device__ __forceinline__ Octet row(const Codes& codes, int octet, int r) {
    const uint32_t word = (&codes.octet[octet].x)[r], next = word >> 8;
    const __half2 low = both(0x6408);   // 1024 + 8
    const __half2 high = both(0xd480);  // -(1024 / 16 + 8)
    const __half2 sixteenth = both(0x2c00);
    return {{__hsub2(asHalves((word & 0x000f000fu) | 0x64006400u), low),
             __hsub2(asHalves((next & 0x000f000fu) | 0x64006400u), low),
             __hfma2(asHalves((word & 0x00f000f0u) | 0x64006400u), sixteenth, high),
             __hfma2(asHalves((next & 0x00f000f0u) | 0x64006400u), sixteenth, high)}};
  }
};

struct I8 {
  static constexpr int kBytes = kI8BlockBytes, kScales = 2048, kPieces = 4;
  static constexpr float kOffset = 128.f, kUpper = 1.f;
  struct Codes {
    uint4 quad[4];  // columns 0-3 and 4-7 of octet t, then of octet t + 4
  };
  static __device__ __forceinline__ int piece(int i, int g, int t) {
    return ((2 * (t + i / 2 * 4) + i % 2) * 32 + 4 * g) * 4;
  }
  static __device__ __forceinline__ Codes fromPieces(const uint4* first) {
    return {{first[0], first[kWarp], first[2 * kWarp], first[3 * kWarp]}};
  }
  static __device__ __forceinline__ void stored(const Codes& codes, int octet, int r,
                                                uint32_t (&pair)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = (&codes.quad[2 * octet + i].x)[r] ^ 0x80808080u;  // code + 128
      pair[2 * i] = word & 0x00ff00ffu;
      pair[2 * i + 1] = word >> 8 & 0x00ff00ffu;
    }
  }
  static __device__ __forceinline__ Octet row(const Codes& codes, int octet, int r) {
    const uint32_t low = (&codes.quad[2 * octet].x)[r] ^ 0x80808080u;  // code + 128, unsigned
    const uint32_t high = (&codes.quad[2 * octet + 1].x)[r] ^ 0x80808080u;
    const __half2 offset = both(0x6480);  // 1024 + 128
    return {{__hsub2(asHalves(__byte_perm(low, 0x64646464u, 0x4240)), offset),
             __hsub2(asHalves(__byte_perm(low, 0x64646464u, 0x4341)), offset),
             __hsub2(asHalves(__byte_perm(high, 0x64646464u, 0x4240)), offset),
             __hsub2(asHalves(__byte_perm(high, 0x64646464u, 0x4341)), offset)}};
  }
};

// Two tiles of 16 rows by 8 columns of activations, summed over a block's 64 columns: stored codes
// times 2^-24, from `start` on. b holds octets t and t + 4 of the activations of column g.
template <class Codec>
__device__ __forceinline__ void multiplyBlock(const typename Codec::Codes& codes,
                                              const uint4 (&b)[2], const float4& start,
                                              float (&c)[2][4]) {
#pragma unroll
  for (int octet = 0; octet < 2; ++octet) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      uint32_t first[4], second[4];
      Codec::stored(codes, octet, 2 * tile, first);
      Codec::stored(codes, octet, 2 * tile + 1, second);
      if (octet == 0) {
        mma16816(c[tile], first[0], second[0], first[1], second[1], b[octet].x, b[octet].y, start);
      } else {
        mma16816(c[tile], first[0], second[0], first[1], second[1], b[octet].x, b[octet].y);
      }
      mma16816(c[tile], first[2], second[2], first[3], second[3], b[octet].z, b[octet].w);
    }
  }
}

// Eight activations in the order of an octet.
__device__ __forceinline__ uint4 packOctet(const float (&v)[8]) {
  return make_uint4(asWord(__floats2half2_rn(v[0], v[2])), asWord(__floats2half2_rn(v[1], v[3])),
                    asWord(__floats2half2_rn(v[4], v[6])), asWord(__floats2half2_rn(v[5], v[7])));
}

// A power of two just above the largest magnitude of a row, so that the row over it lies in [-1,
// 1].
__device__ __forceinline__ float rowScale(float largest) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 126;
  const int bounded = exponent < -100 ? -100 : exponent > 126 ? 126 : exponent;
  return __uint_as_float(static_cast<unsigned>(bounded + 127) << 23);
}

// 1 / p of a power of two between 2^-100 and 2^126.
__device__ __forceinline__ float powerInverse(float p) {
  return __uint_as_float((254u << 23) - __float_as_uint(p));
}

// One weight of any type, for what is not worth a kernel of its own.
__device__ __forceinline__ float weightAt(const ec_weight& w, int expert, int64_t row,
                                          int64_t column) {
  const auto* base = static_cast<const uint8_t*>(w.data) + w.expert_stride * expert;
  if (w.type == EC_F32) return reinterpret_cast<const float*>(base)[row * w.k + column];
  if (w.type == EC_F16)
    return __half2float(reinterpret_cast<const __half*>(base)[row * w.k + column]);
  const int64_t blocks = ceilDiv(w.k, kGroup);
  const int r = static_cast<int>(row % 32), k = static_cast<int>(column % kGroup);
  if (w.type == EC_U4_64) {
    const uint8_t* block = base + (row / 32 * blocks + column / kGroup) * kU4BlockBytes;
    const uint8_t byte = block[(k / 8 * 32 + r) * 4 + k % 4];
    const int code = (k % 8 < 4 ? byte & 15 : byte >> 4) - 8;
    return code * __half2float(reinterpret_cast<const __half*>(block + 1024)[r]);
  }
  const uint8_t* block = base + (row / 32 * blocks + column / kGroup) * kI8BlockBytes;
  const int code = static_cast<int8_t>(block[(k / 4 * 32 + r) * 4 + k % 4]);
  return code * __half2float(reinterpret_cast<const __half*>(block + 2048)[r]);
}

__host__ __device__ inline bool isBlockType(int type) {
  return type == EC_U4_64 || type == EC_I8_64;
}

}  // namespace ec::cuda

#endif  // EC_CUDA_BLOCKS_CUH
