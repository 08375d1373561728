// SPDX-License-Identifier: Apache-2.0
#include "common.h"

namespace ec {

int32_t liveSeqs(const ec_step& step) { return step.live ? *step.live : step.n_seq; }

int32_t liveTokens(const ec_step& step) { return step.live ? step.start[*step.live] : step.n_tok; }

ec_status checkStep(const char* op, const ec_step& step) {
  EC_TRY(checkStepShape(op, step));
  if (!step.live) return EC_OK;
  EC_TRY(checkPointer(op, "step.start (needed with step.live)", step.start));
  const int32_t live = *step.live;
  if (live < 0 || live > step.n_seq) {
    return fail(EC_INVALID, "%s: step.live is %d, outside 0..n_seq = %d", op, live, step.n_seq);
  }
  const int32_t tokens = step.start[live];
  if (tokens < 0 || tokens > step.n_tok) {
    return fail(EC_INVALID, "%s: step.start[%d] is %d, outside 0..n_tok = %d", op, live, tokens,
                step.n_tok);
  }
  return EC_OK;
}

}  // namespace ec
