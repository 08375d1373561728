// SPDX-License-Identifier: Apache-2.0
//
// ec_cuda() without a GPU: the CPU's kernels as work of a CUDA stream (tests/trt/fakecuda.c). As a
// kernel launch does, an op takes its structs by value and its pointers as they are.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edgecascade.h"

int cuLaunchHostFunc(void* stream, void (*call)(void*), void* data);
int cuStreamIsCapturing(void* stream, int* out);

typedef union {
  ec_embed embed;
  ec_linear linear;
  ec_mamba mamba;
  ec_attention attention;
  ec_moe moe;
  ec_head head;
  ec_sample sample;
} Args;

typedef struct {
  int op;
  ec_status status;
  int inGraph;
  ec_step step;
  Args args;
} Launch;

static const ec_api* cpu;
static ec_stream pool;

static const size_t kArgBytes[EC_OP_COUNT] = {
    sizeof(ec_embed),     sizeof(ec_linear),    sizeof(ec_mamba), sizeof(ec_mamba),
    sizeof(ec_attention), sizeof(ec_attention), sizeof(ec_moe),   sizeof(ec_head),
    sizeof(ec_sample),
};

static void run(void* data) {
  Launch* launch = data;
  launch->status = cpu->op[launch->op](pool, &launch->step, &launch->args);
  if (launch->inGraph && launch->status != EC_OK) {
    fprintf(stderr, "[fakecuda] a kernel in a graph failed: %s\n", cpu->last_error());
    abort();
  }
}

static ec_status enqueue(int op, ec_stream stream, const ec_step* step, const void* args) {
  Launch* launch = calloc(1, sizeof *launch);
  launch->op = op;
  launch->step = *step;
  memcpy(&launch->args, args, kArgBytes[op]);
  if (cuStreamIsCapturing(stream, &launch->inGraph)) return EC_DEVICE;
  if (cuLaunchHostFunc(stream, run, launch)) return EC_DEVICE;
  if (launch->inGraph) return EC_OK;  // the graph owns it
  const ec_status status = launch->status;
  free(launch);
  return status;
}

#define OP(code)                                                                 \
  static ec_status op##code(ec_stream stream, const ec_step* s, const void* a) { \
    return enqueue(code, stream, s, a);                                          \
  }
OP(0)
OP(1)
OP(2)
OP(3)
OP(4)
OP(5)
OP(6)
OP(7)
OP(8)

const ec_api* ec_cuda(void) {
  static ec_api table;
  if (table.backend) return &table;
  const char* threads = getenv("FAKECUDA_THREADS");
  void* library = dlopen(getenv("EDGECASCADE_LIBRARY"), RTLD_NOW);
  const ec_api* (*find)(const char*) = library ? dlsym(library, "ec_cpu") : NULL;
  cpu = find ? find("") : NULL;
  if (!cpu || cpu->stream_create(threads ? atoi(threads) : 1, &pool) != EC_OK) return NULL;
  table = *cpu;
  table.backend = "cuda";
  const ec_op_fn ops[] = {op0, op1, op2, op3, op4, op5, op6, op7, op8};
  memcpy(table.op, ops, sizeof ops);
  return &table;
}
