// SPDX-License-Identifier: Apache-2.0
//
// logits[i] = W norm(x[out_row[i]]), -inf where the mask's bit is clear
//
//   x [n_tok][d] float32, W [vocab][d] any type, mask [n_out][(vocab + 31) / 32], logits
//   [n_out][vocab] float32
//
// Bound: memory, one read of W (product.cuh). Outputs whose row belongs to a sequence that does not
// count, or that is no row of the step, are left as they are.
// Reference: edgecascade/backends/reference.py  Test: tests/test_linear_kernels.py
#include "kernels.h"
#include "product.cuh"

namespace ec::cuda {
namespace {

struct OutputRows {
  ec_step step;
  __device__ int count() const { return step.n_out; }
  __device__ int operator()(int i) const {
    const int row = step.out_row[i];
    return row >= 0 && row < liveRows(step) ? row : -1;
  }
};

struct StoreLogits {
  const uint32_t* mask;
  float* logits;
  int64_t vocab;
  __device__ float* at(int output, int r) const { return logits + output * vocab + r; }
  __device__ float value(int output, int r, float product) const {
    const bool allowed = !mask || mask[output * ((vocab + 31) / 32) + r / 32] >> r % 32 & 1;
    return allowed ? product : -INFINITY;
  }
  __device__ void operator()(int output, int r, float product) const {
    *at(output, r) = value(output, r, product);
  }
};

}  // namespace

ec_status headWorkspace(const ec_step& step, const ec_head& args, size_t* bytes) {
  EC_TRY(checkHeadShape(step, args));
  Arena arena;
  ProductScratch(arena, args.w, step.n_out);
  *bytes = arena.bytes();
  return EC_OK;
}

ec_status head(ec_stream stream, const ec_step& step, const ec_head& args) {
  EC_TRY(checkHeadShape(step, args));
  if (step.n_out == 0) return EC_OK;  // a chunk of a prompt that is not its last
  EC_TRY(checkHeadPointers(step, args));
  Arena arena(step);
  const ProductScratch scratch(arena, args.w, step.n_out);
  EC_TRY(arena.status("head"));
  return product("head", stream, args.x, args.w, args.norm, step.n_out, scratch, OutputRows{step},
                 StoreLogits{args.mask, args.logits, args.w.n});
}

}  // namespace ec::cuda
