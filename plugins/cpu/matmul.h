// SPDX-License-Identifier: Apache-2.0
//
// One block row of a matrix (32 weight rows) times any number of rows of activations: the loop that
// linear, head and moe share. A result depends on its own two rows only, never on what else is in
// the call.
#ifndef EC_CPU_MATMUL_H
#define EC_CPU_MATMUL_H

#include "acts.h"
#include "simd.h"

#if defined(EC_SIMD_AVX512)
#include "dot_avx512vnni.h"
#if defined(EC_AMX_EMULATED) || defined(__AMX_INT8__)
#include "slab_amx.h"
#define EC_HAS_SLABS 1
#endif
#elif defined(EC_SIMD_AVX2)
#include "dot_avx2.h"
#elif defined(EC_SIMD_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
#include "dot_i8mm.h"
#elif defined(EC_SIMD_NEON)
#include "dot_neon.h"
#else
#include "dot_portable.h"
#endif

namespace ec::EC_ISA {

// W [n][k] of any type, one expert of it.
struct Matrix {
  const uint8_t* data;
  int64_t n, k, groups;
  int32_t type;

  explicit Matrix(const ec_weight& w, int64_t expert = 0)
      : data(static_cast<const uint8_t*>(w.data) + static_cast<int64_t>(w.expert_stride) * expert),
        n(w.n),
        k(w.k),
        groups((w.k + kGroup - 1) / kGroup),
        type(w.type) {}

  int64_t blockRows() const { return (n + kBlockRows - 1) / kBlockRows; }
  // Weight rows of a block row that exist.
  int rowsIn(int64_t blockRow) const {
    const int64_t left = n - blockRow * kBlockRows;
    return left < kBlockRows ? static_cast<int>(left) : kBlockRows;
  }
  const uint8_t* block(int64_t blockRow) const {
    return data + blockRow * groups * (type == EC_U4_64 ? kU4BlockBytes : kI8BlockBytes);
  }
};

// Asks for the first blocks of a block row that will be read soon, the ones that nothing else asks
// for in time.
inline void prefetchStart(const Matrix& w, int64_t blockRow) {
  if (!isBlockType(w.type)) return;
  const uint8_t* start = w.block(blockRow);
  for (int i = 0; i < 4 * kU4BlockBytes; i += 64) __builtin_prefetch(start + i);
}

inline Vec loadWeights(const float* p) { return load(p); }
inline Vec loadWeights(const float* p, int n) { return load(p, n); }
inline Vec loadWeights(const uint16_t* p) { return loadHalf(p); }
inline Vec loadWeights(const uint16_t* p, int n) { return loadHalf(p, n); }

// out[m][r] = W[r] . x[m] for R weight rows and M tokens. Each pair has one vector accumulator that
// walks k in order.
template <int R, int M, class W>
inline void dotFloats(const W* w, int64_t k, const float* const* x, float* out) {
  Vec sums[R][M];
  for (auto& row : sums) {
    for (Vec& sum : row) sum = zero();
  }
  const auto step = [&](auto loadRow, auto loadX) {
    Vec xs[M];
    for (int m = 0; m < M; ++m) xs[m] = loadX(x[m]);
    for (int r = 0; r < R; ++r) {
      const Vec row = loadRow(w + r * k);
      for (int m = 0; m < M; ++m) sums[r][m] = fma(row, xs[m], sums[r][m]);
    }
  };
  int64_t i = 0;
  for (; i + kWidth <= k; i += kWidth) {
    step([i](const W* p) { return loadWeights(p + i); },
         [i](const float* p) { return load(p + i); });
  }
  if (i < k) {
    const int left = static_cast<int>(k - i);
    step([i, left](const W* p) { return loadWeights(p + i, left); },
         [i, left](const float* p) { return load(p + i, left); });
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) out[m * kBlockRows + r] = reduceAdd(sums[r][m]);
  }
}

template <int M, class W>
inline void floatTile(const W* w, int count, int64_t k, const float* const* x, float* out) {
  int r = 0;
  for (; r + 4 <= count; r += 4) dotFloats<4, M>(w + r * k, k, x, out + r);
  for (; r < count; ++r) dotFloats<1, M>(w + r * k, k, x, out + r);
}

