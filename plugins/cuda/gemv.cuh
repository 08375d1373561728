// SPDX-License-Identifier: Apache-2.0
//
// y[i] = W x[i] for 1 to 8 rows x[i], W in blocks: bound by the memory of W, which is read once.
//
// A CTA owns 32 rows of W. Its 8 warps take the blocks along k in turn, block kb to warp kb % 8,
// and their sums are added in the order of the warps: no atomics, and a row of x has the same bits
// in any batch. The 64 products of a block are summed by the tensor cores in float32 with integer
// weights, then multiplied by the weights' scale.
#ifndef EC_CUDA_GEMV_CUH
#define EC_CUDA_GEMV_CUH

#include "rows.cuh"

namespace ec::cuda {

constexpr int kStagedBlocks = 64;  // of 64 columns, held in shared memory at once: 64 KB for 8 rows

// Shared memory of one CTA, for n rows of k columns.
struct GemvShared {
  uint4* octets;   // [staged blocks][8][n]
  float* inverse;  // [n][groups]
  float* scale;    // [8] of each row
  float* sums;     // [8 warps][8 rows][33], where the octets were

  __device__ GemvShared(unsigned char* base, int n, int k)
      : octets(reinterpret_cast<uint4*>(base)),
        scale(reinterpret_cast<float*>(base + octetBytes(n, k))),
        sums(reinterpret_cast<float*>(base)) {
    inverse = scale + kColumns;
  }
  static __host__ __device__ size_t octetBytes(int n, int k) {
    const int blocks = ceilDiv(k, kGroup) < kStagedBlocks ? ceilDiv(k, kGroup) : kStagedBlocks;
    const size_t octets = size_t(blocks) * 8 * n * sizeof(uint4);
    const size_t sums = size_t(kWarps) * kColumns * 33 * sizeof(float);
    return octets > sums ? octets : sums;
  }
  static __host__ __device__ size_t bytes(int n, int groups, int k) {
    return octetBytes(n, k) + (kColumns + size_t(n) * groups) * sizeof(float);
  }
};

// sums of the lane's part of 32 rows x 8 columns over blocks first, first + 8, .. below end,
// counted from `blocks`; octets are those of block `origin` on. `weight` multiplies columns 2t and
// 2t + 1.
template <class Codec>
__device__ __forceinline__ void addBlocks(const uint8_t* blocks, int first, int end, int origin,
                                          const uint4* octets, int n, const float2& weight,
                                          float (&sum)[2][4]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int column = g < n ? g : n - 1;  // what it adds there is never read
#pragma unroll 4
  for (int kb = first; kb < end; kb += kWarps) {
    const uint8_t* block = blocks + int64_t(kb) * Codec::kBytes;
    const typename Codec::Codes codes = Codec::load(block, g, t);
    const uint2 scales = loadScales<Codec>(block, g);
    const uint4* at = octets + ((kb - origin) * 8 + t) * n + column;
    const uint4 b[2] = {at[0], at[4 * n]};
    float c[2][4] = {};
    multiplyBlock<Codec>(codes, b, c);
    const float2 tile[2] = {__half22float2(asHalves(scales.x)), __half22float2(asHalves(scales.y))};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i][0] = fmaf(c[i][0] * tile[i].x, weight.x, sum[i][0]);
      sum[i][1] = fmaf(c[i][1] * tile[i].x, weight.y, sum[i][1]);
      sum[i][2] = fmaf(c[i][2] * tile[i].y, weight.x, sum[i][2]);
      sum[i][3] = fmaf(c[i][3] * tile[i].y, weight.y, sum[i][3]);
    }
  }
}

// Adds up the warps' sums and hands (column, row of the block, value) to `take`, a warp to a
// column.
template <class Take>
__device__ __forceinline__ void reduceWarps(const float (&sum)[2][4], float* sums, int n,
                                            const Take& take) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  float* mine = sums + warp * kColumns * 33;
  __syncthreads();  // the octets are not needed any more
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    mine[2 * t * 33 + 4 * g + 2 * i] = sum[i][0];
    mine[(2 * t + 1) * 33 + 4 * g + 2 * i] = sum[i][1];
    mine[2 * t * 33 + 4 * g + 2 * i + 1] = sum[i][2];
    mine[(2 * t + 1) * 33 + 4 * g + 2 * i + 1] = sum[i][3];
  }
  __syncthreads();
  if (warp >= n) return;
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[(w * kColumns + warp) * 33 + lane];
  take(warp, lane, total);
}

// The whole CTA: rowOf(i) is row i of x, i < n; take(i, r, y) gets W's row r of this CTA times it.
template <class Codec, class RowOf, class Take>
__device__ __forceinline__ void multiplyRows(const uint8_t* blocks, int k, const ec_norm& norm,
                                             int n, const RowOf& rowOf, const Take& take) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int count = ceilDiv(k, kGroup), groups = norm.gamma ? norm.groups : 1;
  const GemvShared shared(dynamicShared<unsigned char>(), n, k);
  if (warp < count) prefetchL2(blocks + int64_t(warp) * Codec::kBytes + lane * 34);
  if (warp < n) {
    const float largest = normRow(rowOf(warp), k, norm, shared.inverse + warp * groups, lane);
    if (lane == 0) shared.scale[warp] = rowScale(largest);
  }
  float sum[2][4] = {};
  for (int origin = 0; origin < count; origin += kStagedBlocks) {
    const int end = origin + kStagedBlocks < count ? origin + kStagedBlocks : count;
    __syncthreads();
    for (int i = threadIdx.x; i < (end - origin) * 8 * n; i += kThreads) {
      const int row = i % n, octet = origin * 8 + i / n;
      const NormedRow normed{rowOf(row), norm.gamma, shared.inverse + row * groups, k / groups};
      shared.octets[i] = octetOf(normed, octet, k, 1.f / shared.scale[row]);
    }
    __syncthreads();
    addBlocks<Codec>(blocks, origin + warp, end, origin, shared.octets, n, make_float2(1.f, 1.f),
                     sum);
  }
  reduceWarps(sum, shared.sums, n,
              [&](int i, int r, float total) { take(i, r, total * shared.scale[i]); });
}

}  // namespace ec::cuda

#endif  // EC_CUDA_GEMV_CUH
