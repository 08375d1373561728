// SPDX-License-Identifier: Apache-2.0
//
// Attention of any number of tokens of each sequence; attention.cuh has the equation.
//
// fp16 and int8 pages go through the tensor cores, the latter as halves. With p = heads / kv_heads,
// row r of a key head is token r / p of the sequence and the r % p-th of its heads: the heads that
// share keys share their tiles, too. A CTA takes 64 rows, a warp 16 of them, and runs over the
// pages of their context; a page is a tile of 64 positions in shared memory, and the next one is on
// its way meanwhile. A row's maximum m, sum l and sum o are carried from page to page (Milakov and
// Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691): pages begin at multiples of 64 whatever the
// rows are, and one that lies ahead of a row leaves it as it is, so that pieces of a prompt give
// the bits of the whole. q is halves times a power of two for each row, exp(score - m) is rounded
// to half, sums are fp32. A value that is not finite may reach the tokens just before its own that
// share its page, no other sequence.
//
// fp32 pages, and heads wider than 128: a CTA for each token takes the splits of its context one
// after the other, in fp32.
//
// Bound: the tensor cores, or fp32 arithmetic.
// Reference: edgecascade/backends/reference.py   Test: tests/test_attention_kernels.py
#include "attention.cuh"
#include "blocks.cuh"

namespace ec::cuda {
namespace {

using namespace attention;

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
      sum = fmaf(sum, shared.old[h], shared.sum[h] * shared.fresh[h]);  // see joinSplits()
      top = now;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kDims; ++i) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h)
        o[i][h] = fmaf(o[i][h], shared.old[h], part[i][h] * shared.fresh[h]);
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

// One page of keys, or of values, in shared memory: [64][kDim / 8] octets, their order in a row
// changed so that eight rows of one column lie in different banks.
template <int kDim>
struct Page {
  static constexpr int kUnits = kDim / 8, kOctets = EC_PAGE_TOKENS * kUnits;
  static_assert(kUnits % 8 == 0, "the order of a row's octets");
  static __device__ __forceinline__ int at(int row, int unit) {
    return row * kUnits + (unit ^ (row & 7));
  }
};

// Keys, or values, of a page into shared memory: positions [0, count) of it, zeros behind, and
// behind head_dim.
template <int kDim>
__device__ __forceinline__ void stageHalf(uint4* to, const __half* from, int headDim, int count) {
  using P = Page<kDim>;
  if (headDim % 8 == 0) {
    const int unit = threadIdx.x % P::kUnits, first = threadIdx.x / P::kUnits;
    const bool inside = 8 * unit < headDim;
#pragma unroll
    for (int row = first; row < EC_PAGE_TOKENS; row += kThreads / P::kUnits) {
      uint4* at = to + P::at(row, unit);
      if (inside && row < count) {
        copyAsync(at, reinterpret_cast<const uint4*>(from + row * headDim + 8 * unit));
      } else {
        *at = make_uint4(0, 0, 0, 0);
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < EC_PAGE_TOKENS * kDim; i += kThreads) {
    const int row = i / kDim, d = i % kDim;
    reinterpret_cast<__half*>(to + P::at(row, d / 8))[d % 8] =
        row < count && d < headDim ? from[row * headDim + d] : __ushort_as_half(0);
  }
}

// Likewise; codes times scale become halves on the way.
template <int kDim>
__device__ __forceinline__ void stageHalf(uint4* to, int8_t* from, int headDim, int count) {
  using P = Page<kDim>;
  const __half* scales = scalesOf(from, headDim);
#pragma unroll 4
  for (int i = threadIdx.x; i < P::kOctets; i += kThreads) {
    const int row = i / P::kUnits, d = i % P::kUnits * 8;
    const int8_t* at = from + row * headDim + d;
    uint64_t codes = 0;
    float scale = 0.f;
    if (row < count && d < headDim) {
      scale = __half2float(scales[row]);
      if (headDim % 8 == 0) {
        const uint2 pair = *reinterpret_cast<const uint2*>(at);
        codes = uint64_t(pair.y) << 32 | pair.x;
      } else {
        for (int j = 0; j < min(8, headDim - d); ++j) codes |= uint64_t(uint8_t(at[j])) << 8 * j;
      }
    }
    const auto value = [&](int j) { return static_cast<int8_t>(codes >> 8 * j) * scale; };
    to[P::at(row, d / 8)] = make_uint4(asWord(__floats2half2_rn(value(0), value(1))),
                                       asWord(__floats2half2_rn(value(2), value(3))),
                                       asWord(__floats2half2_rn(value(4), value(5))),
                                       asWord(__floats2half2_rn(value(6), value(7))));
  }
}

template <class Kv, int kDim>
__device__ __forceinline__ void stagePage(uint4* to, const ec_attention& a, int page, int kvHead,
                                          int count) {
  stageHalf<kDim>(to, pageAt<Kv>(a, page, kKeys, kvHead), a.head_dim, count);
  stageHalf<kDim>(to + Page<kDim>::kOctets, pageAt<Kv>(a, page, kValues, kvHead), a.head_dim,
                  count);
  commitAsync();
}

// Rows g and g + 8 of a warp's 16, g = lane / 4, and what they carry from page to page.
template <int kDim>
struct TileRows {
  uint32_t q[kDim / 16][4];  // fragments
  float factor[2];           // of a score: the row's power of two, the scale, 1 / ln 2
  int limit[2];              // the row's position
  float top[2], sum[2];      // base 2; sum: of the lane's own columns
  float o[kDim / 8][4];
};

// q over a power of two. Rows past the last are zeros.
template <int kDim>
__device__ __forceinline__ void loadRows(TileRows<kDim>& r, const ec_attention& a, const Layout& m,
                                         const float* qkv, int kvHead, int row0, int rows,
                                         int past) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = row0 + g + 8 * i, token = row / m.perKv;
    const float* from =
        qkv + int64_t(token) * m.row + (kvHead * m.perKv + row % m.perKv) * a.head_dim;
    float q[kDim / 4], largest = 0.f;
#pragma unroll
    for (int j = 0; j < kDim / 4; ++j) {
      const int d = j / 2 * 8 + 2 * t + j % 2;
      q[j] = row < rows && d < a.head_dim ? from[d] : 0.f;
      largest = fmaxf(largest, fabsf(q[j]));
    }
    for (int bits = 1; bits < 4; bits *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, bits));
    const float scale = rowScale(largest), inverse = 1.f / scale;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      r.q[j / 2][2 * (j % 2) + i] =
          asWord(__floats2half2_rn(q[2 * j] * inverse, q[2 * j + 1] * inverse));
    }
    r.factor[i] = scale * a.scale * 1.44269504f;
    r.limit[i] = past + token;
    r.top[i] = -INFINITY;
    r.sum[i] = 0.f;
  }
