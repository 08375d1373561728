// SPDX-License-Identifier: Apache-2.0
//
// The first weights of the launch after this one, on their way to the L2 while this one ends: what
// EC_PREFETCH asks for, for devices whose launches cannot begin early. The border between two
// launches, in which the memory would have nothing to do, then moves what the next one needs first.
//
// Only weights: they lie where the host says. What depends on the step, chosen experts and states
// of slots, is not known to the launch before, and what is wanted only after the next launch would
// be gone from the L2 by then.
#ifndef EC_CUDA_AHEAD_CUH
#define EC_CUDA_AHEAD_CUH

#include "kernels.h"
#include "platform.h"

namespace ec::cuda {

// `pieces` of `bytes` bytes each; piece i starts with row i * step / 2^16.
struct Ahead {
  const uint8_t* data = nullptr;
  unsigned rowBytes = 0, step = 0, pieces = 0, bytes = 0;
};

// Of the call that follows in ec_api.run; nothing where the step does not ask for it.
Ahead aheadOf(const ec_step& step);
// Of a launch that takes rows of a matrix in their order, one CTA for each row of blocks.
Ahead aheadOf(const ec_step& step, const ec_weight& w);

// While it lives, `next` is what follows the call that this thread makes; NULL: nothing.
class Following {
 public:
  explicit Following(const ec_call* next);
  ~Following();
};

// The whole CTA, when it has requested the last of its own weights. The last CTAs of a launch share
// the work, so that those before them have what they asked for.
__device__ __forceinline__ void prefetch(const Ahead& ahead) {
  const unsigned cta = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned ctas = gridDim.x * gridDim.y * gridDim.z;
  for (unsigned piece = ctas - 1 - cta; piece < ahead.pieces; piece += ctas) {
    const uint8_t* from = ahead.data + uint64_t(piece * ahead.step >> 16) * ahead.rowBytes;
    for (unsigned at = kLine * threadIdx.x; at < ahead.bytes; at += kLine * blockDim.x)
      prefetchL2(from + at);
  }
}

}  // namespace ec::cuda

#endif  // EC_CUDA_AHEAD_CUH
