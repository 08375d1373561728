// SPDX-License-Identifier: Apache-2.0
//
// Embedding: x[t] = table[tokens[t]]
//
//   tokens [n_tok] int32, table [vocab][d] fp32 or fp16, x [n_tok][d] fp32
//
// Bound: memory, one table row a token. Tokens are in device memory, so a bad id cannot be refused:
// its row becomes NaN instead of something else's.
// Reference: edgecascade/backends/reference.py   Test: tests/test_embed_kernel.py
#include "ahead.cuh"
#include "blocks.cuh"
#include "kernels.h"

namespace ec::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void embedRows(ec_step step, ec_embed args, Ahead ahead) {
  startDependents();
  prefetch(ahead);
  const int row = blockIdx.x;
  if (row >= liveRows(step)) return;
  const int64_t token = args.tokens[row], d = args.table.k;
  const bool known = token >= 0 && token < args.table.n;
  for (int64_t k = threadIdx.x; k < d; k += kThreads) {
    args.x[row * d + k] = known ? weightAt(args.table, 0, token, k) : NAN;
  }
}

}  // namespace

ec_status embedWorkspace(const ec_step& step, const ec_embed& args, size_t* bytes) {
  *bytes = 0;
  return checkEmbedShape(step, args);
}

ec_status embed(ec_stream stream, const ec_step& step, const ec_embed& args) {
  EC_TRY(checkEmbedShape(step, args));
  EC_TRY(checkEmbedPointers(args));
  // Not early, whatever the flags say: a step begins when the one before it has ended.
  return launch("embed", embedRows, dim3(step.n_tok), kThreads, 0, stream, step, args,
                aheadOf(step));
}

}  // namespace ec::cuda
