// SPDX-License-Identifier: Apache-2.0
//
// Kernels with one mistake each, or without it, for the emulator's detector of data races:
//   races NAME right|wrong
#include <cstdio>
#include <cstring>

#include "platform.h"

namespace ec::cuda {
namespace {

constexpr int kThreads = 64;

__global__ void blockBarrier(int* out, bool right) {
  __shared__ int values[kThreads];
  const int t = threadIdx.x;
  values[t] = t;
  if (right) __syncthreads();
  out[blockIdx.x * kThreads + t] = values[kThreads - 1 - t];
}

__global__ void warpBarrier(int* out, bool right) {
  __shared__ int values[kThreads];
  const int t = threadIdx.x;
  values[t] = t;
  if (right) __syncwarp();
  out[t] = values[t ^ 1];
}

__global__ void warpBarrierForBlock(int* out, bool right) {
  __shared__ int values[kThreads];
  const int t = threadIdx.x;
  values[t] = t;
  right ? __syncthreads() : __syncwarp();
  out[t] = values[t ^ 32];
}

__global__ void halfWarps(int* out, bool right) {
  __shared__ int values[kThreads];
  const int t = threadIdx.x;
  values[t] = t;
  __syncwarp(t % 32 < 16 ? 0xffff : 0xffff0000);
  out[t] = values[t ^ (right ? 1 : 16)];
}

__global__ void shuffled(int* out, bool right) {
  __shared__ int values[kThreads];
  const int t = threadIdx.x;
  values[t] = t;
  const int other = __shfl_sync(kAll, t % 32, t % 32 ^ 1);
  if (right) __syncwarp();
  out[t] = values[t / 32 * 32 + other];
}

// What lanes tell each other by a third: 0 to 1, then 1 to 2.
__global__ void handedOn(int* out, bool right) {
  __shared__ int value;
  const int t = threadIdx.x;
  if (t == 0) value = 1;
  if (t < 2) __syncwarp(3);
  if (right && (t == 1 || t == 2)) __syncwarp(6);
  if (t == 2) *out = value;
}

__global__ void overwritten(int* out, bool right) {
  __shared__ int value;
  const int t = threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    if (t == 0) value = i;
    __syncthreads();
    out[t] = value;
    if (right) __syncthreads();
  }
}

// The last to read is the one that writes.
__global__ void overwrittenInWarp(int* out, bool right) {
  __shared__ int value[32];
  const int t = threadIdx.x;
  if (t < 32) {
    value[t] = t;
    __syncwarp();
    out[t] = value[0] + value[31];
    if (right) __syncwarp();
    if (t == 31) value[0] = value[31] = 1;
  }
}

__global__ void bytesOfAWord(int* out, bool right) {
  __shared__ int words[kThreads / 4];
  const int t = threadIdx.x;
  auto* bytes = reinterpret_cast<uint8_t*>(words);
  bytes[t] = 1;
  out[t] = right ? bytes[t] : words[t / 4];
}

__global__ void sharedByFunctions(const uint4* in, int* out, bool right) {
  __shared__ uint4 values[kThreads];
  const int t = threadIdx.x;
  values[t] = loadStreaming(in + t);
  if (right) __syncthreads();
  out[t] = loadStreaming(values + kThreads - 1 - t).x;
}

__global__ void blocksWrite(int* out, bool right) {
  if (threadIdx.x == 0) out[right ? blockIdx.x : 0] = 1;
}

__global__ void blocksRead(int* out, bool right) {
  if (threadIdx.x == 0) out[blockIdx.x] = 1;
  if (threadIdx.x == 1) out[gridDim.x + blockIdx.x] = out[right ? gridDim.x * 2 : 0];
}

__global__ void counter(int* out, bool right) {
  atomicAdd(out, 1);
  if (!right && blockIdx.x == 1 && threadIdx.x == 5) out[1] = *out;
}

__global__ void copied(const uint4* in, int* out, bool right) {
  const int t = threadIdx.x;
  auto* values = dynamicShared<uint4>();
  copyAsync(values + t, in + t);
  commitAsync();
  waitAsync<0>();
  if (right) __syncthreads();
  out[t] = values[kThreads - 1 - t].x;
}

__global__ void copyAwaited(const uint4* in, int* out, bool right) {
  const int t = threadIdx.x;
  auto* values = dynamicShared<uint4>();
  copyAsync(values + t, in + t);
  commitAsync();
  if (right) waitAsync<0>();
  out[t] = values[t].y;
  waitAsync<0>();
}

__global__ void refilled(const uint4* in, int* out, bool right) {
  const int t = threadIdx.x;
  auto* values = dynamicShared<uint4>();
  for (int i = 0; i < 2; ++i) {
    copyAsync(values + t, in + t);
    commitAsync();
    waitAsync<0>();
    __syncthreads();
    out[t] = values[kThreads - 1 - t].x;
    if (right) __syncthreads();
  }
}

__global__ void copySource(uint4* in, bool right) {
  const int t = threadIdx.x;
  copyAsync(dynamicShared<uint4>() + t, in + t);
  commitAsync();
  if (right) waitAsync<0>();
  __syncthreads();
  in[t ^ 32].x = 1;
  waitAsync<0>();
}

__global__ void writes(int* out) { out[blockIdx.x] = 1; }
__global__ void reads(const int* in, int* out) { out[blockIdx.x] = in[blockIdx.x]; }
__global__ void waits() { awaitEarlier(); }
__global__ void readsEarly(const int* in, int* out, bool right) {
  if (right) awaitEarlier();
  const int value = in[blockIdx.x];
  awaitEarlier();
  out[blockIdx.x] = value;
}
__global__ void writesEarly(int* out, bool right) {
  if (right) awaitEarlier();
  out[blockIdx.x] = 2;
  awaitEarlier();
}
// Reads first, so that the early read is not the last.
__global__ void readsAndWrites(int* out) { out[blockIdx.x] = out[blockIdx.x] + 1; }

struct Toys {
  bool right;
  int* out = new int[4 * kThreads]();
  uint4* in = new uint4[kThreads]();
  ec_stream stream = reinterpret_cast<ec_stream>(emulator::ownStream());
  ec_step step = {};

