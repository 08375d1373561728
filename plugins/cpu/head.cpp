// SPDX-License-Identifier: Apache-2.0
//
// logits[i] = W norm(x[out_row[i]]), -inf where the mask's bit is clear
//
//   x [n_tok][d] float32, W [vocab][d] any type, mask [n_out][(vocab + 31) / 32], logits
//   [n_out][vocab] float32
//
// Bound: memory, one read of W. Outputs whose row belongs to a sequence that does not count are
// left as they are. Reference: edgecascade/backends/reference.py  Test:
// tests/test_linear_kernels.py
#include <limits>

#include "kernels.h"
#include "matmul.h"

namespace ec::EC_ISA {

namespace {

static_assert(kBlockRows == 32, "a word of the mask covers one block row");

struct Scratch {
  int32_t* rows;     // [n_out] rows of x below, 0 .. count-1
  int32_t* outputs;  // [n_out] which output each of them is
  ActsBuffer x;

  Scratch(Arena& arena, const ec_step& step, const ec_head& args)
      : rows(arena.take<int32_t>(step.n_out)),
        outputs(arena.take<int32_t>(step.n_out)),
        x(arena, step.n_out, args.w.k, !isBlockType(args.w.type), isBlockType(args.w.type)) {}
};

ec_status checkRows(const ec_step& step) {
  for (int32_t i = 0; i < step.n_out; ++i) {
    if (step.out_row[i] < 0 || step.out_row[i] >= step.n_tok) {
      return fail(EC_INVALID, "head: out_row[%d] is %d, outside 0..n_tok-1 = %d", i,
                  step.out_row[i], step.n_tok - 1);
    }
  }
  return EC_OK;
}

}  // namespace

ec_status headWorkspace(const ec_step& step, const ec_head& args, size_t* bytes) {
  EC_TRY(checkHeadShape(step, args));
  Arena arena;
  Scratch scratch(arena, step, args);
  *bytes = arena.bytes();
  return EC_OK;
}

ec_status head(Pool& pool, const ec_step& step, const ec_head& args) {
  EC_TRY(checkHeadShape(step, args));
  if (step.n_out == 0) return EC_OK;  // a chunk of a prompt that is not its last
  EC_TRY(checkStep("head", step));
  EC_TRY(checkHeadPointers(step, args));
  EC_TRY(checkRows(step));
  Arena arena(step);
  Scratch scratch(arena, step, args);
  EC_TRY(arena.status("head"));

  const int64_t vocab = args.w.n, k = args.w.k;
  const int32_t live = liveTokens(step);
  int32_t count = 0;
  for (int32_t i = 0; i < step.n_out; ++i) {
    if (step.out_row[i] < live) scratch.outputs[count++] = i;
  }
  pool.parallelFor(count, [&](int64_t i, int) {
    scratch.rows[i] = static_cast<int32_t>(i);
    prepareRow(args.x + step.out_row[scratch.outputs[i]] * k, args.norm, scratch.x, i);
  });
  const Matrix w(args.w);
  const Acts x = scratch.x.acts();
  const int64_t words = w.blockRows();
  pool.parallelFor(count > 0 ? words : 0, [&](int64_t b, int) {
    const int rows = w.rowsIn(b);
    multiply(w, b, x, scratch.rows, count, [&](int64_t first, int m, const float* out) {
      for (int i = 0; i < m; ++i, out += kBlockRows) {
        const int64_t output = scratch.outputs[first + i];
        const uint32_t allowed = args.mask ? args.mask[output * words + b] : ~0u;
        float* logits = args.logits + output * vocab + b * kBlockRows;
        for (int r = 0; r < rows; ++r) {
          logits[r] = allowed >> r & 1 ? out[r] : -std::numeric_limits<float>::infinity();
        }
      }
    });
  });
  return EC_OK;
}

}  // namespace ec::EC_ISA
