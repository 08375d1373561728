// SPDX-License-Identifier: Apache-2.0
//
// Mixture of experts, from the norm to the residual.
//
//   h = norm(x),  score = sigmoid(router h),  choice = score + bias
//   y = x + sum over the chosen e, ascending, of weight_e down_e relu2(up_e h) + shared_down
//   relu2(shared_up h)
//
//   x, y [n_tok][d] float32, router [experts][d] float32, up [experts][ff][d] and down
//   [experts][d][ff] of any type
//
//   1 to 8 tokens, blocks   moe_decode.cu    bound by the memory of the experts that are taken
//   more tokens, blocks     moe_prefill.cu   bound by the memory of all experts, then by tensor
//   cores a float matrix          here             exact, for small models and for tests
//
// Reference: edgecascade/backends/reference.py  Test: tests/test_moe_kernels.py
#include "moe.h"
#include "moe_route.cuh"

namespace ec::cuda {
namespace {

constexpr int kRouteWarps = 16, kRouteThreads = kRouteWarps * kWarp;
constexpr int kExpertsAtOnce = 4;
constexpr size_t kRouteShared = 98 << 10;  // what a CTA of every GPU may plan with

// logits[i][e] = router[e] h[i] for the CTA's n rows; h [n][d] in shared memory.
__device__ __forceinline__ void routerRows(const ec_moe& args, int n, const float* h,
                                           float* logits) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int d = args.up.k, experts = args.up.experts;
  for (int e0 = warp * kExpertsAtOnce; e0 < experts; e0 += kRouteWarps * kExpertsAtOnce) {
    float sum[kExpertsAtOnce][kColumns] = {};
#pragma unroll 4
    for (int k = lane; k < d; k += kWarp) {
      float w[kExpertsAtOnce];
#pragma unroll
      for (int j = 0; j < kExpertsAtOnce; ++j)
        w[j] = e0 + j < experts ? args.router[int64_t(e0 + j) * d + k] : 0.f;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const float value = i < n ? h[i * d + k] : 0.f;
#pragma unroll
        for (int j = 0; j < kExpertsAtOnce; ++j) sum[j][i] = fmaf(w[j], value, sum[j][i]);
      }
    }
#pragma unroll
    for (int j = 0; j < kExpertsAtOnce; ++j) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const float logit = warpSum(sum[j][i]);
        if (lane == 0 && e0 + j < experts && i < n) logits[i * experts + e0 + j] = logit;
      }
    }
  }
}

// Eight tokens to a CTA, so that the router's matrix is read once for them. `staged`: there is room
// for their rows after the norm.
__global__ void __launch_bounds__(kRouteThreads) routeRows(ec_step step, ec_moe args, bool staged) {
  const int first = blockIdx.x * kColumns, n = min(liveRows(step) - first, kColumns);
  if (n <= 0) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int groups = args.norm.gamma ? args.norm.groups : 1, experts = args.up.experts;
  const int d = args.up.k;
  float* logits = dynamicShared<float>();         // [8][experts]
  float* scores = logits + kColumns * experts;    // [8][experts]
  float* choices = scores + kColumns * experts;   // [8][experts]
  float* inverse = choices + kColumns * experts;  // [8][groups]
  float* h = inverse + kColumns * groups;         // [8][d]
  const float* x = args.x + int64_t(first) * d;
  if (warp < n) normRow(x + int64_t(warp) * d, d, args.norm, inverse + warp * groups, lane);
  __syncthreads();
  if (staged) {
    for (int i = warp; i < n; i += kRouteWarps) {
      const NormedRow normed{x + int64_t(i) * d, args.norm.gamma, inverse + i * groups, d / groups};
      for (int k = lane; k < d; k += kWarp) h[i * d + k] = normed(k);
    }
    __syncthreads();
    routerRows(args, n, h, logits);
  } else {
    for (int e = warp; e < experts; e += kRouteWarps) {
      routerLogits(args, e, n, x, inverse, groups,
                   [&](int i, float logit) { logits[i * experts + e] = logit; });
    }
  }
  __syncthreads();
  if (warp >= n) return;
  const int64_t at = int64_t(first + warp) * args.top_k;
  const uint32_t word = chooseExperts(args, logits + warp * experts, scores + warp * experts,
                                      choices + warp * experts);
  weighExperts(args, word, scores + warp * experts, args.ids + at, args.weights + at);
}

struct PlainScratch {
  float* routed;  // [n_tok][top_k][ff]
  float* shared;  // [n_tok][shared ff]
  PlainScratch(Arena& arena, const ec_step& step, const ec_moe& args)
      : routed(arena.take<float>(int64_t(step.n_tok) * args.top_k * args.up.n)),
        shared(
            arena.take<float>(args.shared_up.data ? int64_t(step.n_tok) * args.shared_up.n : 0)) {}
};

// One warp: W[expert][row] h, h of the warp's own choosing.
template <class Row>
__device__ __forceinline__ float dot(const ec_weight& w, int expert, int row, const Row& h) {
  float sum = 0.f;
  for (int k = threadIdx.x % kWarp; k < w.k; k += kWarp)
    sum = fmaf(weightAt(w, expert, row, k), h(k), sum);
  return warpSum(sum);
}