  template <class... Parameters, class... Arguments>
  void run(int blocks, int count, void (*kernel)(Parameters...), const Arguments&... arguments) {
    launch("toy", kernel, dim3(blocks), count, kThreads * sizeof(uint4), stream, arguments...);
  }
  template <class... Parameters, class... Arguments>
  void runEarly(void (*kernel)(Parameters...), const Arguments&... arguments) {
    step.flags = EC_OVERLAP;
    launchEarly("toy", kernel, dim3(3), 1, 0, stream, step, arguments...);
  }

  bool run(const char* name) {
    const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
    const Together together;
    if (is("blockBarrier")) return run(3, kThreads, blockBarrier, out, right), true;
    if (is("warpBarrier")) return run(1, kThreads, warpBarrier, out, right), true;
    if (is("warpBarrierForBlock")) return run(1, kThreads, warpBarrierForBlock, out, right), true;
    if (is("halfWarps")) return run(1, kThreads, halfWarps, out, right), true;
    if (is("shuffled")) return run(1, kThreads, shuffled, out, right), true;
    if (is("handedOn")) return run(1, kThreads, handedOn, out, right), true;
    if (is("overwritten")) return run(1, kThreads, overwritten, out, right), true;
    if (is("overwrittenInWarp")) return run(1, kThreads, overwrittenInWarp, out, right), true;
    if (is("bytesOfAWord")) return run(1, kThreads, bytesOfAWord, out, right), true;
    if (is("sharedByFunctions")) return run(1, kThreads, sharedByFunctions, in, out, right), true;
    if (is("blocksWrite")) return run(3, kThreads, blocksWrite, out, right), true;
    if (is("blocksRead")) return run(3, kThreads, blocksRead, out, right), true;
    if (is("counter")) return run(3, kThreads, counter, out, right), true;
    if (is("copied")) return run(1, kThreads, copied, in, out, right), true;
    if (is("copyAwaited")) return run(1, kThreads, copyAwaited, in, out, right), true;
    if (is("refilled")) return run(1, kThreads, refilled, in, out, right), true;
    if (is("copySource")) return run(1, kThreads, copySource, in, right), true;
    if (is("earlyRead")) {
      run(3, 1, writes, out);
      return runEarly(readsEarly, out, out + 3, right), true;
    }
    if (is("earlyWrite")) {
      run(3, 1, reads, out, out + 3);
      return runEarly(writesEarly, out, right), true;
    }
    if (is("earlyReadOfUpdated")) {
      run(3, 1, readsAndWrites, out);
      return runEarly(readsEarly, out, out + 3, right), true;
    }
    if (is("launchAfterNext")) {
      run(3, 1, writes, out);
      right ? run(3, 1, waits) : runEarly(waits);
      return runEarly(readsEarly, out, out + 3, false), true;
    }
    return false;
  }
};

}  // namespace
}  // namespace ec::cuda

int main(int count, char** arguments) {
  const bool known =
      count == 3 && ec::cuda::Toys{std::strcmp(arguments[2], "right") == 0}.run(arguments[1]);
  if (!known) std::fprintf(stderr, "races NAME right|wrong, a name of those in races.cu\n");
  return known ? 0 : 2;
}
