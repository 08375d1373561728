// SPDX-License-Identifier: Apache-2.0
//
// Mamba-2 for any number of tokens of each sequence; mamba.cuh has the equations.
//
// The chunked scan (Dao and Gu, arXiv 2405.21060, section 6): with cum_l = sum over i <= l of dt_i
// a, for l, s in one chunk of 32 tokens and S0 the state before it,
//
//   y_l = exp(cum_l) S0 C_l + sum over s <= l of (C_l . B_s) exp(cum_l - cum_s) dt_s x_s
//   S1  = exp(cum_end) S0 + sum over s of exp(cum_end - cum_s) dt_s x_s (x) B_s
//
// No exponent is above 0, so nothing overflows whatever dt is. Four launches: the convolution of
// all tokens; its last inputs into the ring; C_l . B_s of every chunk, once for the heads of a
// group; the scan, a CTA for 32 columns of a head, chunk by chunk, its state in shared memory. The
// products are of tf32 in three parts, high high + high low + low high: 22 bits of each factor, so
// that they are as good as float32 (tests/tolerances.py). Chunks are counted from the first token
// of the step's piece: pieces of a prompt round differently from the whole.
//
// Bound: the memory of zxbcdt and of the convolution's result, read and written.
// Reference: edgecascade/backends/reference.py   Test: tests/test_mamba_kernels.py
#include "mamba.cuh"

namespace ec::cuda {
namespace {

using namespace mamba;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kChunk = 32;       // tokens; half of it where a state has more than 128 columns
constexpr int kPanel = 32;       // columns of a head
constexpr int kTileRows = 16;    // of a product
constexpr int kPanelPitch = 40;  // floats; with the pitches below no two lanes share a bank

// Rows of the state in shared memory: zeros behind the last.
__host__ __device__ inline int paddedState(const ec_mamba& a) { return ceilDiv(a.state, 16) * 16; }
__host__ __device__ inline int chunkTokens(const ec_mamba& a) {
  return a.state <= 128 ? kChunk : kChunk / 2;
}

struct Scratch {
  float* xbc;     // [n_tok][channels] after convolution and SiLU
  float* scores;  // [n_tok][groups][kChunk]: C_l . B_s of the row's chunk, s <= l
  Scratch(Arena& arena, const ec_step& step, const ec_mamba& a)
      : xbc(arena.take<float>(int64_t(step.n_tok) * Layout(a).channels)),
        scores(arena.take<float>(int64_t(step.n_tok) * a.groups * kChunk)) {}
};

__global__ void __launch_bounds__(kThreads) convolve(ec_step step, ec_mamba args, float* xbc) {
  const int row = blockIdx.y, channel = blockIdx.x * kThreads + threadIdx.x;
  const Layout m(args);
  if (row >= liveRows(step) || channel >= m.channels) return;
  const int sequence = sequenceOf(step, row), token = row - step.start[sequence];
  const int slot = step.slot[sequence], past = step.past[sequence];
  const float* in = args.zxbcdt + int64_t(row) * m.row + m.inner + channel;
  float sum = args.conv_bias ? args.conv_bias[channel] : 0.f;
  for (int j = 0; j < args.kernel; ++j) {
    const int back = args.kernel - 1 - j;
    const float value = back <= token
                            ? in[-int64_t(back) * m.row]
                            : args.conv[ringRow(args, m, slot, past + token - back) + channel];
    sum = fmaf(args.conv_weight[j * m.channels + channel], value, sum);
  }
  xbc[int64_t(row) * m.channels + channel] = silu(sum);
}

// The last inputs of each channel, after the convolution has read the ring.
__global__ void __launch_bounds__(kThreads) updateRing(ec_step step, ec_mamba args) {
  const int sequence = blockIdx.y, channel = blockIdx.x * kThreads + threadIdx.x;
  const Layout m(args);
  if (sequence >= liveSequences(step) || channel >= m.channels) return;
  const int first = step.start[sequence], tokens = step.start[sequence + 1] - first;
  const int slot = step.slot[sequence], past = step.past[sequence];
  for (int token = max(0, tokens - args.kernel); token < tokens; ++token) {
    args.conv[ringRow(args, m, slot, past + token) + channel] =
        args.zxbcdt[int64_t(first + token) * m.row + m.inner + channel];
  }
}

// x = high + low but for its last bits, each of them a tf32.
__device__ __forceinline__ void split(float x, uint32_t& high, uint32_t& low) {
  high = __float_as_uint(x) & 0xffffe000u;
  low = __float_as_uint(x - __uint_as_float(high));
}

// One warp: c[j] += a b_j over k, a multiple of 8; a(row, k) of 16 rows, b(k, column) of 8 kTiles
// columns.
template <int kTiles, class A, class B>
__device__ __forceinline__ void multiply(float (&c)[kTiles][4], int k, const A& a, const B& b) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  float small[kTiles][4] = {};
#pragma unroll 2
  for (int from = 0; from < k; from += 8) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a(g + i % 2 * 8, from + t + i / 2 * 4), high[i], low[i]);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      uint32_t bHigh[2], bLow[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) split(b(from + t + 4 * i, 8 * j + g), bHigh[i], bLow[i]);
      mmaTf32(small[j], high, bLow);
      mmaTf32(small[j], low, bHigh);
      mmaTf32(c[j], high, bHigh);
    }
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[j][i] += small[j][i];
  }
}

