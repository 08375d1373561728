// SPDX-License-Identifier: Apache-2.0
//
// Grouped-query attention over paged keys and values, without positional encoding:
//
//   y[t][h] = sum over i <= position(t) of softmax_i(scale q[t][h] . k[i][g]) v[i][g],   g = h /
//   (heads / kv_heads)
//
// Shapes: qkv [n_tok][(heads + 2 kv_heads) head_dim]; kv [pages][2][kv_heads][64][head_dim] fp32 or
// fp16, position p of a slot in page page_table[slot][p / 64]; y [n_tok][heads head_dim]. The
// step's keys and values are appended first. q, scores and sums are fp32 for both page types.
//
// The context is cut into splits of 256 positions, whose maximum m, sum l of exp(score - m) and sum
// o of exp(score - m) v are joined in ascending order: the bits of a row depend on nothing else. Up
// to 16 heads that share a key head go through a split together, so that its keys and values are
// read once. Decode takes the splits in parallel and joins them in a second launch; prefill, one
// CTA for each token, one after the other. Bound: decode by the memory of K and V, prefill by fp32
// arithmetic. Reference: edgecascade/backends/reference.py   Test: tests/test_attention_kernels.py
#include <cmath>

#include "kernels.h"
#include "platform.h"

namespace ec::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kSplit = 256, kHeads = 16;
constexpr int kMaxHeadDim = 384;

struct Layout {
  int perKv, tiles, row;  // query heads of a key head, tiles of them, values of a row of qkv
  __host__ __device__ explicit Layout(const ec_attention& a)
      : perKv(a.heads / a.kv_heads),
        tiles(ceilDiv(perKv, kHeads)),
        row((a.heads + 2 * a.kv_heads) * a.head_dim) {}
};

enum Half { kKeys = 0, kValues = 1 };

// First of head_dim values, counted from kv.
__device__ __forceinline__ int64_t valuesAt(const ec_step& step, const ec_attention& a, int slot,
                                            Half half, int kvHead, int position) {
  const int page = step.page_table[int64_t(slot) * step.max_pages + position / EC_PAGE_TOKENS];
  return (((int64_t(page) * 2 + half) * a.kv_heads + kvHead) * EC_PAGE_TOKENS +
          position % EC_PAGE_TOKENS) *
         a.head_dim;
}

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ void narrow(float v, float* to) { *to = v; }
__device__ __forceinline__ void narrow(float v, __half* to) { *to = __float2half_rn(v); }

// The key and value of one token and key head, by all threads of the CTA.
template <class Kv>
__device__ void append(const ec_step& step, const ec_attention& a, int slot, int position,
                       const float* row, int kvHead) {
  Kv* kv = static_cast<Kv*>(a.kv);
  const float *key = row + (a.heads + kvHead) * a.head_dim, *value = key + a.kv_heads * a.head_dim;
  const int64_t keys = valuesAt(step, a, slot, kKeys, kvHead, position),
                values = valuesAt(step, a, slot, kValues, kvHead, position);
  for (int i = threadIdx.x; i < a.head_dim; i += kThreads) {
    narrow(key[i], kv + keys + i);
    narrow(value[i], kv + values + i);
  }
}

// Up to 16 heads of one token against the positions of one split.
struct Shared {
  float* q;       // [head_dim][16], times the scale
  float* scores;  // [kSplit][16], then exp(score - m)
  float* top;     // [16] m
  float* sum;     // [16] l
  float* old;     // [16] what the splits so far are multiplied by when this one joins them
  float* fresh;   // [16] what this one is
  __device__ Shared(float* base, const ec_attention& a)
      : q(base),
        scores(q + a.head_dim * kHeads),
        top(scores + kSplit * kHeads),
        sum(top + kHeads),
        old(sum + kHeads),
        fresh(old + kHeads) {}
  static size_t bytes(const ec_attention& a) {
    return size_t(a.head_dim * kHeads + kSplit * kHeads + 4 * kHeads) * sizeof(float);
  }
};

__device__ void loadQueries(const Shared& s, const ec_attention& a, const float* q, int heads) {
  for (int i = threadIdx.x; i < kHeads * a.head_dim; i += kThreads) {
    const int head = i / a.head_dim, d = i % a.head_dim;
    s.q[d * kHeads + head] = head < heads ? q[head * a.head_dim + d] * a.scale : 0.f;
  }
  __syncthreads();
}

