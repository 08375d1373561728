// SPDX-License-Identifier: Apache-2.0
//
// store(i, r, (W norm(x[rowOf(i)]))[r]) for rows i of the step, any type of W: the launches that
// linear and head share.
//
//   1 to 8 rows, blocks   one launch, gemv.cuh
//   more rows, blocks     two launches, gemm.cuh
//   float weights         one launch of plain float32 sums: exact, for small models and for tests
//
// So a row has the same bits in every step of up to 8 rows, and in every longer one; between the
// two the rounding differs (tests/tolerances.py).
#ifndef EC_CUDA_PRODUCT_CUH
#define EC_CUDA_PRODUCT_CUH

#include "gemm.cuh"
#include "gemv.cuh"

namespace ec::cuda {

// Rows [from, to) of a matrix's blocks, 32 rows of it each.
template <class Codec>
struct RowsOfBlocks {
  const uint8_t* data;
  int from, to, perRow;

  // This CTA's share of them.
  __device__ RowsOfBlocks(const ec_weight& w, int cta, int ctas)
      : data(static_cast<const uint8_t*>(w.data)), perRow(ceilDiv(w.k, kGroup)) {
    const int64_t rows = ceilDiv(w.n, kBlockRows);
    from = static_cast<int>(rows * cta / ctas);
    to = static_cast<int>(rows * (cta + 1) / ctas);
  }
  __device__ __forceinline__ int size() const { return to - from; }
  __device__ __forceinline__ int blocks(int) const { return perRow; }
  __device__ __forceinline__ int start(int, int warp) const { return warp; }
  __device__ __forceinline__ int bytes(int) const { return Codec::kBytes; }
  __device__ __forceinline__ const uint8_t* base(int row) const {
    return firstPiece<Codec>(data + int64_t(from + row) * perRow * Codec::kBytes);
  }
  __device__ __forceinline__ void copy(int, const uint8_t* from, unsigned char* slot) const {
    copyBlock<Codec>(from, slot);
  }
};

// RowOf: ec_step step; __device__ int count() - rows that matter; int operator()(int i) - row of x,
// or -1. It reads the step's arrays only.
// Store: float* at(i, r) - where a product goes; float value(i, r, product) - what is stored there;
// operator()(i, r, product) stores it.
template <class Codec, int kWarps, class RowOf, class Store>
__global__ void __launch_bounds__(kWarps* kWarp, kCtasAtOnce<Codec, kWarps>)
    fewRows(const float* x, ec_weight w, ec_norm norm, GemvShape shape, Ahead ahead, RowOf rowOf,
            Store store) {
  startDependents();
  const GemvShared shared(shape);
  const RowsOfBlocks<Codec> segments(w, blockIdx.x, gridDim.x);
  Ring<kWarps, kDepth<Codec, kWarps>> ring(shared.base, shape.slotBytes);
  ring.finish(segments);
  const int n = rowOf.count();
  const auto rows = normedRows([&](int i) { return x + int64_t(max(shared.source()[i], 0)) * w.k; },
                               norm, n, w.k);
  rows.holdGamma(shared, shape);
  if (int(threadIdx.x) < n) shared.source()[threadIdx.x] = rowOf(threadIdx.x);
  __syncthreads();
  awaitEarlier();
  if (n == 0) return ring.drain();
  multiplySegments<Codec, kWarps>(ring, segments, rows, shared, ahead,
                                  [&](int segment, int i, int r, float value) {
                                    const int at = (segments.from + segment) * kBlockRows + r;
                                    if (at < w.n && shared.source()[i] >= 0) store(i, at, value);
                                  });
}

template <class Codec, class RowOf, class Store>
__global__ void __launch_bounds__(kGemmThreads, 3)
    manyRows(ec_weight w, Acts acts, RowOf rowOf, Store store) {
  const int first = blockIdx.y * kTile, count = min(rowOf.count() - first, kTile);
  if (count <= 0) return;
  const int row0 = blockIdx.x * kGemmRows;
  const uint8_t* blocks = static_cast<const uint8_t*>(w.data) +
                          int64_t(row0 / kBlockRows) * ceilDiv(w.k, kGroup) * Codec::kBytes;
  multiplyTile<Codec>(
      blocks, w.n - row0, w.k, acts, count, [&](int i) { return first + i; },
      [&](int i, int r, float(&values)[4]) {
        if (rowOf(first + i) < 0) return;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (row0 + r + j < w.n) values[j] = store.value(first + i, row0 + r + j, values[j]);
        }
      },
      [&](int i, int r, const float(&values)[4]) {
        if (rowOf(first + i) < 0) return;
        storeFour(store.at(first + i, row0 + r), values, w.n - row0 - r, w.n % 4 == 0);
      });
}