constexpr int kFloatTileTokens = kWidth == 16 ? 4 : 2;

// sink(first, count, out): out[count][32] holds the results of activations rows[first .. first +
// count).
template <class W, class Sink>
void multiplyFloats(const Matrix& w, int64_t blockRow, const Acts& x, const int32_t* rows,
                    int64_t m, Sink&& sink) {
  const W* weights = reinterpret_cast<const W*>(w.data) + blockRow * kBlockRows * w.k;
  const int count = w.rowsIn(blockRow);
  alignas(64) float out[kFloatTileTokens * kBlockRows] = {};
  const float* xs[kFloatTileTokens];
  for (int64_t first = 0; first < m;) {
    const int tile = m - first >= kFloatTileTokens ? kFloatTileTokens : 1;
    for (int i = 0; i < tile; ++i) xs[i] = x.f + rows[first + i] * x.stride;
    if (tile == 1) {
      floatTile<1>(weights, count, w.k, xs, out);
    } else {
      floatTile<kFloatTileTokens>(weights, count, w.k, xs, out);
    }
    sink(first, tile, out);
    first += tile;
  }
}

template <int M>
inline void dotTile(const Matrix& w, const uint8_t* block, const Acts& x, const int32_t* rows,
                    float* out) {
  if (w.type == EC_U4_64) {
    dotU4<M>(block, w.groups, x, rows, out);
  } else {
    dotI8<M>(block, w.groups, x, rows, out);
  }
}

inline void dotTile(const Matrix& w, const uint8_t* block, const Acts& x, const int32_t* rows,
                    int m, float* out) {
  static_assert(kTileTokens == 8, "one case per tile size");
  switch (m) {
    case 1:
      return dotTile<1>(w, block, x, rows, out);
    case 2:
      return dotTile<2>(w, block, x, rows, out);
    case 3:
      return dotTile<3>(w, block, x, rows, out);
    case 4:
      return dotTile<4>(w, block, x, rows, out);
    case 5:
      return dotTile<5>(w, block, x, rows, out);
    case 6:
      return dotTile<6>(w, block, x, rows, out);
    case 7:
      return dotTile<7>(w, block, x, rows, out);
    default:
      return dotTile<8>(w, block, x, rows, out);
  }
}

template <class Sink>
void multiplyBlocks(const Matrix& w, int64_t blockRow, const Acts& x, const int32_t* rows,
                    int64_t m, Sink&& sink) {
  const uint8_t* block = w.block(blockRow);
  int64_t first = 0;
#if defined(EC_HAS_SLABS)
  alignas(64) float slab[kSlabTokens * kBlockRows];
  while (m - first >= kSlabMinTokens) {
    const int count = m - first < kSlabTokens ? static_cast<int>(m - first) : kSlabTokens;
    dotSlab(w.type, block, w.groups, x, rows + first, count, slab);
    sink(first, count, slab);
    first += count;
  }
#endif
  alignas(64) float out[kTileTokens * kBlockRows];
  for (; first < m; first += kTileTokens) {
    const int count = m - first < kTileTokens ? static_cast<int>(m - first) : kTileTokens;
    dotTile(w, block, x, rows + first, count, out);
    sink(first, count, out);
  }
}

template <class Sink>
inline void multiply(const Matrix& w, int64_t blockRow, const Acts& x, const int32_t* rows,
                     int64_t m, Sink&& sink) {
  if (w.type == EC_F32) {
    multiplyFloats<float>(w, blockRow, x, rows, m, sink);
  } else if (w.type == EC_F16) {
    multiplyFloats<uint16_t>(w, blockRow, x, rows, m, sink);
  } else {
    multiplyBlocks(w, blockRow, x, rows, m, sink);
  }
}

inline float activate(int32_t act, float v) {
  if (act != EC_RELU2) return v;
  const float r = v < 0.f ? 0.f : v;  // keeps a NaN
  return r * r;
}

}  // namespace ec::EC_ISA

#endif  // EC_CPU_MATMUL_H
