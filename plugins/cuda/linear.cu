// SPDX-License-Identifier: Apache-2.0
//
// y = act(W norm(x)) + residual
//
//   x [n_tok][k] float32, W [n][k] float32, float16, U4_64 or I8_64, residual and y [n_tok][n]
//   float32
//
// Bound: memory for a few tokens, one read of W; the tensor cores for many (product.cuh).
// Reference: edgecascade/backends/reference.py  Test: tests/test_linear_kernels.py
#include "kernels.h"
#include "product.cuh"

namespace ec::cuda {
namespace {

struct TokenRows {
  ec_step step;
  __device__ int count() const { return liveRows(step); }
  __device__ int operator()(int i) const { return i < liveRows(step) ? i : -1; }
};

struct StoreLinear {
  const float* residual;
  float* y;
  int64_t n;
  int act;
  __device__ float* at(int row, int r) const { return y + row * n + r; }
  __device__ float value(int row, int r, float product) const {
    const float v = activate(act, product);
    return residual ? v + residual[row * n + r] : v;
  }
  __device__ void operator()(int row, int r, float product) const {
    *at(row, r) = value(row, r, product);
  }
};

}  // namespace

ec_status linearWorkspace(const ec_step& step, const ec_linear& args, size_t* bytes) {
  EC_TRY(checkLinearShape(step, args));
  Arena arena;
  ProductScratch(arena, args.w, step.n_tok);
  *bytes = arena.bytes();
  return EC_OK;
}

ec_status linear(ec_stream stream, const ec_step& step, const ec_linear& args) {
  EC_TRY(checkLinearShape(step, args));
  EC_TRY(checkLinearPointers(args));
  Arena arena(step);
  const ProductScratch scratch(arena, args.w, step.n_tok);
  EC_TRY(arena.status("linear"));
  return product("linear", stream, args.x, args.w, args.norm, step.n_tok, scratch, TokenRows{step},
                 StoreLinear{args.residual, args.y, args.w.n, args.act});
}

}  // namespace ec::cuda
