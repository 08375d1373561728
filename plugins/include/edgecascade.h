// SPDX-License-Identifier: Apache-2.0
//
// The kernel library's C ABI: one table of functions per backend, the same signatures for host and
// device memory.
//
// Contract of every op:
//   - It allocates nothing, waits for nothing outside its own work and reads no device memory on
//   the host, so that a
//     call is legal inside a TensorRT plugin's enqueue() and inside CUDA stream capture.
//   - What changes from step to step (slots, positions, tokens, live sequences) is read through
//   pointers in ec_step;
//     counts by value in ec_step are launch geometry only.
//   - Scratch memory is the caller's: ec_step.workspace, at least workspace_size() bytes, 256-byte
//   aligned.
//   - Activations, weights and states begin at a multiple of 16 bytes, integers at one of 4.
//   - A row's result does not depend on the other rows of the step, nor on the number of threads.
//   - It returns a status; last_error() then holds one sentence with the values that show what was
//   wrong.
//   - Activations are float32, row-major [token][channel]. Weights are as their ec_type says.
//
// The op table in edgecascade/ops.py lists the same structs field by field; tests/test_abi.py
// compares the two.
#ifndef EDGECASCADE_H
#define EDGECASCADE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EC_ABI_VERSION 1
#define EC_PAGE_TOKENS 64  // tokens in one KV page

typedef enum ec_status {
  EC_OK = 0,
  EC_INVALID = 1,      // an argument is out of range or missing
  EC_UNSUPPORTED = 2,  // valid, but not on this backend or ISA
  EC_WORKSPACE = 3,    // ec_step.workspace is too small
  EC_DEVICE = 4        // the device or the thread pool failed
} ec_status;

typedef enum ec_type {
  EC_F32 = 0,     // row-major [n][k]
  EC_F16 = 1,     // row-major [n][k]
  EC_BF16 = 2,    // source of pack() only
  EC_U4_64 = 16,  // blocks of 32 rows x 64 k, 1088 bytes: docs/bundle-format.md
  EC_I8_64 = 17,  // blocks of 32 rows x 64 k, 2112 bytes
  EC_I8_ROW = 18  // KV pages only: rows of int8, value = code * scale with an fp16 scale a row
} ec_type;

typedef enum ec_activation { EC_IDENTITY = 0, EC_RELU2 = 1 } ec_activation;

// A CUDA stream on the CUDA backend, a thread pool on the CPU backend.
typedef struct ec_stream_s* ec_stream;

// A matrix y = W x with W [n][k], or `experts` of them `expert_stride` bytes apart. n and k are the
// logical sizes: block types round them up to 32 and 64 and hold zero weights there. `data` NULL:
// absent.
typedef struct ec_weight {
  const void* data;
  uint64_t expert_stride;  // bytes
  int32_t n;
  int32_t k;
  int32_t type;  // ec_type
  int32_t experts;
} ec_weight;

// y = gamma * x / sqrt(mean(x^2) + eps), the mean over each of `groups` equal parts of a row. gamma
// NULL: y = x.
typedef struct ec_norm {
  const float* gamma;  // [k]
  float eps;
  int32_t groups;
} ec_norm;

// EC_OVERLAP: on a GPU, a launch of this call may begin, with what does not depend on it, before
// the launch before it has ended. The caller sees to it that the step's arrays were written, and
// the states of its slots last changed by a decode step, before the last embed or the last call
// without the flag: both wait for everything. Ignored where the device cannot do it.
//
// EC_PREFETCH: on a GPU, the launches of a step of up to 8 rows ask for the first weights of the
// next one, into the L2, while they end. Only run() knows what follows a call.
typedef enum ec_step_flag { EC_OVERLAP = 1, EC_PREFETCH = 2 } ec_step_flag;

// One step: n_tok rows that belong to n_seq sequences, sequence s owning rows start[s] ..
// start[s+1]-1.
typedef struct ec_step {
  const int32_t*
      live;  // [1] sequences that count, <= n_seq; rows of the others are skipped. NULL: all
  const int32_t* start;       // [n_seq + 1]
  const int32_t* slot;        // [n_seq] index into the state pools
  const int32_t* past;        // [n_seq] tokens the slot already holds
  const int32_t* page_table;  // [slots][max_pages] KV page of each 64 tokens of a slot
  const int32_t* out_row;     // [n_out] rows that head reads
  void* workspace;
  size_t workspace_bytes;
  int32_t n_tok;
  int32_t n_seq;
  int32_t n_out;
  int32_t max_pages;
  int32_t max_context;  // upper bound of past + new tokens over the sequences: launch geometry
  int32_t flags;        // of ec_step_flag
} ec_step;

