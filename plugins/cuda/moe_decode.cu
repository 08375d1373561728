// SPDX-License-Identifier: Apache-2.0
//
// Mixture of experts for 1 to 8 tokens in three launches; moe.cu has the equation.
//
//   first   32 rows of shared_up a CTA, and 8 rows of the router: the choice of experts is not on
//   the
//           way of the shared expert's memory
//   up      32 rows of one expert a CTA. Each CTA finds the experts itself from the router's
//   logits,
//           which costs less than a launch, and multiplies the tokens that take its expert together
//   down    32 rows of y a CTA: all taken experts in ascending order, the shared one, the residual
//
// A row of x has the same bits in any batch: which warp adds a block depends on the expert and the
// block only. Bound: memory, one read of what is taken.
// Reference: edgecascade/backends/reference.py  Test: tests/test_moe_kernels.py
#include "gemv.cuh"
#include "moe.h"
#include "moe_route.cuh"

namespace ec::cuda {
namespace {

constexpr int kDownColumns = 512;  // blocks of 64 hidden values x tokens, staged at once: 64 KB

struct Scratch {
  float* logits;     // [n_tok][experts]
  float* routed;     // [n_tok][top_k][ff] relu2(up h)
  float* shared;     // [n_tok][shared ff]
  float* routedTop;  // [n_tok][top_k][ff / 32] largest of 32 hidden values
  float* sharedTop;  // [n_tok][shared ff / 32]