template <class RowOf, class Store>
__global__ void __launch_bounds__(kThreads)
    floatRows(const float* x, ec_weight w, ec_norm norm, RowOf rowOf, Store store) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int groups = norm.gamma ? norm.groups : 1, first = blockIdx.y * kColumns;
  const int n = min(rowOf.count() - first, kColumns);
  float* inverse = dynamicShared<float>();  // [8][groups]
  if (warp < n && rowOf(first + warp) >= 0) {
    normRow(x + int64_t(rowOf(first + warp)) * w.k, w.k, norm, inverse + warp * groups, lane);
  }
  __syncthreads();
  const int row0 = blockIdx.x * kBlockRows;
  for (int r = row0 + warp; r < min(w.n, row0 + kBlockRows); r += kWarps) {
    for (int i = 0; i < n; ++i) {
      const int row = rowOf(first + i);
      if (row < 0) continue;
      const NormedRow normed{x + int64_t(row) * w.k, norm.gamma, inverse + i * groups,
                             w.k / groups};
      float sum = 0.f;
#pragma unroll 4
      for (int k = lane; k < w.k; k += kWarp) sum = fmaf(weightAt(w, 0, r, k), normed(k), sum);
      sum = warpSum(sum);
      if (lane == 0) store(first + i, r, sum);
    }
  }
}

struct ProductScratch {
  bool tiled;
  Acts acts;
  ProductScratch(Arena& arena, const ec_weight& w, int rows)
      : tiled(isBlockType(w.type) && rows > kColumns), acts(arena, tiled ? rows : 0, w.k) {}
};

// Rows that prepare() made acts of.
template <class RowOf, class Store>
ec_status tiledProduct(const char* op, ec_stream stream, const ec_weight& w, const Acts& acts,
                       int rows, const RowOf& rowOf, const Store& store) {
  const dim3 grid(ceilDiv(w.n, kGemmRows), ceilDiv(rows, kTile));
  return launch(op, w.type == EC_U4_64 ? manyRows<U4, RowOf, Store> : manyRows<I8, RowOf, Store>,
                grid, kGemmThreads, gemmShared(w), stream, w, acts, rowOf, store);
}

// As many CTAs as the device runs at once, and no more than there are rows of blocks.
template <class Codec, int kWarps, class RowOf, class Store>
ec_status launchFewRows(const char* op, ec_stream stream, const float* x, const ec_weight& w,
                        const ec_norm& norm, int rows, const RowOf& rowOf, const Store& store) {
  const auto kernel = fewRows<Codec, kWarps, RowOf, Store>;
  const GemvCall call = gemvCall<Codec, kWarps>(kernel, rows, ceilDiv(w.n, kBlockRows), w.k, norm);
  return launchEarly(op, kernel, dim3(call.ctas), kWarps * kWarp, call.shared, stream, rowOf.step,
                     x, w, norm, call.shape, aheadOf(rowOf.step), rowOf, store);
}

template <class Codec, class RowOf, class Store>
ec_status blockProduct(const char* op, ec_stream stream, const float* x, const ec_weight& w,
                       const ec_norm& norm, int rows, const ProductScratch& scratch,
                       const RowOf& rowOf, const Store& store) {
  if (!scratch.tiled) {
    return warpsFor(ceilDiv(w.n, kBlockRows)) == kFewWarps
               ? launchFewRows<Codec, kFewWarps>(op, stream, x, w, norm, rows, rowOf, store)
               : launchFewRows<Codec, kManyWarps>(op, stream, x, w, norm, rows, rowOf, store);
  }
  EC_TRY(prepare(op, stream, x, w.k, norm, rows, scratch.acts, rowOf));
  return tiledProduct(op, stream, w, scratch.acts, rows, rowOf, store);
}

template <class RowOf, class Store>
ec_status product(const char* op, ec_stream stream, const float* x, const ec_weight& w,
                  const ec_norm& norm, int rows, const ProductScratch& scratch, const RowOf& rowOf,
                  const Store& store) {
  if (w.type == EC_U4_64)
    return blockProduct<U4>(op, stream, x, w, norm, rows, scratch, rowOf, store);
  if (w.type == EC_I8_64)
    return blockProduct<I8>(op, stream, x, w, norm, rows, scratch, rowOf, store);
  const int groups = norm.gamma ? norm.groups : 1;
  return launch(op, floatRows<RowOf, Store>,
                dim3(ceilDiv(w.n, kBlockRows), ceilDiv(rows, kColumns)), kThreads,
                size_t(kColumns) * groups * sizeof(float), stream, x, w, norm, rowOf, store);
}

}  // namespace ec::cuda

#endif  // EC_CUDA_PRODUCT_CUH
