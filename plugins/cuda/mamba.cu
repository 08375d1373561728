// SPDX-License-Identifier: Apache-2.0
//
// Mamba-2 for one token of each sequence; mamba.cuh has the equations.
//
// A CTA keeps 32 rows of one head's state in registers, a lane the columns n = lane mod 32, and
// runs over the tokens of its sequence in tiles of 16; the convolution of its channels is part of
// it. Bound: memory, 8 bytes a state value.
// Reference: edgecascade/backends/reference.py   Test: tests/test_mamba_kernels.py
#include "mamba.cuh"

namespace ec::cuda {
namespace {

using namespace mamba;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRowsPerWarp = 4, kRows = kWarps * kRowsPerWarp;  // of a head's state
constexpr int kTokens = 16;                                     // of a tile

// Channels that a CTA convolves: kRows of x, then B and C of the group.
__host__ __device__ inline int tileChannels(const ec_mamba& args) { return kRows + 2 * args.state; }

// A tile in shared memory.
struct Tile {
  float* raw;    // [kernel - 1 + kTokens][tile channels]
  float* out;    // [kTokens][tile channels] after the convolution
  float* dt;     // [kTokens]
  float* decay;  // [kTokens]
  __device__ Tile(float* base, const ec_mamba& args)
      : raw(base),
        out(raw + (args.kernel - 1 + kTokens) * tileChannels(args)),
        dt(out + kTokens * tileChannels(args)),
        decay(dt + kTokens) {}
  static size_t bytes(const ec_mamba& args) {
    return ((args.kernel - 1 + 2 * kTokens) * size_t(tileChannels(args)) + 2 * kTokens) *
           sizeof(float);
  }
};

// The four sums over the warp, one in each quarter of it: the sum of v[i] in lanes 8 i to 8 i + 7.
__device__ __forceinline__ float warpSums(const float (&v)[4], int lane) {
  const bool high = lane & 16, odd = lane & 8;
  float first = (high ? v[2] : v[0]) + __shfl_xor_sync(kAll, high ? v[0] : v[2], 16);
  float second = (high ? v[3] : v[1]) + __shfl_xor_sync(kAll, high ? v[1] : v[3], 16);
  float sum = (odd ? second : first) + __shfl_xor_sync(kAll, odd ? first : second, 8);
  for (int bits = 4; bits > 0; bits >>= 1) sum += __shfl_xor_sync(kAll, sum, bits);
  return sum;
}

// Channel of the convolution that tile channel c is; -1 beyond the head.
__device__ __forceinline__ int channelOf(const ec_mamba& args, const Layout& m, int head, int row0,
                                         int c) {
  if (c < kRows) return row0 + c < args.head_dim ? head * args.head_dim + row0 + c : -1;
  const int group = head / m.headsPerGroup, n = c - kRows;
  return n < args.state ? m.inner + group * args.state + n
                        : m.inner + args.groups * args.state + group * args.state + n - args.state;
}

// kColumns: columns of the state that a lane keeps. Four CTAs a multiprocessor for the 30B's 128
// columns; other widths spill on sm_110 then.
template <int kColumns>
__global__ void __launch_bounds__(kThreads, kColumns == 4 ? 4 : 3)
    scan(ec_step step, ec_mamba args) {
  startDependents();
  const int sequence = blockIdx.z, head = blockIdx.x, row0 = blockIdx.y * kRows;
  if (sequence >= liveSequences(step)) return awaitEarlier();
  const Layout m(args);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first = step.start[sequence], tokens = step.start[sequence + 1] - first;
  const int slot = step.slot[sequence], past = step.past[sequence];
  const int width = tileChannels(args), history = args.kernel - 1;
  const Tile tile(dynamicShared<float>(), args);
  const float* rows = args.zxbcdt + int64_t(first) * m.row;

  const int mine = row0 + warp * kRowsPerWarp;  // the warp's first row of the state
  float* ssm = args.ssm + ((int64_t(slot) * args.heads + head) * args.head_dim + mine) * args.state;
  float state[kRowsPerWarp][kColumns];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int n = lane + kWarp * j;
      const bool inside = mine + r < args.head_dim && n < args.state;
      state[r][j] = inside ? ssm[int64_t(r) * args.state + n] : 0.f;
    }
  }

