// SPDX-License-Identifier: Apache-2.0
//
// Checks of the step that several ops share.
#ifndef EC_CPU_SEQUENCES_H
#define EC_CPU_SEQUENCES_H

#include "common.h"

namespace ec::EC_ISA {

inline int64_t atMost(int64_t value, int64_t bound) { return value < bound ? value : bound; }
inline int64_t ceilDiv(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Slots and past lengths of the live sequences are usable, and no slot is written by two of them.
inline ec_status checkSequences(const char* op, const ec_step& step) {
  EC_TRY(checkSequencePointers(op, step));
  const int32_t live = liveSeqs(step);
  for (int32_t s = 0; s < live; ++s) {
    if (step.slot[s] < 0) return fail(EC_INVALID, "%s: slot[%d] is %d", op, s, step.slot[s]);
    if (step.past[s] < 0) return fail(EC_INVALID, "%s: past[%d] is %d", op, s, step.past[s]);
    for (int32_t other = 0; other < s; ++other) {
      if (step.slot[other] == step.slot[s]) {
        return fail(EC_INVALID, "%s: sequences %d and %d both use slot %d", op, other, s,
                    step.slot[s]);
      }
    }
  }
  return EC_OK;
}

// The decode ops take one token of each sequence.
inline ec_status checkOneTokenEach(const char* op, const char* many, const ec_step& step) {
  const int32_t live = liveSeqs(step);
  for (int32_t s = 0; s < live; ++s) {
    const int32_t tokens = step.start[s + 1] - step.start[s];
    if (tokens != 1) {
      return fail(EC_INVALID, "%s: sequence %d has %d tokens; %s takes more than one", op, s,
                  tokens, many);
    }
  }
  return EC_OK;
}

}  // namespace ec::EC_ISA

#endif  // EC_CPU_SEQUENCES_H
