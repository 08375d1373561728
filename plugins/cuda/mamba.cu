// SPDX-License-Identifier: Apache-2.0
//
// Mamba-2 for one token of each sequence; mamba.cuh has the equations.
//
// A CTA keeps 32 rows of one head's state in registers, a lane the columns n = lane mod 32; the
// convolution of its channels is part of it. Bound: memory, 8 bytes a state value.
// Reference: edgecascade/backends/reference.py   Test: tests/test_mamba_kernels.py
#include "ahead.cuh"
#include "mamba.cuh"

namespace ec::cuda {
namespace {

using namespace mamba;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRowsPerWarp = 4, kRows = kWarps * kRowsPerWarp;  // of a head's state

// Channels that a CTA convolves: kRows of x, then B and C of the group.
__host__ __device__ inline int ctaChannels(const ec_mamba& args) { return kRows + 2 * args.state; }

// The four sums over the warp, one in each quarter of it: the sum of v[i] in lanes 8 i to 8 i + 7.
__device__ __forceinline__ float warpSums(const float (&v)[4], int lane) {
  const bool high = lane & 16, odd = lane & 8;
  float first = (high ? v[2] : v[0]) + __shfl_xor_sync(kAll, high ? v[0] : v[2], 16);
  float second = (high ? v[3] : v[1]) + __shfl_xor_sync(kAll, high ? v[1] : v[3], 16);
  float sum = (odd ? second : first) + __shfl_xor_sync(kAll, odd ? first : second, 8);
  for (int bits = 4; bits > 0; bits >>= 1) sum += __shfl_xor_sync(kAll, sum, bits);
  return sum;
}

// Channel of the convolution that the CTA's channel c is; -1 beyond the head.
__device__ __forceinline__ int channelOf(const ec_mamba& args, const Layout& m, int head, int row0,
                                         int c) {
  if (c < kRows) return row0 + c < args.head_dim ? head * args.head_dim + row0 + c : -1;
  const int group = head / m.headsPerGroup, n = c - kRows;
  return n < args.state ? m.inner + group * args.state + n
                        : m.inner + args.groups * args.state + group * args.state + n - args.state;
}

// The whole CTA: its channels after the convolution, out [ctaChannels]; row is the token's. The
// token goes into the row of the ring that no CTA reads.
__device__ __forceinline__ void convolve(const ec_mamba& args, const Layout& m, const float* row,
                                         int head, int row0, int slot, int past, float* out) {
  const bool sharesGroup = head % m.headsPerGroup || row0;  // another CTA has its B and C, too
  for (int c = threadIdx.x; c < ctaChannels(args); c += kThreads) {
    const int channel = channelOf(args, m, head, row0, c), history = args.kernel - 1;
    if (channel < 0) continue;
    const float now = row[m.inner + channel];
    float sum = args.conv_bias ? args.conv_bias[channel] : 0.f;
#pragma unroll 4
    for (int j = 0; j <= history; ++j) {
      const float value =
          j < history ? args.conv[ringRow(args, m, slot, past - history + j) + channel] : now;
      sum = fmaf(args.conv_weight[j * m.channels + channel], value, sum);
    }
    out[c] = silu(sum);
    if (c < kRows || !sharesGroup) args.conv[ringRow(args, m, slot, past) + channel] = now;
  }
}

// kColumns: columns of the state that a lane keeps. Four CTAs a multiprocessor for the 30B's 128
// columns; other widths spill on sm_110 then.
template <int kColumns>
__global__ void __launch_bounds__(kThreads, kColumns == 4 ? 4 : 3)
    scan(ec_step step, ec_mamba args, Ahead ahead) {
  startDependents();
  const int sequence = blockIdx.z, head = blockIdx.x, row0 = blockIdx.y * kRows;
  if (sequence >= liveSequences(step)) return awaitEarlier();
  const Layout m(args);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int token = step.start[sequence], slot = step.slot[sequence], past = step.past[sequence];
  float* out = dynamicShared<float>();
  const float* row = args.zxbcdt + int64_t(token) * m.row;

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
  for (int c = threadIdx.x; c < ctaChannels(args); c += kThreads) {
    const int channel = channelOf(args, m, head, row0, c);
    for (int j = 0; channel >= 0 && j < args.kernel; ++j) {
      prefetchL2(args.conv_weight + j * m.channels + channel);
      if (j > 0) prefetchL2(args.conv + ringRow(args, m, slot, past - j) + channel);
    }
  }
  awaitEarlier();
  convolve(args, m, row, head, row0, slot, past, out);
  const float dt = softplus(row[m.inner + m.channels + head] + args.dt_bias[head]);
  const float decay = expf(dt * args.a[head]);
  prefetch(ahead);
  __syncthreads();

  float b[kColumns], c[kColumns], y[kRowsPerWarp] = {};
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int n = lane + kWarp * j;
    b[j] = n < args.state ? out[kRows + n] : 0.f;
    c[j] = n < args.state ? out[kRows + args.state + n] : 0.f;
  }
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const float x = mine + r < args.head_dim ? dt * out[warp * kRowsPerWarp + r] : 0.f;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int n = lane + kWarp * j;
      state[r][j] = fmaf(state[r][j], decay, x * b[j]);
      y[r] = fmaf(state[r][j], c[j], y[r]);
      if (mine + r < args.head_dim && n < args.state)
        ssm[int64_t(r) * args.state + n] = state[r][j];
    }
  }
  const float sum = warpSums(y, lane);
  const int r = lane / 8;
  if (lane % 8 || mine + r >= args.head_dim) return;
  const int column = head * args.head_dim + mine + r;
  args.y[int64_t(token) * m.inner + column] =
      fmaf(args.d[head], out[warp * kRowsPerWarp + r], sum) * silu(row[column]);
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
  const size_t shared = ctaChannels(args) * sizeof(float);
  const auto run = [&](auto* kernel) {
    return launchEarly(op, kernel, grid, kThreads, shared, stream, step, step, args, aheadOf(step));
  };
  if (args.state <= 32) return run(scan<1>);
  if (args.state <= 64) return run(scan<2>);
  return args.state <= 128 ? run(scan<4>) : run(scan<8>);
}

}  // namespace ec::cuda
