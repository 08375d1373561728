// SPDX-License-Identifier: Apache-2.0
//
// What attention_decode.cu and attention_prefill.cu share.
//
// Grouped-query attention over paged keys and values, without positional encoding:
//
//   y[t][h] = sum over i <= position(t) of softmax_i(scale q[t][h] . k[i][g]) v[i][g],   g = h /
//   (heads / kv_heads)
//
// Shapes: qkv [n_tok][(heads + 2 kv_heads) head_dim]; kv [pages][2][kv_heads] of [64][head_dim]
// fp32, fp16 or int8, the last with [64] fp16 scales behind; position p of a slot in page
// page_table[slot][p / 64]; y [n_tok][heads head_dim]. The step's keys and values are appended
// first.
//
// The context is cut into splits of 256 positions, whose maximum m, sum l of exp(score - m) and sum
// o of exp(score - m) v are joined in ascending order: the bits of a row depend on nothing else. Up
// to 16 heads that share a key head go through a split together, so that its keys and values are
// read once.
#ifndef EC_CUDA_ATTENTION_CUH
#define EC_CUDA_ATTENTION_CUH

#include <cmath>

#include "kernels.h"
#include "platform.h"

namespace ec::cuda::attention {

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

// Of a page: sizes of what a row of head_dim values takes.
template <class Kv>
__host__ __device__ __forceinline__ int64_t rowBytes(int headDim) {
  return headDim * int64_t(sizeof(Kv)) + (sizeof(Kv) == 1 ? 2 : 0);
}

// The keys, or the values, of a page and key head: [64][head_dim], for int8 then [64] scales.
template <class Kv>
__device__ __forceinline__ Kv* pageAt(const ec_attention& a, int page, Half half, int kvHead) {
  const int64_t block = (int64_t(page) * 2 + half) * a.kv_heads + kvHead;
  return reinterpret_cast<Kv*>(static_cast<char*>(a.kv) +
                               block * EC_PAGE_TOKENS * rowBytes<Kv>(a.head_dim));
}

__device__ __forceinline__ const int32_t* pagesOf(const ec_step& step, int slot) {
  return step.page_table + int64_t(slot) * step.max_pages;
}

// The scales behind a page's codes.
__device__ __forceinline__ __half* scalesOf(int8_t* page, int headDim) {
  return reinterpret_cast<__half*>(page + EC_PAGE_TOKENS * headDim);
}

// The values of a position and key head.
template <class Kv>
struct Row {
  Kv* values;  // [head_dim]
  __device__ Row(Kv* page, int headDim, int row) : values(page + row * headDim) {}
  __device__ float operator[](int d) const { return widen(values[d]); }
  // By all threads of the CTA.
  __device__ void store(const float* from, int headDim) const {
    for (int i = threadIdx.x; i < headDim; i += kThreads) narrow(from[i], values + i);
  }

 private:
  static __device__ float widen(float v) { return v; }
  static __device__ float widen(__half v) { return __half2float(v); }
  static __device__ void narrow(float v, float* to) { *to = v; }
  static __device__ void narrow(float v, __half* to) { *to = __float2half_rn(v); }
};

template <>
struct Row<int8_t> {
  int8_t* codes;  // [head_dim]
  __half* scale;
  __device__ Row(int8_t* page, int headDim, int row)
      : codes(page + row * headDim), scale(scalesOf(page, headDim) + row) {}
  __device__ float operator[](int d) const { return codes[d] * __half2float(*scale); }
  // What is not finite makes the row NaN, by way of its scale. Each warp finds the scale by itself.
  __device__ void store(const float* from, int headDim) const {
    float largest = 0.f;
    bool isNan = false;
    for (int i = threadIdx.x % kWarp; i < headDim; i += kWarp) {
      largest = fmaxf(largest, fabsf(from[i]));
      isNan |= from[i] != from[i];
    }
    largest = warpMax(largest);
    if (__ballot_sync(kAll, isNan)) largest = NAN;
    const __half narrow = __float2half_rn(largest / 127.f);
    const float wide = __half2float(narrow);
    for (int i = threadIdx.x; i < headDim; i += kThreads) {
      const float code = wide > 0.f ? rintf(from[i] / wide) : 0.f;
      codes[i] = static_cast<int8_t>(code == code ? fminf(fmaxf(code, -127.f), 127.f) : 0.f);
    }
    if (threadIdx.x == 0) *scale = narrow;
  }
};

template <class Kv>
__device__ __forceinline__ Row<Kv> rowAt(const ec_step& step, const ec_attention& a, int slot,
                                         Half half, int kvHead, int position) {
  const int page = pagesOf(step, slot)[position / EC_PAGE_TOKENS];
  return Row<Kv>(pageAt<Kv>(a, page, half, kvHead), a.head_dim, position % EC_PAGE_TOKENS);
}

// The key and value of one token and key head, by all threads of the CTA.
template <class Kv>
__device__ void append(const ec_step& step, const ec_attention& a, int slot, int position,
                       const float* row, int kvHead) {
  const float *key = row + (a.heads + kvHead) * a.head_dim, *value = key + a.kv_heads * a.head_dim;
  rowAt<Kv>(step, a, slot, kKeys, kvHead, position).store(key, a.head_dim);
  rowAt<Kv>(step, a, slot, kValues, kvHead, position).store(value, a.head_dim);
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

__device__ inline void loadQueries(const Shared& s, const ec_attention& a, const float* q,
                                   int heads) {
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
  for (int position = first + threadIdx.x; position < end; position += kThreads) {
    const Row<Kv> key = rowAt<Kv>(step, a, slot, kKeys, kvHead, position);
    float score[kHeads] = {};
    for (int d = 0; d < a.head_dim; ++d) {
      const float k = key[d];
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
      const float v = rowAt<Kv>(step, a, slot, kValues, kvHead, position)[d];
      const float* p = s.scores + (position - first) * kHeads;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) o[i][h] = fmaf(p[h], v, o[i][h]);
    }
  }
  __syncthreads();
}

inline ec_status checkShape(const char* op, const ec_step& step, const ec_attention& args) {
  EC_TRY(checkAttentionShape(op, step, args));
  if (args.head_dim <= kMaxHeadDim) return EC_OK;
  return fail(EC_UNSUPPORTED, "%s: head_dim is %d, this backend takes at most %d", op,
              args.head_dim, kMaxHeadDim);
}

template <class Run>
ec_status byType(const ec_attention& a, const Run& run) {
  const auto byDims = [&](auto kv) {
    using Kv = decltype(kv);
    if (a.head_dim <= kThreads) return run.template operator()<Kv, 1>();
    return a.head_dim <= 2 * kThreads ? run.template operator()<Kv, 2>()
                                      : run.template operator()<Kv, 3>();
  };
  if (a.kv_type == EC_I8_ROW) return byDims(int8_t{});
  return a.kv_type == EC_F32 ? byDims(float{}) : byDims(__half{});
}

}  // namespace ec::cuda::attention

#endif  // EC_CUDA_ATTENTION_CUH