// Rows [0, count) of `columns` values each, `stride` apart, into shared memory; zeros behind, as
// far as `rows` and `padded` columns.
__device__ __forceinline__ void loadRows(float* to, int pitch, int rows, int padded,
                                         const float* from, int64_t stride, int count,
                                         int columns) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int column = lane; column < padded; column += kWarp) {
#pragma unroll 4
    for (int row = warp; row < rows; row += kWarps) {
      to[row * pitch + column] =
          row < count && column < columns ? from[row * stride + column] : 0.f;
    }
  }
}

// A CTA for each chunk and group: 32 x 32 products, a warp 16 x 8 of them.
__global__ void __launch_bounds__(kThreads)
    scoreChunks(ec_step step, ec_mamba args, Scratch scratch) {
  const int sequence = blockIdx.z, group = blockIdx.y, chunk = chunkTokens(args);
  if (sequence >= liveSequences(step)) return;
  const int first = step.start[sequence] + blockIdx.x * chunk;
  const int count = min(chunk, step.start[sequence + 1] - first);
  if (count <= 0) return;
  const Layout m(args);
  const int padded = paddedState(args), pitch = padded + 4;
  float *c = dynamicShared<float>(), *b = c + chunk * pitch;  // [chunk][pitch]
  const float* fromB = scratch.xbc + int64_t(first) * m.channels + m.inner + group * args.state;
  loadRows(b, pitch, chunk, padded, fromB, m.channels, count, args.state);
  loadRows(c, pitch, chunk, padded, fromB + args.groups * args.state, m.channels, count,
           args.state);
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row0 = warp / 4 * kTileRows, column0 = warp % 4 * 8;
  if (row0 >= chunk || column0 >= row0 + kTileRows) return;  // ahead of all its rows
  float sum[1][4] = {};
  multiply(
      sum, padded, [&](int row, int k) { return c[(row0 + row) * pitch + k]; },
      [&](int k, int column) { return b[(column0 + column) * pitch + k]; });
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + lane / 4 + i / 2 * 8;
    if (row >= count) continue;
    scratch.scores[(int64_t(first + row) * args.groups + group) * kChunk + column0 + lane % 4 * 2 +
                   i % 2] = sum[0][i];
  }
}

// A chunk, and the state, in shared memory.
struct Panel {
  int chunk, padded;  // tokens, rows of the state
  int pitchB, pitchC, pitchMix;
  float* c;      // [chunk][pitchC]
  float* b;      // [chunk][pitchB]
  float* state;  // [padded][kPanelPitch], row n, column p
  float* x;      // [chunk][kPanelPitch]
  float* mix;    // [chunk][pitchMix]: (C_l . B_s) exp(cum_l - cum_s) dt_s
  float* cum;    // [chunk], high part
  float* rest;   // [chunk], low part: differences of large neighbours keep their digits
  float* dt;     // [chunk]
  float* carry;  // [chunk] exp(cum)
  float* late;   // [chunk] exp(cum_end - cum) dt

  __device__ Panel(float* base, const ec_mamba& a)
      : chunk(chunkTokens(a)),
        padded(paddedState(a)),
        pitchB(padded + (padded % 32 ? 24 : 8)),
        pitchC(padded + 4),
        pitchMix(chunk + 4),
        c(base),
        b(c + chunk * pitchC),
        state(b + chunk * pitchB),
        x(state + padded * kPanelPitch),
        mix(x + chunk * kPanelPitch),
        cum(mix + chunk * pitchMix),
        rest(cum + chunk),
        dt(rest + chunk),
        carry(dt + chunk),
        late(carry + chunk) {}
  static size_t bytes(const ec_mamba& a) {
    const int chunk = chunkTokens(a), padded = paddedState(a);
    return sizeof(float) * (size_t(chunk) * (2 * padded + 4 + 24 + kPanelPitch + chunk + 4 + 5) +
                            size_t(padded) * kPanelPitch);
  }
};

