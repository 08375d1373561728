// SPDX-License-Identifier: Apache-2.0
//
// Y = W X for many rows of X, W in blocks: bound by the tensor cores, and by the memory of W while
// an expert has few rows.
//
// The rows of X are first turned into halves, with a scale each (prepareRows). A CTA of 4 warps
// then owns 128 rows of W and a tile of up to kTile rows of X: each warp reads the codes of its 32
// rows straight into fragments and scales them there, the tile of X comes through shared memory,
// three steps of 64 columns deep. The sums run along k in one order whatever the tile holds.
#ifndef EC_CUDA_GEMM_CUH
#define EC_CUDA_GEMM_CUH

#include "rows.cuh"

namespace ec::cuda {

constexpr int kTile = 64;  // rows of X in a tile
constexpr int kGemmWarps = 4, kGemmThreads = kGemmWarps * kWarp;
constexpr int kGemmRows = kGemmWarps * kBlockRows;  // of W
constexpr int kStages = 3;
constexpr int kPitch = 9;  // uint4 from row to row of the staged tile: 8, and one against conflicts

// Rows of X as halves.
struct Acts {
  uint4* octets;  // [rows][blocks of 64 columns][8]
  float* scale;   // [rows]

  Acts(Arena& arena, int64_t rows, int64_t k)
      : octets(arena.take<uint4>(rows * ceilDiv<int64_t>(k, kGroup) * 8)),
        scale(arena.take<float>(rows)) {}
};

// One warp for each row: Acts of norm(x[rowOf(i)]).
template <class RowOf>
__global__ void __launch_bounds__(kThreads)
    prepareRows(const float* x, int k, ec_norm norm, int rows, Acts acts, RowOf rowOf) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = blockIdx.x * kWarps + warp, groups = norm.gamma ? norm.groups : 1;
  float* inverse = dynamicShared<float>() + warp * groups;
  const int source = row < rows ? rowOf(row) : -1;
  if (source < 0) return;
  const float* from = x + int64_t(source) * k;
  const float scale = rowScale(normRow(from, k, norm, inverse, lane));
  __syncwarp();
  if (lane == 0) acts.scale[row] = scale;
  const int octets = ceilDiv(k, kGroup) * 8;
  const NormedRow normed{from, norm.gamma, inverse, k / groups};
  for (int i = lane; i < octets; i += kWarp) {
    acts.octets[int64_t(row) * octets + i] = octetOf(normed, i, k, 1.f / scale);
  }
}

template <class RowOf>
ec_status prepare(const char* op, ec_stream stream, const float* x, int k, const ec_norm& norm,
                  int rows, const Acts& acts, const RowOf& rowOf) {
  const int groups = norm.gamma ? norm.groups : 1;
  return launch(op, prepareRows<RowOf>, dim3(ceilDiv(rows, kWarps)), kThreads,
                size_t(kWarps) * groups * sizeof(float), stream, x, k, norm, rows, acts, rowOf);
}

// The whole CTA: rows [first, first + count) of the tile's list, row i of it being row rowOf(i) of
// acts, times 128 rows of W from `blocks` on. take(i, r, values) gets rows r .. r+3 of W, from the
// CTA's first, times row i.
template <class Codec, class RowOf, class Take>
__device__ __forceinline__ void multiplyTile(const uint8_t* blocks, int n, int k, const Acts& acts,
                                             int count, const RowOf& rowOf, const Take& take) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int steps = ceilDiv(k, kGroup), blockRows = ceilDiv(n, kBlockRows);
  uint4* tile = dynamicShared<uint4>();  // [kStages][kTile][kPitch]
  const auto stage = [&](int step) {
    for (int i = threadIdx.x; step < steps && i < kTile * 8; i += kGemmThreads) {
      const int row = i / 8 < count ? i / 8 : count - 1;
      copyAsync(tile + (step % kStages * kTile + i / 8) * kPitch + i % 8,
                acts.octets + (int64_t(rowOf(row)) * steps + step) * 8 + i % 8);
    }
    commitAsync();
  };
  const bool owns = warp < blockRows;  // rows of W beyond its last belong to nobody
  const uint8_t* mine = blocks + int64_t(owns ? warp : 0) * steps * Codec::kBytes;
  float sum[2][kTile / 8][4] = {};
  stage(0);
  stage(1);
  typename Codec::Codes codes = Codec::load(mine, g, t);
  uint2 scales = loadScales<Codec>(mine, g);
  for (int step = 0; step < steps; ++step) {
    waitAsync<1>();
    __syncthreads();
    stage(step + 2);
    const int next = step + 1 < steps ? step + 1 : step;
    const typename Codec::Codes nextCodes = Codec::load(mine + int64_t(next) * Codec::kBytes, g, t);
    const uint2 nextScales = loadScales<Codec>(mine + int64_t(next) * Codec::kBytes, g);
    const uint4* x = tile + step % kStages * kTile * kPitch;
#pragma unroll
    for (int octet = 0; octet < 2; ++octet) {
      uint32_t a[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t pair = r < 2 ? scales.x : scales.y;
        const __half2 scale = both(static_cast<uint16_t>(r % 2 ? pair >> 16 : pair));
        const Octet row = Codec::row(codes, octet, r);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[r][i] = asWord(__hmul2(row.pair[i], scale));
      }
#pragma unroll
      for (int column = 0; column < kTile / 8; ++column) {
        const uint4 b = x[(column * 8 + g) * kPitch + t + 4 * octet];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float(&c)[4] = sum[i][column];
          mma16816(c, a[2 * i][0], a[2 * i + 1][0], a[2 * i][1], a[2 * i + 1][1], b.x, b.y);
          mma16816(c, a[2 * i][2], a[2 * i + 1][2], a[2 * i][3], a[2 * i + 1][3], b.z, b.w);
        }
      }
    }
    codes = nextCodes;
    scales = nextScales;
  }
  if (!owns) return;
#pragma unroll
  for (int column = 0; column < kTile / 8; ++column) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int i = column * 8 + 2 * t + q;
      if (i >= count) continue;
      const float scale = acts.scale[rowOf(i)];
      const float values[4] = {sum[0][column][q] * scale, sum[0][column][2 + q] * scale,
                               sum[1][column][q] * scale, sum[1][column][2 + q] * scale};
      take(i, warp * kBlockRows + 4 * g, values);
    }
  }
}

constexpr size_t kGemmShared = size_t(kStages) * kTile * kPitch * sizeof(uint4);

}  // namespace ec::cuda

#endif  // EC_CUDA_GEMM_CUH