// x[t] = table[tokens[t]]
typedef struct ec_embed {
  const int32_t* tokens;  // [n_tok]
  ec_weight table;        // [vocab][d], EC_F32 or EC_F16
  float* x;               // [n_tok][d]
} ec_embed;

// y = act(W norm(x)) + residual
typedef struct ec_linear {
  const float* x;  // [n_tok][k]
  ec_norm norm;
  ec_weight w;            // [n][k]
  const float* residual;  // [n_tok][n] or NULL; may be y
  float* y;               // [n_tok][n]
  int32_t act;            // ec_activation
} ec_linear;

// Mamba-2 from the input projection to the gate (docs/model.md): conv, SiLU, selective scan, D,
// gate by SiLU(z). The grouped norm that follows is the norm of the output projection's ec_linear.
typedef struct ec_mamba {
  const float* zxbcdt;  // [n_tok][2 heads head_dim + 2 groups state + heads]: z | x | B | C | dt
  const float* conv_weight;  // [kernel][channels], channels = heads head_dim + 2 groups state; tap
                             // kernel-1 is "now"
  const float* conv_bias;    // [channels] or NULL
  const float* a;            // [heads] = -exp(A_log)
  const float* d;            // [heads]
  const float* dt_bias;      // [heads]
  float* conv;               // [slots][kernel][channels] ring: position p lives in row p mod kernel
  float* ssm;                // [slots][heads][head_dim][state]
  float* y;                  // [n_tok][heads head_dim]
  int32_t heads;
  int32_t head_dim;
  int32_t groups;
  int32_t state;
  int32_t kernel;
  int32_t chunk;  // tokens per chunk of the prefill scan; the result does not depend on it
} ec_mamba;

// Grouped-query attention without positional encoding; appends the step's keys and values to the
// pages, then attends.
typedef struct ec_attention {
  const float* qkv;  // [n_tok][(heads + 2 kv_heads) head_dim]: q | k | v
  void* kv;          // [pages][2][kv_heads] of [EC_PAGE_TOKENS][head_dim], which EC_I8_ROW follows
                     // with [EC_PAGE_TOKENS] scales
  float* y;          // [n_tok][heads head_dim]
  int32_t kv_type;   // EC_F32, EC_F16 or EC_I8_ROW
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  float scale;
} ec_attention;

// y = x + sum_k weight_k down[id_k] relu2(up[id_k] h) + shared_down relu2(shared_up h),  h =
// norm(x) score = sigmoid(router h); choice = score + bias, groups as DeepSeek-V3; weight = score /
// sum * scale. Ties go to the lower expert id. ids are ascending within a token.
typedef struct ec_moe {
  const float* x;  // [n_tok][d]
  ec_norm norm;
  const float* router;    // [experts][d]
  const float* bias;      // [experts]
  ec_weight up;           // [experts][ff][d]
  ec_weight down;         // [experts][d][ff]
  ec_weight shared_up;    // [shared_ff][d] or absent
  ec_weight shared_down;  // [d][shared_ff] or absent
  int32_t* ids;           // [n_tok][top_k] written, or read when force != 0
  float* weights;         // [n_tok][top_k] likewise
  float* y;               // [n_tok][d]; may be x
  int32_t top_k;
  int32_t n_group;
  int32_t topk_group;
  int32_t normalize;
  int32_t force;
  float scale;
} ec_moe;

// logits[i] = W norm(x[out_row[i]]); a cleared mask bit makes the logit -inf
typedef struct ec_head {
  const float* x;  // [n_tok][d]
  ec_norm norm;
  ec_weight w;           // [vocab][d]
  const uint32_t* mask;  // [n_out][(vocab + 31) / 32] or NULL
  float* logits;         // [n_out][vocab]
} ec_head;

