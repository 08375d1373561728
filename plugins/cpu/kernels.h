// SPDX-License-Identifier: Apache-2.0
//
// The ops of one ISA. Each op file defines its functions in namespace ec::EC_ISA, table.cpp
// collects them.
//   op:          checks its arguments, then works on the pool.
//   opWorkspace: bytes of ec_step.workspace that the op needs. Reads scalars only, and never a
//   pointer's target.
#ifndef EC_CPU_KERNELS_H
#define EC_CPU_KERNELS_H

#include "common.h"
#include "pool.h"

namespace ec {

template <class Args>
struct Op {
  ec_status (*run)(Pool&, const ec_step&, const Args&);
  ec_status (*workspace)(const ec_step&, const Args&, size_t* bytes);
};

struct Kernels {
  const char* isa;
  Op<ec_embed> embed;
  Op<ec_linear> linear;
  Op<ec_mamba> mambaStep;
  Op<ec_mamba> mambaPrefill;
  Op<ec_attention> attentionDecode;
  Op<ec_attention> attentionPrefill;
  Op<ec_moe> moe;
  Op<ec_head> head;
  Op<ec_sample> sample;
  ec_status (*pack)(Pool&, const ec_pack&);
};

namespace EC_ISA {

#define EC_DECLARE_OP(name, Args)                               \
  ec_status name(Pool&, const ec_step& step, const Args& args); \
  ec_status name##Workspace(const ec_step& step, const Args& args, size_t* bytes);

EC_DECLARE_OP(embed, ec_embed)
EC_DECLARE_OP(linear, ec_linear)
EC_DECLARE_OP(mambaStep, ec_mamba)
EC_DECLARE_OP(mambaPrefill, ec_mamba)
EC_DECLARE_OP(attentionDecode, ec_attention)
EC_DECLARE_OP(attentionPrefill, ec_attention)
EC_DECLARE_OP(moe, ec_moe)
EC_DECLARE_OP(head, ec_head)
EC_DECLARE_OP(sample, ec_sample)
#undef EC_DECLARE_OP

ec_status pack(Pool&, const ec_pack& args);
const Kernels& kernels();

}  // namespace EC_ISA
}  // namespace ec

#endif  // EC_CPU_KERNELS_H