#pragma unroll
  for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r.o[j][i] = 0.f;
  }
}

// Scores of 16 rows and the page's positions; -inf ahead of a row.
template <int kDim>
__device__ __forceinline__ void scorePage(const TileRows<kDim>& r, const uint4* keys, int first,
                                          float (&s)[8][4]) {
  const int lane = threadIdx.x % kWarp, t = lane % 4;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = 0.f;
  }
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t b[4];
      loadMatrices<false>(
          b, keys + Page<kDim>::at(16 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      mma16816(s[2 * j], r.q[k][0], r.q[k][1], r.q[k][2], r.q[k][3], b[0], b[1]);
      mma16816(s[2 * j + 1], r.q[k][0], r.q[k][1], r.q[k][2], r.q[k][3], b[2], b[3]);
    }
  }
  const bool ahead = first + EC_PAGE_TOKENS - 1 > r.limit[0];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[j][i] *= r.factor[i / 2];
      if (ahead && first + 8 * j + 2 * t + i % 2 > r.limit[i / 2]) s[j][i] = -INFINITY;
    }
  }
}

// s becomes exp(score - m); what was summed so far is brought to the new m.
template <int kDim>
__device__ __forceinline__ void exponentials(TileRows<kDim>& r, float (&s)[8][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = r.top[i];
#pragma unroll
    for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
    for (int bits = 1; bits < 4; bits *= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, bits));
    const float old = exp2f(r.top[i] - top);
    r.top[i] = top;
    r.sum[i] *= old;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 2 * i; e < 2 * i + 2; ++e) {
        s[j][e] = exp2f(s[j][e] - top);
        r.sum[i] += s[j][e];
      }
    }
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      r.o[j][2 * i] *= old;
      r.o[j][2 * i + 1] *= old;
    }
  }
}

template <int kDim>
__device__ __forceinline__ void addValues(TileRows<kDim>& r, const uint4* values,
                                          const float (&s)[8][4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float(&low)[4] = s[2 * k], (&high)[4] = s[2 * k + 1];
    const uint32_t p[4] = {
        asWord(__floats2half2_rn(low[0], low[1])), asWord(__floats2half2_rn(low[2], low[3])),
        asWord(__floats2half2_rn(high[0], high[1])), asWord(__floats2half2_rn(high[2], high[3]))};
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
      uint32_t b[4];
      loadMatrices<true>(b, values + Page<kDim>::at(16 * k + lane % 16, 2 * j + lane / 16));
      mma16816(r.o[2 * j], p[0], p[1], p[2], p[3], b[0], b[1]);
      mma16816(r.o[2 * j + 1], p[0], p[1], p[2], p[3], b[2], b[3]);
    }
  }
}

