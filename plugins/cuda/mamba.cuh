// SPDX-License-Identifier: Apache-2.0
//
// Mamba-2 from the input projection to the gate. With z | x | B | C | dt = zxbcdt[t] and g = h /
// (heads / groups):
//
//   xBC_t = silu(bias + sum_j conv_weight[j] * xBC_{t - (kernel-1) + j})     x | B | C before the
//   convolution
//   dt    = softplus(dt + dt_bias[h])                                        no clamp
//   S     = exp(dt a[h]) S + (dt x[h]) (x) B[g]                              S [head_dim][state]
//   y     = (S C[g] + d[h] x[h]) * silu(z[h])
//
// Shapes: zxbcdt [n_tok][2 di + 2 groups state + heads], di = heads head_dim; conv
// [slots][kernel][channels], a ring by position; ssm [slots][heads][head_dim][state]; y
// [n_tok][di]. A slot of a new sequence is all zeros.
//
// What mamba.cu and mamba_prefill.cu share.
#ifndef EC_CUDA_MAMBA_CUH
#define EC_CUDA_MAMBA_CUH

#include "kernels.h"
#include "platform.h"

namespace ec::cuda::mamba {

constexpr int kMaxState = 256;

struct Layout {
  int inner, channels, row, headsPerGroup;
  __host__ __device__ explicit Layout(const ec_mamba& a)
      : inner(a.heads * a.head_dim),
        channels(inner + 2 * a.groups * a.state),
        row(inner + channels + a.heads),
        headsPerGroup(a.heads / a.groups) {}
};

__device__ __forceinline__ int64_t ringRow(const ec_mamba& args, const Layout& m, int slot,
                                           int position) {
  return (int64_t(slot) * args.kernel + (position + args.kernel) % args.kernel) * m.channels;
}

__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

inline ec_status checkShape(const char* op, const ec_step& step, const ec_mamba& args) {
  EC_TRY(checkMambaShape(op, step, args));
  if (args.state <= kMaxState) return EC_OK;
  return fail(EC_UNSUPPORTED, "%s: state is %d, this backend takes at most %d", op, args.state,
              kMaxState);
}

}  // namespace ec::cuda::mamba

#endif  // EC_CUDA_MAMBA_CUH