  Scratch(Arena& arena, const ec_step& step, const ec_moe& args)
      : logits(arena.take<float>(int64_t(step.n_tok) * args.up.experts)),
        routed(arena.take<float>(int64_t(step.n_tok) * args.top_k * args.up.n)),
        shared(arena.take<float>(args.shared_up.data ? int64_t(step.n_tok) * args.shared_up.n : 0)),
        routedTop(
            arena.take<float>(int64_t(step.n_tok) * args.top_k * ceilDiv(args.up.n, kBlockRows))),
        sharedTop(arena.take<float>(args.shared_up.data ? int64_t(step.n_tok) *
                                                              ceilDiv(args.shared_up.n, kBlockRows)
                                                        : 0)) {}
};

// A warp stores 32 hidden values of one token, and the largest of them.
__device__ __forceinline__ void storeHidden(float value, int row, int rows, float* hidden,
                                            float* top) {
  const float h = row < rows ? relu2(value) : 0.f;
  const float largest = warpMax(h);
  if (row < rows) hidden[row] = h;
  if (row % kBlockRows == 0) *top = largest;
}

template <class Codec>
__global__ void __launch_bounds__(kThreads) first(ec_step step, ec_moe args, Scratch scratch) {
  const int n = liveRows(step), d = args.up.k;
  if (n == 0) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int blocks = args.shared_up.data ? ceilDiv(args.shared_up.n, kBlockRows) : 0;
  const int block = blockIdx.x;
  if (block < blocks) {
    const uint8_t* w = static_cast<const uint8_t*>(args.shared_up.data) +
                       int64_t(block) * ceilDiv(d, kGroup) * Codec::kBytes;
    multiplyRows<Codec>(
        w, d, args.norm, n, [&](int i) { return args.x + int64_t(i) * d; },
        [&](int i, int r, float value) {
          storeHidden(value, block * kBlockRows + r, args.shared_up.n,
                      scratch.shared + int64_t(i) * args.shared_up.n,
                      scratch.sharedTop + i * blocks + block);
        });
    return;
  }
  const int groups = args.norm.gamma ? args.norm.groups : 1, experts = args.up.experts;
  float* inverse = dynamicShared<float>();  // [8][groups]
  if (warp < n) normRow(args.x + int64_t(warp) * d, d, args.norm, inverse + warp * groups, lane);
  __syncthreads();
  const int expert = (block - blocks) * kWarps + warp;
  if (expert >= experts) return;
  routerLogits(args, expert, n, args.x, inverse, groups,
               [&](int i, float logit) { scratch.logits[int64_t(i) * experts + expert] = logit; });
}

// The choices of the step's tokens, in shared memory.
struct Choices {
  int32_t ids[kColumns * kMaxTopK];
  float weights[kColumns * kMaxTopK];
};

// The choice of a token that is `expert`; -1 if it is none.
__device__ __forceinline__ int choiceOf(const Choices& choices, int topK, int token, int expert) {
  for (int k = 0; k < topK; ++k) {
    if (choices.ids[token * topK + k] == expert) return k;
  }
  return -1;
}

template <class Codec>
__global__ void __launch_bounds__(kThreads) up(ec_step step, ec_moe args, Scratch scratch) {
  __shared__ Choices choices;
  __shared__ int found, tokens[kColumns], count;
  const int n = liveRows(step), experts = args.up.experts, topK = args.top_k, d = args.up.k;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (n == 0) return;
  if (args.force) {
    for (int i = threadIdx.x; i < n * topK; i += kThreads) choices.ids[i] = args.ids[i];
  } else if (warp < n) {
    float* scores = dynamicShared<float>() + 2 * warp * experts;
    chooseExperts(args, scratch.logits + int64_t(warp) * experts, scores, scores + experts,
                  choices.ids + warp * topK, choices.weights + warp * topK);
  }
  __syncthreads();
  if (!args.force && blockIdx.x == 0 && blockIdx.y == 0) {
    for (int i = threadIdx.x; i < n * topK; i += kThreads) {
      args.ids[i] = choices.ids[i];
      args.weights[i] = choices.weights[i];
    }
  }
  if (warp == 0) {  // this CTA's expert is the blockIdx.y-th of those that are taken
    int before = 0, mine = -1;
    for (int e0 = 0; e0 < experts && mine < 0; e0 += kWarp) {
      bool taken = false;
      for (int i = 0; i < n * topK; ++i) taken |= choices.ids[i] == e0 + lane;
      const unsigned bits = __ballot_sync(kAll, taken);
      const int rank = before + __popc(bits & ((1u << lane) - 1));
      const unsigned here = __ballot_sync(kAll, taken && rank == int(blockIdx.y));
      if (here) mine = e0 + __popc((here & (0u - here)) - 1);
      before += __popc(bits);
    }
    if (lane == 0) {
      found = mine;
      count = 0;
      for (int i = 0; mine >= 0 && i < n; ++i) {
        if (choiceOf(choices, topK, i, mine) >= 0) tokens[count++] = i;
      }
    }
  }
  __syncthreads();
  if (found < 0) return;
  const int blocks = ceilDiv(args.up.n, kBlockRows), block = blockIdx.x;
  const uint8_t* w = static_cast<const uint8_t*>(args.up.data) + args.up.expert_stride * found +
                     int64_t(block) * ceilDiv(d, kGroup) * Codec::kBytes;
  multiplyRows<Codec>(
      w, d, args.norm, count, [&](int i) { return args.x + int64_t(tokens[i]) * d; },
      [&](int i, int r, float value) {
        const int64_t slot = tokens[i] * topK + choiceOf(choices, topK, tokens[i], found);
        storeHidden(value, block * kBlockRows + r, args.up.n, scratch.routed + slot * args.up.n,
                    scratch.routedTop + slot * blocks + block);
      });
}

template <class Codec, class SharedCodec>
__global__ void __launch_bounds__(kThreads) down(ec_step step, ec_moe args, Scratch scratch) {
  __shared__ Choices choices;
  __shared__ float
      scale[kColumns * (kMaxTopK + 1)];  // of each hidden row; the shared expert's last
  __shared__ int active[kColumns * kMaxTopK], activeCount;
  const int n = liveRows(step), topK = args.top_k, rows = topK + 1;
  if (n == 0) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, t = lane % 4;
  for (int i = threadIdx.x; i < n * topK; i += kThreads) {
    choices.ids[i] = args.ids[i];
    choices.weights[i] = args.weights[i];
  }
  const int routedBlocks = ceilDiv(args.up.n, kBlockRows);
  const int sharedBlocks = args.shared_up.data ? ceilDiv(args.shared_up.n, kBlockRows) : 0;
  for (int i = warp; i < n * rows; i += kWarps) {
    const int token = i / rows, choice = i % rows;
    const bool shared = choice == topK;
    const float* tops = shared ? scratch.sharedTop + token * sharedBlocks
                               : scratch.routedTop + (token * topK + choice) * routedBlocks;
    float largest = 0.f;
    for (int j = lane; j < (shared ? sharedBlocks : routedBlocks); j += kWarp)
      largest = fmaxf(largest, tops[j]);
    largest = warpMax(largest);
    if (lane == 0) scale[i] = rowScale(largest);
  }
  __syncthreads();
  if (warp == 0) {
    int before = 0;
    for (int e0 = 0; e0 < args.up.experts; e0 += kWarp) {
      bool taken = false;
      for (int i = 0; i < n * topK; ++i) taken |= choices.ids[i] == e0 + lane;
      const unsigned bits = __ballot_sync(kAll, taken);
      if (taken) active[before + __popc(bits & ((1u << lane) - 1))] = e0 + lane;
      before += __popc(bits);
    }
    if (lane == 0) activeCount = before;
  }
  __syncthreads();

  // All blocks in a row: those of each taken expert, then the shared expert's.
  const int perExpert = ceilDiv(args.down.k, kGroup), routed = activeCount * perExpert;
  const int total = routed + (args.shared_down.data ? ceilDiv(args.shared_down.k, kGroup) : 0);
  const int phase = kDownColumns / n;
  uint4* octets = dynamicShared<uint4>();  // [phase][8][n]
  const auto hiddenOctet = [&](int v, int octet, int token) {
    if (v >= routed) {
      const float* h = scratch.shared + int64_t(token) * args.shared_up.n;
      return octetOf([&](int k) { return h[k]; }, (v - routed) * 8 + octet, args.shared_up.n,
                     1.f / scale[token * rows + topK]);
    }
    const int choice = choiceOf(choices, topK, token, active[v / perExpert]);
    if (choice < 0) return make_uint4(0, 0, 0, 0);
    const float* h = scratch.routed + (int64_t(token) * topK + choice) * args.up.n;
    return octetOf([&](int k) { return h[k]; }, v % perExpert * 8 + octet, args.up.n,
                   1.f / scale[token * rows + choice]);
  };
  const auto weightOf = [&](int token, int expert) {  // -1: the shared expert
    if (token >= n) return 0.f;
    if (expert < 0) return scale[token * rows + topK];
    const int choice = choiceOf(choices, topK, token, expert);
    return choice < 0 ? 0.f : scale[token * rows + choice] * choices.weights[token * topK + choice];
  };
  float sum[2][4] = {};
  for (int v0 = 0; v0 < total; v0 += phase) {
    const int v1 = min(v0 + phase, total);
    __syncthreads();
    for (int i = threadIdx.x; i < (v1 - v0) * 8 * n; i += kThreads) {
      octets[i] = hiddenOctet(v0 + i / n / 8, i / n % 8, i % n);
    }
    __syncthreads();
    for (int v = v0; v < v1;) {
      const bool shared = v >= routed;
      const int segment = shared ? routed : v / perExpert * perExpert;
      const int expert = shared ? -1 : active[v / perExpert];
      const int from = v - segment, to = min(v1, shared ? total : segment + perExpert) - segment;
      const int mine = from + ((warp - from - max(expert, 0)) % kWarps + kWarps) % kWarps;
      const float2 weight = make_float2(weightOf(2 * t, expert), weightOf(2 * t + 1, expert));
      if (shared) {
        const uint8_t* w = static_cast<const uint8_t*>(args.shared_down.data) +
                           int64_t(blockIdx.x) * (total - routed) * SharedCodec::kBytes;
        addBlocks<SharedCodec>(w, mine, to, v0 - segment, octets, n, weight, sum);
      } else {
        const uint8_t* w = static_cast<const uint8_t*>(args.down.data) +
                           args.down.expert_stride * expert +
                           int64_t(blockIdx.x) * perExpert * Codec::kBytes;
        addBlocks<Codec>(w, mine, to, v0 - segment, octets, n, weight, sum);
      }
      v = segment + to;
    }
  }
  reduceWarps(sum, dynamicShared<float>(), n, [&](int token, int r, float value) {
    const int row = blockIdx.x * kBlockRows + r;
    const int64_t at = int64_t(token) * args.down.n + row;
    if (row < args.down.n) args.y[at] = args.x[at] + value;
  });
}

template <class Codec, class SharedCodec>
ec_status launchDown(ec_stream stream, const ec_step& step, const ec_moe& args,
                     const Scratch& scratch) {
  const int64_t shared = args.shared_down.data ? ceilDiv(args.shared_down.k, kGroup) : 0;
  const int64_t routed = int64_t(step.n_tok) * args.top_k * ceilDiv(args.down.k, kGroup);
  const int64_t columns = (routed + shared) * step.n_tok;  // if no two tokens share an expert
  const size_t octets = size_t(columns < kDownColumns ? columns : kDownColumns) * 8 * sizeof(uint4);
  const size_t sums = size_t(kWarps) * kColumns * 33 * sizeof(float);
  return launch("moe", down<Codec, SharedCodec>, dim3(ceilDiv(args.down.n, kBlockRows)), kThreads,
                octets > sums ? octets : sums, stream, step, args, scratch);
}

}  // namespace

void moeDecodeScratch(Arena& arena, const ec_step& step, const ec_moe& args) {
  Scratch(arena, step, args);
}

ec_status moeDecode(ec_stream stream, const ec_step& step, const ec_moe& args, Arena& arena) {
  const Scratch scratch(arena, step, args);
  EC_TRY(arena.status("moe"));
  const int groups = args.norm.gamma ? args.norm.groups : 1, n = step.n_tok;
  const size_t gemv = GemvShared::bytes(n, groups, args.up.k);
  const int sharedBlocks = args.shared_up.data ? ceilDiv(args.shared_up.n, kBlockRows) : 0;
  const int ctas = sharedBlocks + (args.force ? 0 : ceilDiv(args.up.experts, kWarps));
  const bool sharedU4 = args.shared_up.type == EC_U4_64 || !args.shared_up.data;
  if (ctas > 0) {
    EC_TRY(launch("moe", sharedU4 ? first<U4> : first<I8>, dim3(ctas), kThreads, gemv, stream, step,
                  args, scratch));
  }
  const int taken = n * args.top_k < args.up.experts ? n * args.top_k : args.up.experts;
  const size_t choosing = size_t(2) * n * args.up.experts * sizeof(float);
  EC_TRY(launch("moe", args.up.type == EC_U4_64 ? up<U4> : up<I8>,
                dim3(ceilDiv(args.up.n, kBlockRows), taken), kThreads,
                gemv > choosing ? gemv : choosing, stream, step, args, scratch));
  const bool u4 = args.down.type == EC_U4_64;
  const bool sharedDownU4 = args.shared_down.type == EC_U4_64 || !args.shared_down.data;
  if (u4) {
    return sharedDownU4 ? launchDown<U4, U4>(stream, step, args, scratch)
                        : launchDown<U4, I8>(stream, step, args, scratch);
  }
  return sharedDownU4 ? launchDown<I8, U4>(stream, step, args, scratch)
                      : launchDown<I8, I8>(stream, step, args, scratch);
}

}  // namespace ec::cuda
