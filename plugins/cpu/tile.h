// SPDX-License-Identifier: Apache-2.0
//
// A tile of an fp32 matrix product in registers: R rows x V vectors of columns. The scan of Mamba-2
// and prefill attention are built from it.
#ifndef EC_CPU_TILE_H
#define EC_CPU_TILE_H

#include <type_traits>

#include "simd.h"

namespace ec::EC_ISA {

// 16 accumulators where there are 32 registers, 8 where there are 16.
constexpr int kTileRows = 4;
#if defined(EC_SIMD_AVX512) || defined(EC_SIMD_NEON)
constexpr int kTileVecs = 4;
#else
constexpr int kTileVecs = 2;
#endif

template <int R, int V>
struct Tile {
  static constexpr int kRows = R;
  static constexpr int kColumns = V * kWidth;
  Vec acc[R][V];

  void clear() {
    for (auto& row : acc) {
      for (Vec& v : row) v = zero();
    }
  }
  void load(const float* p, int64_t stride) {
    for (int i = 0; i < R; ++i) {
      for (int v = 0; v < V; ++v) acc[i][v] = EC_ISA::load(p + i * stride + v * kWidth);
    }
  }
  void store(float* p, int64_t stride) const {
    for (int i = 0; i < R; ++i) {
      for (int v = 0; v < V; ++v) EC_ISA::store(p + i * stride + v * kWidth, acc[i][v]);
    }
  }
  void scaleRow(int i, float factor) {
    for (Vec& v : acc[i]) v = v * set(factor);
  }
  // row i += a * x
  void addRow(int i, float a, const float* x) {
    for (int v = 0; v < V; ++v) acc[i][v] = fma(set(a), EC_ISA::load(x + v * kWidth), acc[i][v]);
  }
  // acc[i][:] += sum over k of a[i * rowStride + k * depthStride] * x[k * xStride + :], k ascending
  void multiplyAdd(const float* a, int64_t rowStride, int64_t depthStride, const float* x,
                   int64_t xStride, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, a += depthStride, x += xStride) {
      Vec column[V];
      for (int v = 0; v < V; ++v) column[v] = EC_ISA::load(x + v * kWidth);
      for (int i = 0; i < R; ++i) {
        const Vec factor = set(a[i * rowStride]);
        for (int v = 0; v < V; ++v) acc[i][v] = fma(factor, column[v], acc[i][v]);
      }
    }
  }
};

// Calls body(Tile<R, V>{}, row, column) so that tiles cover rows x columns; columns is a multiple
// of kWidth. Rows are the outer loop.
template <class Body>
inline void forTiles(int64_t rows, int64_t columns, Body&& body) {
  const auto forColumns = [&](auto rowsOf, int64_t row) {
    constexpr int kRows = decltype(rowsOf)::value;
    int64_t column = 0;
    for (; column + kTileVecs * kWidth <= columns; column += kTileVecs * kWidth) {
      body(Tile<kRows, kTileVecs>{}, row, column);
    }
    for (; column < columns; column += kWidth) body(Tile<kRows, 1>{}, row, column);
  };
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    forColumns(std::integral_constant<int, kTileRows>{}, row);
  }
  for (; row < rows; ++row) forColumns(std::integral_constant<int, 1>{}, row);
}

}  // namespace ec::EC_ISA

#endif  // EC_CPU_TILE_H
