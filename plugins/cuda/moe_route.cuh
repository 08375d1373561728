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

// An unsigned number that grows with a float; 0 for NaN.
__device__ __forceinline__ uint32_t sortKey(float v) {
  const uint32_t bits = __float_as_uint(v + 0.f);  // -0 and 0 tie
  if (isNan(v)) return 0;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// One warp: the topK best of `choices`, a bit for each in word expert / 32, which that lane
// returns.
template <int kPerLane>
__device__ __forceinline__ uint32_t bestOf(const float* choices, int experts, int topK) {
  const int lane = threadIdx.x % kWarp;
  uint32_t keys[kPerLane], taken = 0, word = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int e = lane + kWarp * j;
    keys[j] = e < experts ? sortKey(choices[e]) : 0;
  }
  for (int k = 0; k < topK; ++k) {
    uint32_t best = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) best = max(best, keys[j]);
    best = __reduce_max_sync(kAll, best);
    unsigned mine = ~0u;
#pragma unroll
    for (int j = kPerLane - 1; j >= 0; --j) mine = keys[j] == best ? lane + kWarp * j : mine;
    const unsigned id = __reduce_min_sync(kAll, mine);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (id != unsigned(lane + kWarp * j)) continue;
      keys[j] = 0;
      taken |= 1u << j;
    }
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const uint32_t bits = __ballot_sync(kAll, taken >> j & 1);
    word = lane == j ? bits : word;
  }
  return word;
}

// One warp: the set of a token's experts, as bestOf() returns it, and the scores of all. choices is
// scratch for as many.
__device__ __forceinline__ uint32_t chooseExperts(const ec_moe& args, const float* logits,
                                                  float* scores, float* choices) {
  const int lane = threadIdx.x % kWarp, experts = args.up.experts;
  for (int e = lane; e < experts; e += kWarp) {
    scores[e] = 1.f / (1.f + expf(-logits[e]));
    const float choice = scores[e] + args.bias[e];
    choices[e] = isNan(choice) ? -INFINITY : choice;  // chosen last
  }
  __syncwarp();
  if (args.topk_group < args.n_group) dropGroups(args, choices, lane);
  return experts <= 4 * kWarp ? bestOf<4>(choices, experts, args.top_k)
                              : bestOf<kMaxExperts / kWarp>(choices, experts, args.top_k);
}

// One warp: the members of a set, ascending.
template <class Id>
__device__ __forceinline__ void listSet(uint32_t word, int experts, Id* ids) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int j = 0, before = 0; j < ceilDiv(experts, kWarp); ++j) {
    const uint32_t bits = __shfl_sync(kAll, word, j);
    if (bits >> lane & 1) ids[before + __popc(bits & ((1u << lane) - 1))] = kWarp * j + lane;
    before += __popc(bits);
  }
  __syncwarp();
}

// One warp: ids and weights of the set of a token.
__device__ __forceinline__ void weighExperts(const ec_moe& args, uint32_t word, const float* scores,
                                             int32_t* ids, float* weights) {
  listSet(word, args.up.experts, ids);
  float total = 0.f;
  for (int k = 0; k < args.top_k; ++k) total += scores[ids[k]];
  const float divisor = args.normalize ? total + 1e-20f : 1.f;
  for (int k = threadIdx.x % kWarp; k < args.top_k; k += kWarp)
    weights[k] = scores[ids[k]] / divisor * args.scale;
}

}  // namespace ec::cuda

#endif  // EC_CUDA_MOE_ROUTE_CUH