template <int kDim>
__device__ __forceinline__ void storeRows(const TileRows<kDim>& r, const ec_attention& a,
                                          const Layout& m, float* y, int kvHead, int row0,
                                          int rows) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = r.sum[i];
    for (int bits = 1; bits < 4; bits *= 2) sum += __shfl_xor_sync(kAll, sum, bits);
    const int row = row0 + g + 8 * i;
    if (row >= rows) continue;
    float* to =
        y + (int64_t(row / m.perKv) * a.heads + kvHead * m.perKv + row % m.perKv) * a.head_dim;
#pragma unroll
    for (int j = 0; j < kDim / 4; ++j) {
      const int d = j / 2 * 8 + 2 * t + j % 2;
      if (d < a.head_dim) to[d] = r.o[j / 2][2 * i + j % 2] / sum;
    }
  }
}

constexpr int kTileRows = 16 * kWarps;

template <class Kv, int kDim>
__global__ void __launch_bounds__(kThreads, 2) attendTiles(ec_step step, ec_attention a) {
  using P = Page<kDim>;
  const int sequence = blockIdx.z, kvHead = blockIdx.y;
  if (sequence >= liveSequences(step)) return;
  const Layout m(a);
  const int start = step.start[sequence], rows = (step.start[sequence + 1] - start) * m.perKv;
  // The longest contexts go first, so that they do not end last.
  const int tile = (gridDim.x - 1 - blockIdx.x) * kTileRows, past = step.past[sequence];
  if (tile >= rows) return;
  const int context = past + (min(tile + kTileRows, rows) - 1) / m.perKv + 1;
  const int pages = ceilDiv(context, EC_PAGE_TOKENS);
  const int32_t* table = pagesOf(step, step.slot[sequence]);
  uint4* shared = dynamicShared<uint4>();  // [2][keys, values]
  const auto stage = [&](int i, int page) {
    stagePage<Kv, kDim>(shared + i % 2 * 2 * P::kOctets, a, page, kvHead,
                        context - i * EC_PAGE_TOKENS);
  };
  stage(0, table[0]);
  int next = pages > 1 ? table[1] : 0;
  const int row0 = tile + static_cast<int>(threadIdx.x) / kWarp * 16;
  TileRows<kDim> r;
  loadRows(r, a, m, a.qkv + int64_t(start) * m.row, kvHead, row0, rows, past);
  for (int i = 0; i < pages; ++i) {
    waitAsync<0>();
    __syncthreads();
    if (i + 1 < pages) stage(i + 1, next);
    if (i + 2 < pages) next = table[i + 2];
    const uint4* keys = shared + i % 2 * 2 * P::kOctets;
    float s[8][4];
    scorePage(r, keys, i * EC_PAGE_TOKENS, s);
    exponentials(r, s);
    addValues(r, keys + P::kOctets, s);
  }
  storeRows(r, a, m, a.y + int64_t(start) * a.heads * a.head_dim, kvHead, row0, rows);
}

template <class Kv, int kDim>
ec_status prefillTiles(ec_stream stream, const ec_step& step, const ec_attention& a) {
  const dim3 grid(ceilDiv(step.n_tok * Layout(a).perKv, kTileRows), a.kv_heads, step.n_seq);
  return launch("attention_prefill", attendTiles<Kv, kDim>, grid, kThreads,
                4 * Page<kDim>::kOctets * sizeof(uint4), stream, step, a);
}

struct Prefill {
  ec_stream stream;
  const ec_step& step;
  const ec_attention& a;
  template <class Kv, int kDims>
  ec_status operator()() const {
    EC_TRY(launch("attention_prefill", appendRows<Kv>, dim3(step.n_tok, a.kv_heads), kThreads, 0,
                  stream, step, a));
    if constexpr (sizeof(Kv) < sizeof(float) && kDims == 1) {
      return a.head_dim <= 64 ? prefillTiles<Kv, 64>(stream, step, a)
                              : prefillTiles<Kv, 128>(stream, step, a);
    }
    return launch("attention_prefill", attendRows<Kv, kDims>,
                  dim3(step.n_tok, a.kv_heads * Layout(a).tiles), kThreads, Shared::bytes(a),
                  stream, step, a);
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
