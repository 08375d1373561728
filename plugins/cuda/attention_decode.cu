// SPDX-License-Identifier: Apache-2.0
//
// Attention of one token of each sequence; attention.cuh has the equation.
//
// The splits of the context go in parallel, and a second launch joins them. q, scores and sums are
// fp32 for both page types. Bound: memory of K and V.
// Reference: edgecascade/backends/reference.py   Test: tests/test_attention_kernels.py
#include "ahead.cuh"
#include "attention.cuh"

namespace ec::cuda {
namespace {

using namespace attention;

// m, l and o of each split: [sequence][head][split][2 + head_dim].
template <class Kv, int kDims>
__global__ void __launch_bounds__(kThreads, 3)
    attendSplits(ec_step step, ec_attention a, float* partial, Ahead ahead) {
  startDependents();
  awaitEarlier();
  prefetch(ahead);  // of what follows joinSplits, which moves next to nothing
  const int sequence = blockIdx.z, splits = gridDim.x;
  if (sequence >= liveSequences(step)) return;
  const Layout m(a);
  const int slot = step.slot[sequence], position = step.past[sequence];
  const int first = blockIdx.x * kSplit, end = min(first + kSplit, position + 1);
  if (first >= end) return;
  const int kvHead = blockIdx.y / m.tiles, head0 = blockIdx.y % m.tiles * kHeads;
  const int heads = min(kHeads, m.perKv - head0), head = kvHead * m.perKv + head0;
  const float* row = a.qkv + int64_t(step.start[sequence]) * m.row;
  const Shared shared(dynamicShared<float>(), a);
  if (position < end) append<Kv>(step, a, slot, position, row, kvHead);
  loadQueries(shared, a, row + head * a.head_dim, heads);
  float o[kDims][kHeads];
  attendSplit<Kv, kDims>(shared, step, a, slot, kvHead, first, end, o);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= heads) continue;
    float* to = partial +
                ((int64_t(sequence) * a.heads + head + h) * splits + blockIdx.x) * (2 + a.head_dim);
    if (threadIdx.x == 0) {
      to[0] = shared.top[h];
      to[1] = shared.sum[h];
    }
#pragma unroll
    for (int i = 0; i < kDims; ++i) {
      const int d = threadIdx.x + kThreads * i;
      if (d < a.head_dim) to[2 + d] = o[i][h];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    joinSplits(ec_step step, ec_attention a, const float* partial, int splits) {
  startDependents();
  awaitEarlier();
  const int head = blockIdx.x, sequence = blockIdx.y;
  if (sequence >= liveSequences(step)) return;
  const int used = ceilDiv(step.past[sequence] + 1, kSplit);
  const float* from = partial + (int64_t(sequence) * a.heads + head) * splits * (2 + a.head_dim);
  for (int d = threadIdx.x; d < a.head_dim; d += kThreads) {
    float top = -INFINITY, sum = 0.f, o = 0.f;
    for (int i = 0; i < used; ++i) {
      const float* split = from + int64_t(i) * (2 + a.head_dim);
      const float now = fmaxf(top, split[0]), old = expf(top - now), fresh = expf(split[0] - now);
      sum = fmaf(sum, old, split[1] * fresh);  // as in attention_prefill.cu, to the bit
      o = fmaf(o, old, split[2 + d] * fresh);
      top = now;
    }
    a.y[(int64_t(step.start[sequence]) * a.heads + head) * a.head_dim + d] = o / sum;
  }
}

struct Scratch {
  int splits;
  float* partial;
  Scratch(Arena& arena, const ec_step& step, const ec_attention& a)
      : splits(ceilDiv(step.max_context, kSplit)),
        partial(arena.take<float>(int64_t(step.n_seq) * a.heads * splits * (2 + a.head_dim))) {}
};

template <class Kv, int kDims>
ec_status decode(ec_stream stream, const ec_step& step, const ec_attention& a,
                 const Scratch& scratch) {
  const dim3 grid(scratch.splits, a.kv_heads * Layout(a).tiles, step.n_seq);
  EC_TRY(launchEarly("attention_decode", attendSplits<Kv, kDims>, grid, kThreads, Shared::bytes(a),
                     stream, step, step, a, scratch.partial, aheadOf(step)));
  return launchEarly("attention_decode", joinSplits, dim3(a.heads, step.n_seq), kThreads, 0, stream,
                     step, step, a, scratch.partial, scratch.splits);
}

struct Decode {
  ec_stream stream;
  const ec_step& step;
  const ec_attention& a;
  const Scratch& scratch;
  template <class Kv, int kDims>
  ec_status operator()() const {
    return decode<Kv, kDims>(stream, step, a, scratch);
  }
};

}  // namespace

ec_status attentionDecodeWorkspace(const ec_step& step, const ec_attention& args, size_t* bytes) {
  EC_TRY(checkShape("attention_decode", step, args));
  Arena arena;
  Scratch(arena, step, args);
  *bytes = arena.bytes();
  return EC_OK;
}

ec_status attentionDecode(ec_stream stream, const ec_step& step, const ec_attention& args) {
  EC_TRY(checkShape("attention_decode", step, args));
  EC_TRY(checkAttentionPointers("attention_decode", step, args));
  Arena arena(step);
  const Scratch scratch(arena, step, args);
  EC_TRY(arena.status("attention_decode"));
  if (step.n_seq == 0) return EC_OK;
  return byType(args, Decode{stream, step, args, scratch});
}

}  // namespace ec::cuda
