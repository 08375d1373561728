// SPDX-License-Identifier: Apache-2.0
//
// Y = W X for many rows of X, W in blocks: bound by the tensor cores, and by the memory of W while
// an expert has few rows.
//
// The rows of X are first turned into halves, with a scale each (prepareRows). A CTA of 4 warps
// then owns 128 rows of W and a tile of up to kTile rows of X, of which it multiplies as many
// groups of 16 as there are. Steps of 64 columns, of W and of X, come through shared memory, three
// of them ahead: 13 KB of W for each of the three CTAs of an SM, more than latency times bandwidth
// of any GPU. Products of a step are summed by the tensor cores with integer weights, then
// multiplied by the weights' scale; the steps are added in one order whatever the tile holds.
#ifndef EC_CUDA_GEMM_CUH
#define EC_CUDA_GEMM_CUH

#include "rows.cuh"

namespace ec::cuda {

constexpr int kTile = 64;  // rows of X in a tile
constexpr int kGemmWarps = 4, kGemmThreads = kGemmWarps * kWarp;
constexpr int kGemmRows = kGemmWarps * kBlockRows;  // of W
constexpr int kStages = 4;
constexpr int kRowGroup = 16;  // rows of X that are multiplied or left out together

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

// 16 bytes of codes that a lane takes, and which rows of eight such pieces they lie in.
__device__ __forceinline__ int pieceRow(const U4::Codes&, int i, int t) { return t + 4 * i; }
__device__ __forceinline__ int pieceRow(const I8::Codes&, int i, int t) {
  return 2 * t + i / 2 * 8 + i % 2;
}
// Pieces of a row are in an order in which lanes that load together use different banks.
__device__ __forceinline__ int pieceAt(const U4::Codes&, int row, int g) {
  return row * 8 + (g ^ 2 * (row & 3));
}
__device__ __forceinline__ int pieceAt(const I8::Codes&, int row, int g) {
  return row * 8 + (g ^ (row & 6));
}
__device__ __forceinline__ int octetAt(int row, int octet) {
  return row * 8 + (octet ^ 4 * (row & 1));
}

// One step of 64 columns in shared memory.
template <class Codec>
struct Stage {
  static constexpr int kBlock = Codec::kBytes / 16, kCodes = Codec::kScales / 16;
  static constexpr int kPieces = sizeof(typename Codec::Codes) / 16;
  static constexpr int kOctets = kGemmWarps * kBlock + kTile * 8;
  static constexpr size_t kShared = size_t(kStages) * kOctets * sizeof(uint4);

  uint4 *block, *x;  // of the warp; [kTile][8]

  __device__ __forceinline__ Stage(uint4* shared, int step, int warp)
      : block(shared + step % kStages * kOctets + warp * kBlock),
        x(shared + step % kStages * kOctets + kGemmWarps * kBlock) {}

  // A block of W, by its warp.
  __device__ __forceinline__ void copyBlock(const uint8_t* from, int lane) const {
    const uint4* pieces = reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int i = lane; i < kBlock; i += kWarp) {
      const int at = i < kCodes ? pieceAt(typename Codec::Codes(), i / 8, i % 8) : i;
      copyAsync(block + at, pieces + i);
    }
  }

  __device__ __forceinline__ typename Codec::Codes codes(int g, int t) const {
    typename Codec::Codes codes;
    uint4 pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = block[pieceAt(codes, pieceRow(codes, i, t), g)];
    memcpy(&codes, pieces, sizeof codes);
    return codes;
  }

  // sum += the warp's 32 rows of W times columns [0, count) of X, whole groups of 16.
  __device__ __forceinline__ void multiply(int count, int g, int t,
                                           float (&sum)[2][kTile / 8][4]) const {
    const typename Codec::Codes mine = codes(g, t);
    uint32_t a[2][4][4];
#pragma unroll
    for (int octet = 0; octet < 2; ++octet) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const Octet row = Codec::row(mine, octet, r);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[octet][r][i] = asWord(row.pair[i]);
      }
    }
    const uint2 scales = reinterpret_cast<const uint2*>(block + kCodes)[g];
    const float2 scale[2] = {__half22float2(asHalves(scales.x)),
                             __half22float2(asHalves(scales.y))};
