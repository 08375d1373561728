// SPDX-License-Identifier: Apache-2.0
//
// The op table of one ISA.
#include "kernels.h"

namespace ec::EC_ISA {

const Kernels& kernels() {
  static const Kernels table = {
      EC_ISA_NAME,
      {embed, embedWorkspace},
      {linear, linearWorkspace},
      {mambaStep, mambaStepWorkspace},
      {mambaPrefill, mambaPrefillWorkspace},
      {attentionDecode, attentionDecodeWorkspace},
      {attentionPrefill, attentionPrefillWorkspace},
      {moe, moeWorkspace},
      {head, headWorkspace},
      {sample, sampleWorkspace},
      pack,
  };
  return table;
}

}  // namespace ec::EC_ISA
