// SPDX-License-Identifier: Apache-2.0
//
// The three ways through a mixture of experts; moe.cu says when which.
#ifndef EC_CUDA_MOE_H
#define EC_CUDA_MOE_H

#include "kernels.h"

namespace ec::cuda {

// Up to 8 tokens, all matrices in blocks: three launches.
void moeDecodeScratch(Arena& arena, const ec_step& step, const ec_moe& args);
ec_status moeDecode(ec_stream stream, const ec_step& step, const ec_moe& args, Arena& arena);

// More tokens, all matrices in blocks: sorted by expert.
void moePrefillScratch(Arena& arena, const ec_step& step, const ec_moe& args);
ec_status moePrefill(ec_stream stream, const ec_step& step, const ec_moe& args, Arena& arena);

// Any number of tokens, any types: plain float32 sums.
void moePlainScratch(Arena& arena, const ec_step& step, const ec_moe& args);
ec_status moePlain(ec_stream stream, const ec_step& step, const ec_moe& args, Arena& arena);

// ids and weights of every token, unless they are forced.
ec_status routeTokens(ec_stream stream, const ec_step& step, const ec_moe& args);

}  // namespace ec::cuda

#endif  // EC_CUDA_MOE_H
