// SPDX-License-Identifier: Apache-2.0
//
// y = act(W norm(x)) + residual
//
//   x [n_tok][k] float32, W [n][k] float32, float16, U4_64 or I8_64, residual and y [n_tok][n]
//   float32
//
// Blocks multiply int8 activations (acts.h), float weights float32 ones. Bound: memory for a few
// tokens, one read of W; the integer dot product for many. Reference:
// edgecascade/backends/reference.py  Test: tests/test_linear_kernels.py
#include "kernels.h"
#include "matmul.h"

namespace ec::EC_ISA {

namespace {

struct Scratch {
  int32_t* rows;
  ActsBuffer x;

  Scratch(Arena& arena, const ec_step& step, const ec_linear& args)
      : rows(arena.take<int32_t>(step.n_tok)),
        x(arena, step.n_tok, args.w.k, !isBlockType(args.w.type), isBlockType(args.w.type)) {}
};

}  // namespace

ec_status linearWorkspace(const ec_step& step, const ec_linear& args, size_t* bytes) {
  EC_TRY(checkLinearShape(step, args));
  Arena arena;
  Scratch scratch(arena, step, args);
  *bytes = arena.bytes();
  return EC_OK;
}

ec_status linear(Pool& pool, const ec_step& step, const ec_linear& args) {
  EC_TRY(checkLinearShape(step, args));
  EC_TRY(checkStep("linear", step));
  EC_TRY(checkLinearPointers(args));
  Arena arena(step);
  Scratch scratch(arena, step, args);
  EC_TRY(arena.status("linear"));

  const int64_t tokens = liveTokens(step), n = args.w.n, k = args.w.k;
  pool.parallelFor(tokens, [&](int64_t t, int) {
    scratch.rows[t] = static_cast<int32_t>(t);
    prepareRow(args.x + t * k, args.norm, scratch.x, t);
  });
  const Matrix w(args.w);
  const Acts x = scratch.x.acts();
  pool.parallelFor(tokens > 0 ? w.blockRows() : 0, [&](int64_t b, int) {
    const int count = w.rowsIn(b);
    multiply(w, b, x, scratch.rows, tokens, [&](int64_t first, int m, const float* out) {
      for (int i = 0; i < m; ++i, out += kBlockRows) {
        const int64_t at = (first + i) * n + b * kBlockRows;
        for (int r = 0; r < count; ++r) {
          const float v = activate(args.act, out[r]);
          args.y[at + r] = args.residual ? v + args.residual[at + r] : v;
        }
      }
    });
  });
  return EC_OK;
}

}  // namespace ec::EC_ISA