#pragma unroll
    for (int column = 0; column < kTile / 8; ++column) {
      if (column / 2 * kRowGroup >= count) break;
      float c[2][4] = {};
#pragma unroll
      for (int octet = 0; octet < 2; ++octet) {
        const uint4 b = x[octetAt(column * 8 + g, t + 4 * octet)];
        const uint32_t(&rows)[4][4] = a[octet];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t(&even)[4] = rows[2 * i], (&odd)[4] = rows[2 * i + 1];
          mma16816(c[i], even[0], odd[0], even[1], odd[1], b.x, b.y);
          mma16816(c[i], even[2], odd[2], even[3], odd[3], b.z, b.w);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum[i][column][j] = fmaf(c[i][j], j < 2 ? scale[i].x : scale[i].y, sum[i][column][j]);
        }
      }
    }
  }
};

inline size_t gemmShared(const ec_weight& w) {
  return w.type == EC_U4_64 ? Stage<U4>::kShared : Stage<I8>::kShared;
}

// Rows r .. r+3 of y, of which `left` exist.
__device__ __forceinline__ void storeFour(float* to, const float (&values)[4], int left,
                                          bool aligned) {
  if (aligned && left >= 4) {
    uint4 word;
    memcpy(&word, values, sizeof word);
    *reinterpret_cast<uint4*>(to) = word;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < left) to[i] = values[i];
  }
}

// The whole CTA: `count` rows of X, the i-th being row rowOf(i) of acts, times 128 rows of W from
// `blocks` on, of which n exist. finish(i, r, values) may change rows r .. r+3 of W, from the CTA's
// first, times row i, and write nothing; then take(i, r, values) gets them. So what finish() reads
// is on its way for all values at once, whatever take() overwrites.
template <class Codec, class RowOf, class Finish, class Take>
__device__ __forceinline__ void multiplyTile(const uint8_t* blocks, int n, int k, const Acts& acts,
                                             int count, const RowOf& rowOf, const Finish& finish,
                                             const Take& take) {
  constexpr int kRowsAtOnce = kGemmThreads / 8, kParts = kTile / kRowsAtOnce;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int steps = ceilDiv(k, kGroup);
  const bool owns = warp < ceilDiv(n, kBlockRows);  // rows of W beyond its last belong to nobody
  uint4* shared = dynamicShared<uint4>();
  // Where this thread's part of the next step begins; rows of X behind the last repeat it.
  const uint8_t* block = blocks + int64_t(owns ? warp : 0) * steps * Codec::kBytes;
  const uint4* from[kParts];
  const int first = threadIdx.x / 8, octet = threadIdx.x % 8;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const int row = first + kRowsAtOnce * i;
    from[i] = acts.octets + int64_t(rowOf(row < count ? row : count - 1)) * steps * 8 + octet;
  }
  const auto stage = [&](int step) {
    if (step < steps) {
      const Stage<Codec> to(shared, step, warp);
      if (owns) to.copyBlock(block, lane);
      block += Codec::kBytes;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        if (kRowsAtOnce * i >= count) break;
        copyAsync(to.x + octetAt(first, octet) + kRowsAtOnce * 8 * i, from[i]);
        from[i] += 8;
      }
    }
    commitAsync();
  };
  static_assert(kRowsAtOnce == kRowGroup, "what is multiplied is what was copied");
  static_assert(kRowsAtOnce % 2 == 0, "octetAt() of the thread's rows is the same but for the row");
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) stage(step);
  float sum[2][kTile / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    waitAsync<kStages - 2>();
    __syncthreads();
    stage(step + kStages - 1);
    if (owns) Stage<Codec>(shared, step, warp).multiply(count, g, t, sum);
  }
  if (!owns) return;
  const int r = warp * kBlockRows + 4 * g;
#pragma unroll
  for (int column = 0; column < kTile / 8; ++column) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int i = column * 8 + 2 * t + q;
      if (i >= count) continue;
      const float scale = acts.scale[rowOf(i)];
      float values[4] = {sum[0][column][q] * scale, sum[0][column][2 + q] * scale,
                         sum[1][column][q] * scale, sum[1][column][2 + q] * scale};
      finish(i, r, values);
      sum[0][column][q] = values[0];
      sum[0][column][2 + q] = values[1];
      sum[1][column][q] = values[2];
      sum[1][column][2 + q] = values[3];
    }
  }
#pragma unroll
  for (int column = 0; column < kTile / 8; ++column) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int i = column * 8 + 2 * t + q;
      if (i >= count) continue;
      const float values[4] = {sum[0][column][q], sum[0][column][2 + q], sum[1][column][q],
                               sum[1][column][2 + q]};
      take(i, r, values);
    }
  }
}

}  // namespace ec::cuda

#endif  // EC_CUDA_GEMM_CUH
