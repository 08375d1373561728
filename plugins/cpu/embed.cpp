// SPDX-License-Identifier: Apache-2.0
//
// Embedding: x[t] = table[tokens[t]]
//
//   tokens [n_tok] int32, table [vocab][d] fp32 or fp16, x [n_tok][d] fp32
//
// Bound: memory, one table row a token. Tokens are host memory here, so a bad id is refused instead
// of read. Reference: edgecascade/backends/reference.py   Test: tests/test_embed_kernel.py
#include "kernels.h"
#include "simd.h"

namespace ec::EC_ISA {
namespace {

void widenRow(const uint16_t* row, int64_t d, float* x) {
  int64_t i = 0;
  for (; i + kWidth <= d; i += kWidth) store(x + i, loadHalf(row + i));
  for (; i < d; ++i) x[i] = h2f(row[i]);
}

}  // namespace

ec_status embedWorkspace(const ec_step& step, const ec_embed& args, size_t* bytes) {
  *bytes = 0;
  return checkEmbedShape(step, args);
}

ec_status embed(Pool&, const ec_step& step, const ec_embed& args) {
  EC_TRY(checkEmbedShape(step, args));
  EC_TRY(checkStep("embed", step));
  EC_TRY(checkEmbedPointers(args));
  const int32_t rows = liveTokens(step);
  for (int32_t t = 0; t < rows; ++t) {
    if (args.tokens[t] < 0 || args.tokens[t] >= args.table.n) {
      return fail(EC_INVALID, "embed: tokens[%d] is %d, the table has rows 0 to %d", t,
                  args.tokens[t], args.table.n - 1);
    }
  }
  const int64_t d = args.table.k;
  for (int32_t t = 0; t < rows; ++t) {
    const int64_t at = args.tokens[t] * d;
    float* x = args.x + t * d;
    if (args.table.type == EC_F32) {
      std::memcpy(x, static_cast<const float*>(args.table.data) + at, d * sizeof(float));
    } else {
      widenRow(static_cast<const uint16_t*>(args.table.data) + at, d, x);
    }
  }
  return EC_OK;
}

}  // namespace ec::EC_ISA
