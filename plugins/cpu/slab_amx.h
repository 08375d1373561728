// SPDX-License-Identifier: Apache-2.0
//
// One block row times 16 or more rows of int8 activations with AMX tiles. Contract and results:
// dot_portable.h, bit by bit; the tiles make the exact integer dots of one group, the scales are
// applied in float32 as everywhere.
//
// Per group: A = 16 rows of activations x 64 bytes, B = 16 quads of columns x 16 weight rows x 4
// bytes, C = 16 x 16 int32. A U4 block is two B tiles once its nibbles are spread, an I8 block is
// two B tiles as it is.
#ifndef EC_CPU_SLAB_AMX_H
#define EC_CPU_SLAB_AMX_H

#include <immintrin.h>

#include "acts.h"

namespace ec::EC_ISA {

constexpr int kTileRows = 16;
constexpr int kSlabTokens = 128;  // results in flight: 128 x 32 floats are half of an L1 cache
constexpr int kSlabMinTokens = 16;

// Registers 0..3: C of two token tiles x two halves of the weight rows. 4, 5: B. 6, 7: A.
#if defined(EC_AMX_EMULATED)

// The same five operations in plain C++.
struct Tiles {
  int8_t reg[8][kTileRows][64];

  template <int T>
  void clear() {
    std::memset(reg[T], 0, sizeof reg[T]);
  }
  template <int T>
  void load(const void* from, int64_t stride) {
    for (int r = 0; r < kTileRows; ++r) {
      std::memcpy(reg[T][r], static_cast<const char*>(from) + r * stride, 64);
    }
  }
  template <int T>
  void store(int32_t* to) {
    std::memcpy(to, reg[T], sizeof reg[T]);
  }
  // C += A B, A signed; B signed or unsigned.
  template <int C, int A, int B, bool kSignedB>
  void multiply() {
    for (int m = 0; m < kTileRows; ++m) {
      for (int n = 0; n < kTileRows; ++n) {
        int32_t sum;
        std::memcpy(&sum, reg[C][m] + 4 * n, 4);
        for (int i = 0; i < 64; ++i) {
          const int8_t b = reg[B][i / 4][4 * n + i % 4];
          sum += reg[A][m][i] * (kSignedB ? b : static_cast<uint8_t>(b));
        }
        std::memcpy(reg[C][m] + 4 * n, &sum, 4);
      }
    }
  }
};

#else

struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, startRow = 0, reserved[14] = {};
      uint16_t columnBytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // GCC 12's intrinsic names the first 8 bytes only; stores to the rest may be left out.
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  // A thread that leaves tiles in use pays for 8 kB more at every context switch.
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // GCC's intrinsics paste the register's number into the text, so that a template parameter cannot
  // name it.
  template <int T>
  void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  void store(int32_t* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t{64}), "i"(T) : "memory");
  }
  template <int C, int A, int B, bool kSignedB>
  void multiply() {
    if constexpr (kSignedB) {
      asm volatile("tdpbssd %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(B), "i"(A), "i"(C));
    } else {
      asm volatile("tdpbsud %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(B), "i"(A), "i"(C));
    }
  }
};

#endif

// The two B tiles of a U4 block, codes 0..15: [half of the rows][quad][16 rows][4]
inline void spreadNibbles(const uint8_t* block, uint8_t* tiles) {
  const __m512i low4 = _mm512_set1_epi8(15);
  for (int octet = 0; octet < 8; ++octet) {
    for (int half = 0; half < 2; ++half) {
      const __m512i pair = _mm512_loadu_si512(block + octet * 128 + half * 64);
      uint8_t* to = tiles + half * 1024 + octet * 128;
      _mm512_store_si512(to, _mm512_and_si512(pair, low4));
      _mm512_store_si512(to + 64, _mm512_and_si512(_mm512_srli_epi16(pair, 4), low4));
    }
  }
}

// 16 rows of A. Rows that follow each other in memory are used where they lie, others are gathered.
struct TokenTile {
  alignas(64) int8_t gathered[kTileRows * 64];

  template <int T>
  void load(Tiles& tiles, const Acts& x, const int32_t* rows, int64_t g, bool contiguous) {
    const int64_t stride = x.groups * kGroup;
    if (contiguous) {
      tiles.load<T>(x.q + rows[0] * stride + g * kGroup, stride);
      return;
    }
    for (int i = 0; i < kTileRows; ++i) {
      std::memcpy(gathered + i * 64, x.q + rows[i] * stride + g * kGroup, 64);
    }
    tiles.load<T>(gathered, 64);
  }
};

// out[i] += float(dots[i] + correction) * scales, for 16 tokens and 16 weight rows.
inline void addScaled(const int32_t* dots, __m512 scaleW, bool corrected, const Acts& x,
                      const int32_t* rows, int64_t g, float* out) {
  for (int i = 0; i < kTileRows; ++i) {
    const int64_t at = rows[i] * x.groups + g;
    const __m512i correction = _mm512_set1_epi32(corrected ? x.correction[at] : 0);
    const __m512i dot = _mm512_add_epi32(_mm512_load_si512(dots + i * 16), correction);
    const __m512 scale = _mm512_mul_ps(scaleW, _mm512_set1_ps(x.scale[at]));
    float* sum = out + i * kBlockRows;
    _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, _mm512_loadu_ps(sum)));
  }
}

