// SPDX-License-Identifier: Apache-2.0
//
// Which experts a token takes, and with what weight: score = sigmoid(router h), choice = score +
// bias, the topk_group best groups by the sum of their two best choices, of them the top_k best
// choices; weight = score / sum * scale. Ties go to the lower id. fp32 throughout. As in
// DeepSeek-V3; reference: edgecascade/backends/reference.py.
#ifndef EC_CUDA_MOE_ROUTE_CUH
#define EC_CUDA_MOE_ROUTE_CUH

#include "rows.cuh"

namespace ec::cuda {

constexpr int kMaxExperts = 512, kMaxTopK = 32;

// One warp: logits[i] = router[expert] norm(x[i]) for n rows; each row is summed in one order.
template <class Store>
__device__ __forceinline__ void routerLogits(const ec_moe& args, int expert, int n, const float* x,
                                             const float* inverse, int groups, const Store& store) {
  const int lane = threadIdx.x % kWarp, d = args.up.k;
  const float* row = args.router + int64_t(expert) * d;
  float sum[kColumns] = {};
  for (int k = lane; k < d; k += kWarp) {
    const float w = row[k];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (i >= n) continue;
      const NormedRow normed{x + int64_t(i) * d, args.norm.gamma, inverse + i * groups, d / groups};
      sum[i] = fmaf(w, normed(k), sum[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (i >= n) continue;
    const float logit = warpSum(sum[i]);
    if (lane == 0) store(i, logit);
  }
}

__device__ __forceinline__ bool isNan(float v) { return v != v; }

// Sets the choices of all groups but the topk_group best to NaN.
__device__ inline void dropGroups(const ec_moe& args, float* choices, int lane) {
  const int size = args.up.experts / args.n_group;
  const auto total = [&](int group) {
    float first = choices[group * size], second = -INFINITY;
    for (int i = 1; i < size; ++i) {
      const float v = choices[group * size + i];
      second = fmaxf(second, fminf(first, v));
      first = fmaxf(first, v);
    }
    return size > 1 ? first + second : first;
  };
  uint32_t dropped[kMaxExperts / kWarp / kWarp + 1] = {};  // bit j: group lane + 32 j
  for (int group = lane; group < args.n_group; group += kWarp) {
    const float mine = total(group);
    int better = 0;
    for (int other = 0; other < args.n_group; ++other) {
      const float theirs = total(other);
      better += theirs > mine || (theirs == mine && other < group);
    }
    if (better >= args.topk_group) dropped[group / kWarp / kWarp] |= 1u << group / kWarp % kWarp;
  }
  __syncwarp();
  for (int group = lane; group < args.n_group; group += kWarp) {
    if (!(dropped[group / kWarp / kWarp] >> group / kWarp % kWarp & 1)) continue;
    for (int i = 0; i < size; ++i) choices[group * size + i] = NAN;
  }
  __syncwarp();
}

// One warp: ids, ascending, and weights of a token. scores and choices are scratch for its experts.
__device__ inline void chooseExperts(const ec_moe& args, const float* logits, float* scores,
                                     float* choices, int32_t* ids, float* weights) {
  const int lane = threadIdx.x % kWarp, experts = args.up.experts;
  for (int e = lane; e < experts; e += kWarp) {
    scores[e] = 1.f / (1.f + expf(-logits[e]));
    const float choice = scores[e] + args.bias[e];
    choices[e] = isNan(choice) ? -INFINITY : choice;  // chosen last
  }
  __syncwarp();
  if (args.topk_group < args.n_group) dropGroups(args, choices, lane);
  for (int k = 0; k < args.top_k; ++k) {
    float best = -INFINITY;
    int id = experts;
    for (int e = lane; e < experts; e += kWarp) {
      if (choices[e] > best || (choices[e] == best && e < id)) {
        best = choices[e];
        id = e;
      }
    }
    for (int bits = 16; bits > 0; bits >>= 1) {
      const float other = __shfl_xor_sync(kAll, best, bits);
      const int otherId = __shfl_xor_sync(kAll, id, bits);
      if (other > best || (other == best && otherId < id)) {
        best = other;
        id = otherId;
      }
    }
    if (lane == 0) choices[id] = NAN;
    // Insertion keeps the ids ascending.
    if (lane == 0) {
      int at = k;
      for (; at > 0 && ids[at - 1] > id; --at) ids[at] = ids[at - 1];
      ids[at] = id;
    }
    __syncwarp();
  }
  if (lane == 0) {
    float total = 0.f;
    for (int k = 0; k < args.top_k; ++k) total += scores[ids[k]];
    const float divisor = args.normalize ? total + 1e-20f : 1.f;
    for (int k = 0; k < args.top_k; ++k) weights[k] = scores[ids[k]] / divisor * args.scale;
  }
  __syncwarp();
}

}  // namespace ec::cuda

#endif  // EC_CUDA_MOE_ROUTE_CUH
