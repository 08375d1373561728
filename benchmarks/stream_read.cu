// SPDX-License-Identifier: Apache-2.0
//
// Reads memory and keeps nothing: what the kernels of a decode step could reach at most. Loads are
// those of the kernels, 16 bytes a lane past L1, four in flight; benchmarks/gpu.py compiles and
// calls it.
#include "platform.h"

namespace ec::cuda {
namespace {

constexpr int kThreads = 512, kLoads = 4;

__global__ void __launch_bounds__(kThreads) readAll(const uint4* data, int64_t count, uint4* sink) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  uint4 all = make_uint4(0, 0, 0, 0);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += kLoads * stride) {
    uint4 part[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int64_t at = i + j * stride;
      part[j] = loadStreaming(data + (at < count ? at : i));
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      all.x ^= part[j].x, all.y ^= part[j].y, all.z ^= part[j].z, all.w ^= part[j].w;
    }
  }
  // Never true for the zeros that are read, which the compiler cannot know.
  if ((all.x | all.y | all.z | all.w) != 0) *sink = all;
}

}  // namespace
}  // namespace ec::cuda

// `bytes` is a multiple of 16. Returns 0, or what the launch returned.
extern "C" __attribute__((visibility("default"))) int stream_read(ec_stream stream,
                                                                  const void* data, int64_t bytes,
                                                                  void* sink, int blocks) {
  using namespace ec::cuda;
  return launch("stream_read", readAll, dim3(blocks), kThreads, 0, stream,
                static_cast<const uint4*>(data), bytes / 16, static_cast<uint4*>(sink));
}