template <bool kSignedB>
void slabGroup(Tiles& tiles, const Acts& x, const int32_t* rows, const bool* contiguous,
               int tileCount, int64_t g, const uint8_t* scales, float* out) {
  const __m512 scaleW[2] = {
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales))),
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 32)))};
  alignas(64) int32_t dots[4][kTileRows * 16];
  TokenTile a, b;
  for (int t = 0; t < tileCount; t += 2) {
    const bool pair = t + 1 < tileCount;
    const int32_t* first = rows + t * kTileRows;
    a.load<6>(tiles, x, first, g, contiguous[t]);
    tiles.clear<0>();
    tiles.clear<1>();
    tiles.multiply<0, 6, 4, kSignedB>();
    tiles.multiply<1, 6, 5, kSignedB>();
    if (pair) {
      b.load<7>(tiles, x, first + kTileRows, g, contiguous[t + 1]);
      tiles.clear<2>();
      tiles.clear<3>();
      tiles.multiply<2, 7, 4, kSignedB>();
      tiles.multiply<3, 7, 5, kSignedB>();
    }
    tiles.store<0>(dots[0]);
    tiles.store<1>(dots[1]);
    if (pair) tiles.store<2>(dots[2]);
    if (pair) tiles.store<3>(dots[3]);
    for (int i = 0; i < (pair ? 4 : 2); ++i) {
      addScaled(dots[i], scaleW[i % 2], !kSignedB, x, first + i / 2 * kTileRows, g,
                out + (t + i / 2) * kTileRows * kBlockRows + i % 2 * 16);
    }
  }
}

// out[count][32] for count <= kSlabTokens tokens. The last tile is filled up with copies of the
// last token.
inline void dotSlab(int32_t type, const uint8_t* block, int64_t groups, const Acts& x,
                    const int32_t* tokens, int count, float* out) {
  const int tileCount = (count + kTileRows - 1) / kTileRows;
  int32_t rows[kSlabTokens];
  for (int i = 0; i < tileCount * kTileRows; ++i) rows[i] = tokens[i < count ? i : count - 1];
  bool contiguous[kSlabTokens / kTileRows];
  for (int t = 0; t < tileCount; ++t) {
    contiguous[t] = true;
    for (int i = 0; i < kTileRows; ++i)
      contiguous[t] &= rows[t * kTileRows + i] == rows[t * kTileRows] + i;
  }
  std::memset(out, 0, static_cast<size_t>(tileCount) * kTileRows * kBlockRows * sizeof(float));
  alignas(64) uint8_t spread[2048];
  Tiles tiles;
  for (int64_t g = 0; g < groups; ++g) {
    if (type == EC_U4_64) {
      spreadNibbles(block, spread);
      tiles.load<4>(spread, 64);
      tiles.load<5>(spread + 1024, 64);
      slabGroup<false>(tiles, x, rows, contiguous, tileCount, g, block + 1024, out);
      block += kU4BlockBytes;
    } else {
      tiles.load<4>(block, 128);
      tiles.load<5>(block + 64, 128);
      slabGroup<true>(tiles, x, rows, contiguous, tileCount, g, block + 2048, out);
      block += kI8BlockBytes;
    }
  }
}

}  // namespace ec::EC_ISA

#endif  // EC_CPU_SLAB_AMX_H