  // All that the launches before this one have no part in is on its way when they have ended.
  for (int i = threadIdx.x; i < width; i += kThreads) {
    const int channel = channelOf(args, m, head, row0, i);
    for (int j = 0; channel >= 0 && j < args.kernel; ++j) {
      prefetchL2(args.conv_weight + j * m.channels + channel);
      if (j > 0) prefetchL2(args.conv + ringRow(args, m, slot, past - j) + channel);
    }
  }
  awaitEarlier();
  for (int from = 0; from < tokens; from += kTokens) {
    const int count = min(kTokens, tokens - from);
    __syncthreads();
    for (int i = threadIdx.x; i < (history + count) * width; i += kThreads) {
      const int token = from - history + i / width,
                channel = channelOf(args, m, head, row0, i % width);
      float value = 0.f;
      if (channel >= 0) {
        value = token >= 0 ? rows[int64_t(token) * m.row + m.inner + channel]
                           : args.conv[ringRow(args, m, slot, past + token) + channel];
      }
      tile.raw[i] = value;
    }
    if (int(threadIdx.x) < count) {
      const int token = from + threadIdx.x;
      const float dt =
          softplus(rows[int64_t(token) * m.row + m.inner + m.channels + head] + args.dt_bias[head]);
      tile.dt[threadIdx.x] = dt;
      tile.decay[threadIdx.x] = expf(dt * args.a[head]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * width; i += kThreads) {
      const int channel = channelOf(args, m, head, row0, i % width);
      if (channel < 0) continue;
      float sum = args.conv_bias ? args.conv_bias[channel] : 0.f;
      for (int j = 0; j < args.kernel; ++j) {
        sum = fmaf(args.conv_weight[j * m.channels + channel], tile.raw[i + j * width], sum);
      }
      tile.out[i] = silu(sum);
    }
    __syncthreads();
    for (int token = 0; token < count; ++token) {
      const float* out = tile.out + token * width;
      const float dt = tile.dt[token], decay = tile.decay[token];
      float b[kColumns], c[kColumns], y[kRowsPerWarp] = {};
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int n = lane + kWarp * j;
        b[j] = n < args.state ? out[kRows + n] : 0.f;
        c[j] = n < args.state ? out[kRows + args.state + n] : 0.f;
      }
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) {
        const bool inside = mine + r < args.head_dim;
        const float x = inside ? dt * out[warp * kRowsPerWarp + r] : 0.f;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          state[r][j] = fmaf(state[r][j], decay, x * b[j]);
          y[r] = fmaf(state[r][j], c[j], y[r]);
        }
      }
      const float sum = warpSums(y, lane);
      const int r = lane / 8, row = mine + r;
      if (lane % 8 == 0 && row < args.head_dim) {
        const int64_t at = int64_t(from + token);
        const float z = rows[at * m.row + head * args.head_dim + row];
        const float x = out[warp * kRowsPerWarp + r];
        args.y[(first + at) * m.inner + head * args.head_dim + row] =
            fmaf(args.d[head], x, sum) * silu(z);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int n = lane + kWarp * j;
      if (mine + r < args.head_dim && n < args.state)
        ssm[int64_t(r) * args.state + n] = state[r][j];
    }
  }
  if (tokens < 1) return;
  // One token writes the one row of the ring that no other CTA reads.
  const bool sharesGroup = head % m.headsPerGroup || blockIdx.y;
  for (int c = threadIdx.x; c < (sharesGroup ? kRows : width); c += kThreads) {
    const int channel = channelOf(args, m, head, row0, c);
    if (channel < 0) continue;
    args.conv[ringRow(args, m, slot, past) + channel] = rows[m.inner + channel];
  }
}

}  // namespace

ec_status mambaStepWorkspace(const ec_step& step, const ec_mamba& args, size_t* bytes) {
  *bytes = 0;
  return checkShape("mamba_step", step, args);
}

ec_status mambaStep(ec_stream stream, const ec_step& step, const ec_mamba& args) {
  constexpr const char* op = "mamba_step";
  EC_TRY(checkShape(op, step, args));
  EC_TRY(checkMambaPointers(op, step, args));
  if (step.n_seq == 0) return EC_OK;
  const dim3 grid(args.heads, ceilDiv(args.head_dim, kRows), step.n_seq);
  const size_t shared = Tile::bytes(args);
  const auto run = [&](auto* kernel) {
    return launchEarly(op, kernel, grid, kThreads, shared, stream, step, step, args);
  };
  if (args.state <= 32) return run(scan<1>);
  if (args.state <= 64) return run(scan<2>);
  return args.state <= 128 ? run(scan<4>) : run(scan<8>);
}

}  // namespace ec::cuda