// One warp: what a chunk's dt make of it; lane l is token l.
__device__ __forceinline__ void decays(const Panel& s, const ec_mamba& args, const float* dtIn,
                                       int64_t stride, int head, int count) {
  const int l = threadIdx.x % kWarp;
  const float dt = l < count ? softplus(dtIn[l * stride] + args.dt_bias[head]) : 0.f;
  double cum = double{dt} * args.a[head];
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const double before = __shfl_sync(kAll, cum, l - distance);
    if (l >= distance) cum += before;
  }
  const auto high = static_cast<float>(cum);
  const auto low = static_cast<float>(cum - high);
  const float endHigh = __shfl_sync(kAll, high, count - 1);
  const float endLow = __shfl_sync(kAll, low, count - 1);
  if (l >= s.chunk) return;
  s.cum[l] = high;
  s.rest[l] = low;
  s.dt[l] = dt;
  s.carry[l] = expf(high);
  s.late[l] = l < count ? expf((endHigh - high) + (endLow - low)) * dt : 0.f;
}

// What a thread will need of global memory in a chunk, asked for with the rest of it.
struct Ahead {
  float score[kChunk / kWarps];  // of token warp + 8 i with token lane
  float z[4];                    // of the thread's part of the warp's tile of y
};

__device__ __forceinline__ void mixRows(const Panel& s, const Ahead& ahead, int count) {
  const int from = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < kChunk / kWarps; ++i) {
    const int l = warp + kWarps * i;
    if (from > l || l >= count) continue;
    const float gap = (s.cum[l] - s.cum[from]) + (s.rest[l] - s.rest[from]);
    s.mix[l * s.pitchMix + from] = ahead.score[i] * expf(fminf(gap, 0.f)) * s.dt[from];
  }
}

// One warp: y of 16 tokens from row0 on and 8 columns of the panel, before D and the gate.
__device__ __forceinline__ void outputTile(const Panel& s, int row0, int column0,
                                           float (&y)[1][4]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  multiply(
      y, s.padded, [&](int row, int k) { return s.c[(row0 + row) * s.pitchC + k]; },
      [&](int k, int column) { return s.state[k * kPanelPitch + column0 + column]; });
#pragma unroll
  for (int i = 0; i < 4; ++i) y[0][i] *= s.carry[row0 + g + i / 2 * 8];
  multiply(
      y, row0, [&](int row, int k) { return s.mix[(row0 + row) * s.pitchMix + k]; },
      [&](int k, int column) { return s.x[k * kPanelPitch + column0 + column]; });
  // The diagonal: a token must not touch later ones, not even with weight 0, which keeps a NaN.
  const float* x = s.x + row0 * kPanelPitch + column0 + 2 * t;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int l = g + half * 8;
    const float* mix = s.mix + (row0 + l) * s.pitchMix + row0;
    for (int from = 0; from <= l; ++from) {
      y[0][2 * half] = fmaf(mix[from], x[from * kPanelPitch], y[0][2 * half]);
      y[0][2 * half + 1] = fmaf(mix[from], x[from * kPanelPitch + 1], y[0][2 * half + 1]);
    }
  }
}

