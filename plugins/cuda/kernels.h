// SPDX-License-Identifier: Apache-2.0
//
// The ops of the CUDA table. Each op file defines its two functions, api.cu collects them.
//   op:          checks scalars and pointers, then launches; whatever the step's arrays say is read
//                on the device.
//   opWorkspace: bytes of ec_step.workspace that the op needs.
#ifndef EC_CUDA_KERNELS_H
#define EC_CUDA_KERNELS_H

#include "checks.h"

namespace ec::cuda {

#define EC_DECLARE_OP(name, Args)                                          \
  ec_status name(ec_stream stream, const ec_step& step, const Args& args); \
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

}  // namespace ec::cuda

#endif  // EC_CUDA_KERNELS_H