typedef struct ec_sampling {
  const int32_t* seen;   // [n_seen] distinct tokens of prompt and answer
  const int32_t* count;  // [n_seen] how often each occurs in the answer, 0 if only in the prompt
  float temperature;     // 0: greedy
  float top_p;
  float min_p;
  float repetition;  // > 1 penalises tokens in `seen`
  float presence;
  float frequency;
  int32_t top_k;  // 0: all
  int32_t n_seen;
} ec_sampling;

// Penalties, then temperature, top-k, top-p, min-p; one draw by inverse CDF over tokens in
// (probability desc, id asc).
typedef struct ec_sample {
  const float* logits;        // [n_out][vocab]
  const ec_sampling* params;  // [n_out]
  const float* uniform;       // [n_out] in [0, 1), the caller's: every backend draws the same token
  int32_t* token;             // [n_out]
  float* logprob;             // [n_out] log softmax of the raw logits at the token
  int32_t vocab;
} ec_sample;

typedef enum ec_op {
  EC_OP_EMBED,
  EC_OP_LINEAR,
  EC_OP_MAMBA_STEP,     // ec_mamba, one token per sequence
  EC_OP_MAMBA_PREFILL,  // ec_mamba, any number
  EC_OP_ATTENTION_DECODE,
  EC_OP_ATTENTION_PREFILL,
  EC_OP_MOE,
  EC_OP_HEAD,
  EC_OP_SAMPLE,
  EC_OP_COUNT
} ec_op;

typedef ec_status (*ec_op_fn)(ec_stream, const ec_step*, const void* args);

// One op of a recorded forward pass.
typedef struct ec_call {
  const void* args;
  int32_t op;  // ec_op
  int32_t reserved;
} ec_call;

typedef struct ec_device {
  char name[128];
  char isa[32];
  int32_t threads;  // of the stream the caller gets by default
  int32_t sm;       // compute capability * 10, 0 on the CPU
  int32_t sm_count;
  int32_t l2_bytes;
  uint64_t memory_bytes;
  uint64_t read_bytes_per_s;  // measured, 0 if not
} ec_device;

// Quantize and order rows. src [n][k] row-major of EC_F32, EC_F16 or EC_BF16. U4_64 searches the
// scale that minimises the squared error of each group. Values that are not finite, or too large
// for an fp16 scale: EC_INVALID.
typedef struct ec_pack {
  const void* src;
  void* dst;
  uint64_t dst_bytes;
  int32_t src_type;
  int32_t dst_type;
  int32_t n;
  int32_t k;
} ec_pack;

typedef struct ec_api {
  int32_t abi;
  int32_t reserved;
  const char* backend;
  const char* isa;
  const char* (*last_error)(void);  // of the calling thread
  ec_status (*query)(ec_device* out);
  ec_status (*stream_create)(int32_t threads,
                             ec_stream* out);  // threads <= 0: as many as the memory can feed
  void (*stream_destroy)(ec_stream);
  ec_status (*stream_threads)(ec_stream, int32_t* out);
  ec_op_fn op[EC_OP_COUNT];
  ec_status (*run)(ec_stream, const ec_step*, const ec_call*, int32_t n, int32_t* failed);
  ec_status (*workspace_size)(const ec_step*, const ec_call*, int32_t n, size_t* bytes);
  ec_status (*weight_bytes)(int32_t type, int32_t n, int32_t k, uint64_t* bytes);
  ec_status (*pack)(ec_stream, const ec_pack*);
  ec_status (*unpack)(const ec_weight* w, int32_t expert, float* dst);  // dst [n][k]
} ec_api;

// isa NULL or "": the fastest this machine runs. Else "portable", "avx2", "avx512vnni", "amx",
// "neon", "i8mm". NULL when the machine or this build lacks it.
const ec_api* ec_cpu(const char* isa);
// Space-separated names that ec_cpu() accepts here, slowest first.
const char* ec_cpu_isas(void);
// The CUDA table, in a library of its own: streams are CUstreams, pointers are device addresses.
// NULL when there is no device, or none that this build has kernels for.
const ec_api* ec_cuda(void);
// Why ec_cuda() is NULL, with the versions of CUDA that driver and build have.
const char* ec_cuda_problem(void);

#ifdef __cplusplus
}
#endif
#endif