// The CTA: the state after the chunk.
__device__ __forceinline__ void advance(const Panel& s, float decay) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (int row0 = static_cast<int>(threadIdx.x) / kWarp * kTileRows; row0 < s.padded;
       row0 += kWarps * kTileRows) {
    float sum[kPanel / 8][4];
    const auto each = [&](const auto& visit) {
#pragma unroll
      for (int j = 0; j < kPanel / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          visit(s.state[(row0 + g + i / 2 * 8) * kPanelPitch + 8 * j + 2 * t + i % 2], sum[j][i]);
        }
      }
    };
    each([&](float& there, float& mine) { mine = there * decay; });
    multiply(
        sum, s.chunk, [&](int row, int k) { return s.b[k * s.pitchB + row0 + row]; },
        [&](int k, int column) { return s.late[k] * s.x[k * kPanelPitch + column]; });
    each([&](float& there, float& mine) { there = mine; });
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    scanChunks(ec_step step, ec_mamba args, Scratch scratch) {
  const int head = blockIdx.x, panel = blockIdx.y * kPanel, sequence = blockIdx.z;
  if (sequence >= liveSequences(step)) return;
  const Layout m(args);
  const Panel s(dynamicShared<float>(), args);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int start = step.start[sequence], tokens = step.start[sequence + 1] - start;
  const int columns = min(kPanel, args.head_dim - panel), group = head / m.headsPerGroup;
  const int column = head * args.head_dim + panel;  // of x, y and z
  float* stored = args.ssm + (int64_t(step.slot[sequence]) * m.inner + column) * args.state;
  for (int i = threadIdx.x; i < kPanel * s.padded; i += kThreads) {
    const int p = i / s.padded, n = i % s.padded;
    s.state[n * kPanelPitch + p] =
        p < columns && n < args.state ? stored[int64_t(p) * args.state + n] : 0.f;
  }
  const int row0 = warp / 4 * kTileRows, column0 = warp % 4 * 8;  // of the warp's tile of y
  for (int from = 0; from < tokens; from += s.chunk) {
    const int count = min(s.chunk, tokens - from);
    const int64_t first = start + from;
    const float* xbc = scratch.xbc + first * m.channels;
    const float* b = xbc + m.inner + group * args.state;
    __syncthreads();
    loadRows(s.x, kPanelPitch, s.chunk, kPanel, xbc + column, m.channels, count, columns);
    loadRows(s.b, s.pitchB, s.chunk, s.padded, b, m.channels, count, args.state);
    loadRows(s.c, s.pitchC, s.chunk, s.padded, b + args.groups * args.state, m.channels, count,
             args.state);
    Ahead ahead;
    const float* scores = scratch.scores + (first * args.groups + group) * kChunk + lane;
#pragma unroll
    for (int i = 0; i < kChunk / kWarps; ++i) {
      const int l = warp + kWarps * i;
      ahead.score[i] = lane <= l && l < count ? scores[int64_t(l) * args.groups * kChunk] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int l = row0 + lane / 4 + i / 2 * 8, p = column0 + lane % 4 * 2 + i % 2;
      ahead.z[i] = l < count && p < columns ? args.zxbcdt[(first + l) * m.row + column + p] : 0.f;
    }
    if (warp == 0) {
      decays(s, args, args.zxbcdt + first * m.row + m.inner + m.channels + head, m.row, head,
             count);
    }
    __syncthreads();
    mixRows(s, ahead, count);
    __syncthreads();
    if (row0 < count) {
      float y[1][4] = {};
      outputTile(s, row0, column0, y);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int l = row0 + lane / 4 + i / 2 * 8, p = column0 + lane % 4 * 2 + i % 2;
        if (l >= count || p >= columns) continue;
        args.y[(first + l) * m.inner + column + p] =
            fmaf(args.d[head], s.x[l * kPanelPitch + p], y[0][i]) * silu(ahead.z[i]);
      }
    }
    __syncthreads();
    advance(s, s.carry[count - 1]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < columns * args.state; i += kThreads) {
    const int p = i / args.state, n = i % args.state;
    stored[int64_t(p) * args.state + n] = s.state[n * kPanelPitch + p];
  }
}

}  // namespace

ec_status mambaPrefillWorkspace(const ec_step& step, const ec_mamba& args, size_t* bytes) {
  EC_TRY(checkShape("mamba_prefill", step, args));
  Arena arena;
  Scratch(arena, step, args);
  *bytes = arena.bytes();
  return EC_OK;
}

ec_status mambaPrefill(ec_stream stream, const ec_step& step, const ec_mamba& args) {
  constexpr const char* op = "mamba_prefill";
  EC_TRY(checkShape(op, step, args));
  EC_TRY(checkMambaPointers(op, step, args));
  Arena arena(step);
  const Scratch scratch(arena, step, args);
  EC_TRY(arena.status(op));
  if (step.n_seq == 0) return EC_OK;
  const unsigned channels = ceilDiv(Layout(args).channels, kThreads);
  EC_TRY(launch(op, convolve, dim3(channels, step.n_tok), kThreads, 0, stream, step, args,
                scratch.xbc));
  EC_TRY(launch(op, updateRing, dim3(channels, step.n_seq), kThreads, 0, stream, step, args));
  const int chunk = chunkTokens(args);
  const size_t shared = sizeof(float) * 2 * chunk * (paddedState(args) + 4);
  EC_TRY(launch(op, scoreChunks, dim3(ceilDiv(step.n_tok, chunk), args.groups, step.n_seq),
                kThreads, shared, stream, step, args, scratch));
  return launch(op, scanChunks, dim3(args.heads, ceilDiv(args.head_dim, kPanel), step.n_seq),
                kThreads, Panel::bytes(args), stream, step, args, scratch);
}

}  // namespace ec::cuda
