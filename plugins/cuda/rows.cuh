// SPDX-License-Identifier: Apache-2.0
//
// Rows of activations on their way into a product: the norm, and halves with a scale for each row.
//
// A block that multiplies 1 to 8 rows takes the norm itself instead of a launch of its own: reading
// 10 KB from L2 again costs it less than the gap between two launches. Each row is reduced by one
// warp in one order, so that it has the same bits in any batch.
#ifndef EC_CUDA_ROWS_CUH
#define EC_CUDA_ROWS_CUH

#include "blocks.cuh"

namespace ec::cuda {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kColumns = 8;  // rows of activations that one mma takes

// norm(x) of a row, element by element.
struct NormedRow {
  const float* x;
  const float* gamma;    // NULL: no norm
  const float* inverse;  // [groups] 1 / sqrt(mean(x^2) + eps)
  int groupSize;

  __device__ __forceinline__ float operator()(int k) const {
    return gamma ? x[k] * inverse[k / groupSize] * gamma[k] : x[k];
  }
};

// One warp: 1 / sqrt(mean + eps) of each group, and the largest magnitude after the norm.
__device__ inline float normRow(const float* x, int k, const ec_norm& norm, float* inverse,
                                int lane) {
  float largest = 0.f;
  if (!norm.gamma) {
#pragma unroll 4
    for (int i = lane; i < k; i += kWarp) largest = fmaxf(largest, fabsf(x[i]));
    return warpMax(largest);
  }
  const int size = k / norm.groups;
  for (int group = 0; group < norm.groups; ++group) {
    const float *from = x + group * size, *gamma = norm.gamma + group * size;
    float squares = 0.f, top = 0.f;
#pragma unroll 4
    for (int i = lane; i < size; i += kWarp) {
      squares = fmaf(from[i], from[i], squares);
      top = fmaxf(top, fabsf(from[i] * gamma[i]));
    }
    squares = warpSum(squares);
    const float factor = 1.f / sqrtf(squares / size + norm.eps);
    if (lane == 0) inverse[group] = factor;
    largest = fmaxf(largest, warpMax(top) * factor);
  }
  return largest;
}

// Columns [8 octet, 8 octet + 8) of a row over its scale; zero beyond its end.
template <class Row>
__device__ __forceinline__ uint4 octetOf(const Row& row, int octet, int k, float inverseScale) {
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int column = 8 * octet + i;
    v[i] = column < k ? row(column) * inverseScale : 0.f;
  }
  return packOctet(v);
}

}  // namespace ec::cuda

#endif  // EC_CUDA_ROWS_CUH
