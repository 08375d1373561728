// SPDX-License-Identifier: Apache-2.0
//
// Attention of any number of tokens of each sequence; attention.cuh has the equation.
//
// A CTA for each token takes the splits of its context one after the other. q, scores and sums are
// fp32 for both page types. Bound: fp32 arithmetic.
// Reference: edgecascade/backends/reference.py   Test: tests/test_attention_kernels.py
#include "attention.cuh"

namespace ec::cuda {
namespace {

using namespace attention;

// The sequence that owns a row, by its start; n_seq is small.
__device__ __forceinline__ int sequenceOf(const ec_step& step, int row) {
  int sequence = 0;
  while (step.start[sequence + 1] <= row) ++sequence;
  return sequence;
}

template <class Kv>
__global__ void __launch_bounds__(kThreads) appendRows(ec_step step, ec_attention a) {
  const int row = blockIdx.x;
  if (row >= liveRows(step)) return;
  const int sequence = sequenceOf(step, row);
  append<Kv>(step, a, step.slot[sequence], step.past[sequence] + row - step.start[sequence],
             a.qkv + int64_t(row) * Layout(a).row, blockIdx.y);
}

template <class Kv, int kDims>
__global__ void __launch_bounds__(kThreads, 3) attendRows(ec_step step, ec_attention a) {
  const int row = blockIdx.x;
  if (row >= liveRows(step)) return;
  const Layout m(a);
  const int sequence = sequenceOf(step, row), slot = step.slot[sequence];
  const int context = step.past[sequence] + row - step.start[sequence] + 1;
  const int kvHead = blockIdx.y / m.tiles, head0 = blockIdx.y % m.tiles * kHeads;
  const int heads = min(kHeads, m.perKv - head0), head = kvHead * m.perKv + head0;
  const Shared shared(dynamicShared<float>(), a);
  loadQueries(shared, a, a.qkv + int64_t(row) * m.row + head * a.head_dim, heads);
  float o[kDims][kHeads] = {}, part[kDims][kHeads];
  float top = -INFINITY, sum = 0.f;  // thread h < 16: of head h
  for (int first = 0; first < context; first += kSplit) {
    attendSplit<Kv, kDims>(shared, step, a, slot, kvHead, first, min(first + kSplit, context),
                           part);
    if (threadIdx.x < kHeads) {
      const int h = threadIdx.x;
      const float now = fmaxf(top, shared.top[h]);
      shared.old[h] = expf(top - now);
      shared.fresh[h] = expf(shared.top[h] - now);
      sum = sum * shared.old[h] + shared.sum[h] * shared.fresh[h];
      top = now;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kDims; ++i) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h)
        o[i][h] = o[i][h] * shared.old[h] + part[i][h] * shared.fresh[h];
    }
  }
  if (threadIdx.x < kHeads) shared.sum[threadIdx.x] = sum;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kDims; ++i) {
    const int d = threadIdx.x + kThreads * i;
    if (d >= a.head_dim) continue;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h < heads)
        a.y[(int64_t(row) * a.heads + head + h) * a.head_dim + d] = o[i][h] / shared.sum[h];
    }
  }
}

template <class Kv, int kDims>
ec_status prefill(ec_stream stream, const ec_step& step, const ec_attention& a) {
  EC_TRY(launch("attention_prefill", appendRows<Kv>, dim3(step.n_tok, a.kv_heads), kThreads, 0,
                stream, step, a));
  return launch("attention_prefill", attendRows<Kv, kDims>,
                dim3(step.n_tok, a.kv_heads * Layout(a).tiles), kThreads, Shared::bytes(a), stream,
                step, a);
}

struct Prefill {
  ec_stream stream;
  const ec_step& step;
  const ec_attention& a;
  template <class Kv, int kDims>
  ec_status operator()() const {
    return prefill<Kv, kDims>(stream, step, a);
  }
};

}  // namespace

ec_status attentionPrefillWorkspace(const ec_step& step, const ec_attention& args, size_t* bytes) {
  *bytes = 0;
  return checkShape("attention_prefill", step, args);
}

ec_status attentionPrefill(ec_stream stream, const ec_step& step, const ec_attention& args) {
  EC_TRY(checkShape("attention_prefill", step, args));
  EC_TRY(checkAttentionPointers("attention_prefill", step, args));
  return byType(args, Prefill{stream, step, args});
}

}  // namespace ec::cuda