// m, l and o of positions [first, end); o[i] is dimension threadIdx.x + 128 i of each head.
template <class Kv, int kDims>
__device__ void attendSplit(const Shared& s, const ec_step& step, const ec_attention& a, int slot,
                            int kvHead, int first, int end, float (&o)[kDims][kHeads]) {
  const Kv* kv = static_cast<const Kv*>(a.kv);
  for (int position = first + threadIdx.x; position < end; position += kThreads) {
    const Kv* key = kv + valuesAt(step, a, slot, kKeys, kvHead, position);
    float score[kHeads] = {};
    for (int d = 0; d < a.head_dim; ++d) {
      const float k = widen(key[d]);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) score[h] = fmaf(k, s.q[d * kHeads + h], score[h]);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) s.scores[(position - first) * kHeads + h] = score[h];
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, count = end - first;
  for (int h = warp; h < kHeads; h += kWarps) {
    float top = -INFINITY, sum = 0.f;
    for (int i = lane; i < count; i += kWarp) top = fmaxf(top, s.scores[i * kHeads + h]);
    top = warpMax(top);
    for (int i = lane; i < count; i += kWarp) {
      const float p = expf(s.scores[i * kHeads + h] - top);
      s.scores[i * kHeads + h] = p;
      sum += p;
    }
    sum = warpSum(sum);
    if (lane == 0) {
      s.top[h] = top;
      s.sum[h] = sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kDims; ++i) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) o[i][h] = 0.f;
    const int d = threadIdx.x + kThreads * i;
    if (d >= a.head_dim) continue;
    for (int position = first; position < end; ++position) {
      const float v = widen(kv[valuesAt(step, a, slot, kValues, kvHead, position) + d]);
      const float* p = s.scores + (position - first) * kHeads;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) o[i][h] = fmaf(p[h], v, o[i][h]);
    }
  }
  __syncthreads();
}

// m, l and o of each split: [sequence][head][split][2 + head_dim].
template <class Kv, int kDims>
__global__ void __launch_bounds__(kThreads, 3)
    attendSplits(ec_step step, ec_attention a, float* partial) {
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
  const int head = blockIdx.x, sequence = blockIdx.y;
  if (sequence >= liveSequences(step)) return;
  const int used = ceilDiv(step.past[sequence] + 1, kSplit);
  const float* from = partial + (int64_t(sequence) * a.heads + head) * splits * (2 + a.head_dim);
  for (int d = threadIdx.x; d < a.head_dim; d += kThreads) {
    float top = -INFINITY, sum = 0.f, o = 0.f;
    for (int i = 0; i < used; ++i) {
      const float* split = from + int64_t(i) * (2 + a.head_dim);
      const float now = fmaxf(top, split[0]), old = expf(top - now), fresh = expf(split[0] - now);
      sum = sum * old + split[1] * fresh;
      o = o * old + split[2 + d] * fresh;
      top = now;
    }
    a.y[(int64_t(step.start[sequence]) * a.heads + head) * a.head_dim + d] = o / sum;
  }
}

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

ec_status checkShape(const char* op, const ec_step& step, const ec_attention& args) {
  EC_TRY(checkAttentionShape(op, step, args));
  if (args.head_dim <= kMaxHeadDim) return EC_OK;
  return fail(EC_UNSUPPORTED, "%s: head_dim is %d, this backend takes at most %d", op,
              args.head_dim, kMaxHeadDim);
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
  EC_TRY(launch("attention_decode", attendSplits<Kv, kDims>, grid, kThreads, Shared::bytes(a),
                stream, step, a, scratch.partial));
  return launch("attention_decode", joinSplits, dim3(a.heads, step.n_seq), kThreads, 0, stream,
                step, a, scratch.partial, scratch.splits);
}

template <class Kv, int kDims>
ec_status prefill(ec_stream stream, const ec_step& step, const ec_attention& a) {
  EC_TRY(launch("attention_prefill", appendRows<Kv>, dim3(step.n_tok, a.kv_heads), kThreads, 0,
                stream, step, a));
  return launch("attention_prefill", attendRows<Kv, kDims>,
                dim3(step.n_tok, a.kv_heads * Layout(a).tiles), kThreads, Shared::bytes(a), stream,
                step, a);
}

template <class Run>
ec_status byType(const ec_attention& a, const Run& run) {
  const auto byDims = [&](auto kv) {
    using Kv = decltype(kv);
    if (a.head_dim <= kThreads) return run.template operator()<Kv, 1>();
    return a.head_dim <= 2 * kThreads ? run.template operator()<Kv, 2>()
                                      : run.template operator()<Kv, 3>();
  };
  return a.kv_type == EC_F32 ? byDims(float{}) : byDims(__half{});
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

ec_status attentionDecodeWorkspace(const ec_step& step, const ec_attention& args, size_t* bytes) {
  EC_TRY(checkShape("attention_decode", step, args));
  Arena arena;
  Scratch(arena, step, args);
  *bytes = arena.bytes();
  return EC_OK;
}

ec_status attentionPrefillWorkspace(const ec_step& step, const ec_attention& args, size_t* bytes) {
  *bytes = 0;
  return checkShape("attention_prefill", step, args);
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

ec_status attentionPrefill(ec_stream stream, const ec_step& step, const ec_attention& args) {
  EC_TRY(checkShape("attention_prefill", step, args));
  EC_TRY(checkAttentionPointers("attention_prefill", step, args));
  return byType(args, Prefill{stream, step, args});
}

}  // namespace ec::cuda
