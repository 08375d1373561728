// SPDX-License-Identifier: Apache-2.0
//
// Kernels that do one thing wrong each, for the emulator to find: faulty NAME. "none" and "unset"
// end well; "unset" prints what it read.
#include <cstdio>
#include <cstring>

#include "platform.h"

extern "C" void* ec_emulated_alloc(uint64_t bytes, const char* name);
extern "C" void ec_emulated_free(void* at);

namespace ec::cuda {
namespace {

constexpr int kThreads = 64, kCount = 50;

// x[i + by] = i, or what is there in the place of i.
__global__ void store(float* x, int by) {
  if (threadIdx.x < kCount) x[int(threadIdx.x) + by] = float(threadIdx.x);
}
__global__ void load(float* x, int by) {
  if (threadIdx.x < kCount) x[threadIdx.x] = x[int(threadIdx.x) + by];
}
__global__ void storeShared(float*, int by) {
  if (threadIdx.x < kCount) dynamicShared<float>()[int(threadIdx.x) + by] = 1.f;
}
__global__ void loadFour(float* x, int by) {
  if (threadIdx.x == 0) x[0] = reinterpret_cast<const float4*>(x + by)->w;
}
__global__ void streamFour(float* x, int by) {
  if (threadIdx.x == 0) x[0] = __uint_as_float(loadStreaming(x + by).w);
}
__global__ void loadTile(float*, int by) {
  uint32_t r[4];
  loadMatrices<false>(r, reinterpret_cast<const uint4*>(dynamicShared<float>() + by));
}
// The block before it has written what this one reads.
__global__ void loadUnset(float* x, int) {
  __shared__ float sums[kThreads];
  float* own = sums + threadIdx.x;
  if (blockIdx.x == 0 && threadIdx.x < kCount) x[threadIdx.x] = *own;
  __syncthreads();
  *own = 1.f;
}
__global__ void storeVariable(float* x, int by) {
  __shared__ float sums[kThreads];
  sums[int(threadIdx.x) + by] = 1.f;
  __syncthreads();
  if (threadIdx.x < kCount) x[threadIdx.x] = sums[threadIdx.x];
}
__global__ void branchOnUnset(float* x, int) {
  __shared__ bool found;
  if (threadIdx.x == 0 && found) x[0] = 1.f;
}
__global__ void multiply(float* x, int by) { x[0] = float(int(threadIdx.x + 1) * by); }
__global__ void convert(float* x, int by) { x[0] = float(static_cast<int>(float(by) * by)); }

struct Fault {
  const char* name;
  void (*kernel)(float*, int);
  int by;
  unsigned blocks = 2;
  bool atStart = false;  // x is at the start of a page, not at the end
};
const Fault kFaults[] = {
    {"none", store, 0},
    {"store-behind", store, 1},
    {"load-behind", load, 1},
    {"store-ahead", store, -1},
    {"load-ahead", load, -1, 2, true},
    {"store-near-behind", store, 1, 2, true},
    {"shared-behind", storeShared, 3},  // 50 floats, as multiples of 16 bytes go
    {"shared-ahead", storeShared, -1},
    {"misaligned", loadFour, 1},
    {"misaligned-stream", streamFour, 1},
    {"misaligned-tile", loadTile, 1},
    {"unset", loadUnset, 0},
    {"unset-bool", branchOnUnset, 0},
    {"index", storeVariable, 1},
    {"overflow", multiply, 1 << 30},
    {"conversion", convert, 1 << 20},
    {"no-blocks", store, 0, 0},
};

int run(const Fault& fault) {
  constexpr uintptr_t kPage = 4096;
  float* x;
  do {
    x = static_cast<float*>(ec_emulated_alloc(kCount * sizeof(float), "x"));
  } while (fault.atStart != (reinterpret_cast<uintptr_t>(x) % kPage == 0));
  std::memset(x, 0, kCount * sizeof(float));
  launch("faulty", fault.kernel, dim3(fault.blocks), kThreads, kCount * sizeof(float),
         reinterpret_cast<ec_stream>(emulator::ownStream()), x, fault.by);
  std::printf("%g\n", x[1]);
  ec_emulated_free(x);
  return 0;
}

}  // namespace
}  // namespace ec::cuda

int main(int, char** arguments) {
  for (const ec::cuda::Fault& fault : ec::cuda::kFaults) {
    if (std::strcmp(fault.name, arguments[1]) == 0) return ec::cuda::run(fault);
  }
  return 2;
}