__global__ void __launch_bounds__(kThreads)
    plainUp(ec_step step, ec_moe args, PlainScratch scratch) {
  const int token = blockIdx.y, choice = blockIdx.z;  // choice top_k: the shared expert
  if (token >= liveRows(step)) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int groups = args.norm.gamma ? args.norm.groups : 1;
  float* inverse = dynamicShared<float>();
  const float* x = args.x + int64_t(token) * args.up.k;
  if (warp == 0) normRow(x, args.up.k, args.norm, inverse, lane);
  __syncthreads();
  const NormedRow normed{x, args.norm.gamma, inverse, args.up.k / groups};
  const bool shared = choice == args.top_k;
  const ec_weight& w = shared ? args.shared_up : args.up;
  const int64_t slot = int64_t(token) * args.top_k + choice;
  const int expert = shared ? 0 : args.ids[slot];
  float* to = shared ? scratch.shared + int64_t(token) * w.n : scratch.routed + slot * w.n;
  const int end = min(w.n, int(blockIdx.x + 1) * kBlockRows);
  for (int r = blockIdx.x * kBlockRows + warp; r < end; r += kWarps) {
    const float value = relu2(dot(w, expert, r, normed));
    if (lane == 0) to[r] = value;
  }
}

__global__ void __launch_bounds__(kThreads)
    plainDown(ec_step step, ec_moe args, PlainScratch scratch) {
  const int token = blockIdx.y, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (token >= liveRows(step)) return;
  const int end = min(args.down.n, int(blockIdx.x + 1) * kBlockRows);
  for (int r = blockIdx.x * kBlockRows + warp; r < end; r += kWarps) {
    float sum = 0.f;
    for (int k = 0; k < args.top_k; ++k) {
      const int64_t slot = int64_t(token) * args.top_k + k;
      const float* h = scratch.routed + slot * args.up.n;
      sum += args.weights[slot] * dot(args.down, args.ids[slot], r, [&](int i) { return h[i]; });
    }
    if (args.shared_down.data) {
      const float* h = scratch.shared + int64_t(token) * args.shared_up.n;
      sum += dot(args.shared_down, 0, r, [&](int i) { return h[i]; });
    }
    const int64_t at = int64_t(token) * args.down.n + r;
    if (lane == 0) args.y[at] = args.x[at] + sum;
  }
}

bool isBlocks(const ec_moe& args) {
  const bool shared = !args.shared_up.data ||
                      (isBlockType(args.shared_up.type) && isBlockType(args.shared_down.type));
  return isBlockType(args.up.type) && isBlockType(args.down.type) && shared;
}

struct Path {
  void (*scratch)(Arena&, const ec_step&, const ec_moe&);
  ec_status (*run)(ec_stream, const ec_step&, const ec_moe&, Arena&);
};

Path pathOf(const ec_step& step, const ec_moe& args) {
  if (!isBlocks(args)) return {moePlainScratch, moePlain};
  return step.n_tok <= kColumns ? Path{moeDecodeScratch, moeDecode}
                                : Path{moePrefillScratch, moePrefill};
}

ec_status checkShape(const ec_step& step, const ec_moe& args) {
  EC_TRY(checkMoeShape(step, args));
  if (args.up.experts > kMaxExperts || args.top_k > kMaxTopK) {
    return fail(EC_UNSUPPORTED, "moe: %d experts, top_k %d; this backend takes at most %d and %d",
                args.up.experts, args.top_k, kMaxExperts, kMaxTopK);
  }
  return EC_OK;
}

}  // namespace

ec_status routeTokens(ec_stream stream, const ec_step& step, const ec_moe& args) {
  if (args.force) return EC_OK;
  const int groups = args.norm.gamma ? args.norm.groups : 1;
  const size_t least = size_t(kColumns) * (3 * args.up.experts + groups) * sizeof(float);
  const size_t rows = size_t(kColumns) * args.up.k * sizeof(float);
  const bool staged = least + rows <= kRouteShared;
  return launch("moe", routeRows, dim3(ceilDiv(step.n_tok, kColumns)), kRouteThreads,
                staged ? least + rows : least, stream, step, args, staged);
}

void moePlainScratch(Arena& arena, const ec_step& step, const ec_moe& args) {
  PlainScratch(arena, step, args);
}

ec_status moePlain(ec_stream stream, const ec_step& step, const ec_moe& args, Arena& arena) {
  const PlainScratch scratch(arena, step, args);
  EC_TRY(arena.status("moe"));
  EC_TRY(routeTokens(stream, step, args));
  const int groups = args.norm.gamma ? args.norm.groups : 1;
  const int widest =
      args.shared_up.data && args.shared_up.n > args.up.n ? args.shared_up.n : args.up.n;
  const dim3 up(ceilDiv(widest, kBlockRows), step.n_tok,
                args.top_k + (args.shared_up.data ? 1 : 0));
  EC_TRY(launch("moe", plainUp, up, kThreads, groups * sizeof(float), stream, step, args, scratch));
  return launch("moe", plainDown, dim3(ceilDiv(args.down.n, kBlockRows), step.n_tok), kThreads, 0,
                stream, step, args, scratch);
}

ec_status moeWorkspace(const ec_step& step, const ec_moe& args, size_t* bytes) {
  EC_TRY(checkShape(step, args));
  Arena arena;
  pathOf(step, args).scratch(arena, step, args);
  *bytes = arena.bytes();
  return EC_OK;
}

ec_status moe(ec_stream stream, const ec_step& step, const ec_moe& args) {
  EC_TRY(checkShape(step, args));
  EC_TRY(checkMoePointers(args));
  Arena arena(step);
  return pathOf(step, args).run(stream, step, args, arena);
}

}  // namespace ec::cuda
