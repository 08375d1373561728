// SPDX-License-Identifier: Apache-2.0
//
// The CUDA table. Streams are CUDA streams; all pointers but those to the structs themselves are
// device memory.
#include <cstdio>
#include <string>

#include "ahead.cuh"
#include "blocks.cuh"
#include "kernels.h"

namespace ec::cuda {
namespace {

template <class Args, ec_status (*kRun)(ec_stream, const ec_step&, const Args&)>
ec_status run1(ec_stream stream, const ec_step* step, const void* args) noexcept {
  EC_TRY(checkPointer("op", "step", step));
  EC_TRY(checkPointer("op", "args", args));
  const Together together;
  return kRun(stream, *step, *static_cast<const Args*>(args));
}

template <class Args, ec_status (*kMeasure)(const ec_step&, const Args&, size_t*)>
ec_status measure1(const ec_step& step, const void* args, size_t* bytes) {
  return kMeasure(step, *static_cast<const Args*>(args), bytes);
}

using Measure = ec_status (*)(const ec_step&, const void*, size_t*);

// In the order of ec_op.
const ec_op_fn kOps[EC_OP_COUNT] = {
    run1<ec_embed, embed>,
    run1<ec_linear, linear>,
    run1<ec_mamba, mambaStep>,
    run1<ec_mamba, mambaPrefill>,
    run1<ec_attention, attentionDecode>,
    run1<ec_attention, attentionPrefill>,
    run1<ec_moe, moe>,
    run1<ec_head, head>,
    run1<ec_sample, sample>,
};
const Measure kMeasures[EC_OP_COUNT] = {
    measure1<ec_embed, embedWorkspace>,
    measure1<ec_linear, linearWorkspace>,
    measure1<ec_mamba, mambaStepWorkspace>,
    measure1<ec_mamba, mambaPrefillWorkspace>,
    measure1<ec_attention, attentionDecodeWorkspace>,
    measure1<ec_attention, attentionPrefillWorkspace>,
    measure1<ec_moe, moeWorkspace>,
    measure1<ec_head, headWorkspace>,
    measure1<ec_sample, sampleWorkspace>,
};

ec_status checkCall(const char* what, const ec_call& call, int32_t i) {
  if (call.op < 0 || call.op >= EC_OP_COUNT) {
    return fail(EC_INVALID, "%s: calls[%d].op is %d, outside 0..%d", what, i, call.op,
                EC_OP_COUNT - 1);
  }
  return checkPointer(what, "call.args", call.args);
}

ec_status run(ec_stream stream, const ec_step* step, const ec_call* calls, int32_t n,
              int32_t* failed) noexcept {
  EC_TRY(checkPointer("run", "calls", calls));
  const Together together;
  for (int32_t i = 0; i < n; ++i) {
    ec_status status = checkCall("run", calls[i], i);
    const Following next(i + 1 < n ? calls + i + 1 : nullptr);
    if (status == EC_OK) status = kOps[calls[i].op](stream, step, calls[i].args);
    if (status == EC_OK) continue;
    if (failed) *failed = i;
    return status;
  }
  return EC_OK;
}

ec_status workspaceSize(const ec_step* step, const ec_call* calls, int32_t n,
                        size_t* bytes) noexcept {
  EC_TRY(checkPointer("workspace_size", "step", step));
  EC_TRY(checkPointer("workspace_size", "calls", calls));
  EC_TRY(checkPointer("workspace_size", "bytes", bytes));
  size_t largest = 0;
  for (int32_t i = 0; i < n; ++i) {
    EC_TRY(checkCall("workspace_size", calls[i], i));
    size_t needed = 0;
    EC_TRY(kMeasures[calls[i].op](*step, calls[i].args, &needed));
    if (needed > largest) largest = needed;
  }
  *bytes = largest;
  return EC_OK;
}

ec_status weightBytesOf(int32_t type, int32_t n, int32_t k, uint64_t* bytes) noexcept {
  EC_TRY(checkPointer("weight_bytes", "bytes", bytes));
  *bytes = weightBytes(type, n, k);
  if (*bytes) return EC_OK;
  return fail(EC_INVALID,
              "weight_bytes: type %d of [%d][%d]; use a type of ec_type and positive sizes", type,
              n, k);
}

ec_status pack(ec_stream, const ec_pack*) noexcept {
  return fail(EC_UNSUPPORTED, "pack: bundles are made on the host; use ec_cpu()");
}

ec_status unpack(const ec_weight*, int32_t, float*) noexcept {
  return fail(EC_UNSUPPORTED,
              "unpack: weights are in device memory; use ec_cpu() on the mapped bundle");
}

ec_status streamThreads(ec_stream, int32_t* out) noexcept {
  EC_TRY(checkPointer("stream_threads", "out", out));
  *out = 1;
  return EC_OK;
}

#ifdef EC_EMULATED

ec_status query(ec_device* out) noexcept {
  EC_TRY(checkPointer("query", "out", out));
  *out = {};
  std::snprintf(out->name, sizeof out->name, "emulator");
  std::snprintf(out->isa, sizeof out->isa, "cuda-emulated");
  out->threads = 1;
  return EC_OK;
}

ec_status streamCreate(int32_t, ec_stream* out) noexcept {
  EC_TRY(checkPointer("stream_create", "out", out));
  *out = reinterpret_cast<ec_stream>(emulator::ownStream());
  return EC_OK;
}

void streamDestroy(ec_stream) noexcept {}

bool usable(std::string*) { return true; }
constexpr const char* kIsa = "cuda-emulated";

#else

__global__ void nothing() {}

ec_status check(const char* what, cudaError_t error) {
  return error == cudaSuccess ? EC_OK : fail(EC_DEVICE, "%s: %s", what, cudaGetErrorString(error));
}

ec_status query(ec_device* out) noexcept {
  EC_TRY(checkPointer("query", "out", out));
  *out = {};
  int device = 0;
  cudaDeviceProp properties;
  EC_TRY(check("query", cudaGetDevice(&device)));
  EC_TRY(check("query", cudaGetDeviceProperties(&properties, device)));
  std::snprintf(out->name, sizeof out->name, "%s", properties.name);
  out->sm = properties.major * 10 + properties.minor;
  std::snprintf(out->isa, sizeof out->isa, "sm_%d", out->sm);
  out->threads = 1;
  out->sm_count = properties.multiProcessorCount;
  out->l2_bytes = properties.l2CacheSize;
  out->memory_bytes = properties.totalGlobalMem;
  return EC_OK;
}

ec_status streamCreate(int32_t, ec_stream* out) noexcept {
  EC_TRY(checkPointer("stream_create", "out", out));
  cudaStream_t stream = nullptr;
  EC_TRY(check("stream_create", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)));
  *out = reinterpret_cast<ec_stream>(stream);
  return EC_OK;
}

void streamDestroy(ec_stream stream) noexcept {
  cudaStreamDestroy(reinterpret_cast<cudaStream_t>(stream));
}

// A device is there, and this library carries code that it runs. `problem`: why not.
bool usable(std::string* problem) {
  int devices = 0, driver = 0, runtime = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices == 0) error = cudaErrorNoDevice;
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, nothing);
  if (error == cudaSuccess) return true;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  cudaGetLastError();  // what was asked must not look like a failed launch
  const auto version = [](int of) {
    return std::to_string(of / 1000) + "." + std::to_string(of % 1000 / 10);
  };
  *problem = std::string(cudaGetErrorString(error)) + " (built with CUDA " + version(runtime) +
             (driver ? ", the driver is of CUDA " + version(driver) : ", without a driver") + ")";
  return false;
}
constexpr const char* kIsa = "cuda";

#endif

// The table, or why there is none.
struct Found {
  const ec_api* table = nullptr;
  std::string problem;
};

const Found& found() {
  static const Found made = [] {
    Found it;
    if (!usable(&it.problem)) return it;
    static ec_api api = {EC_ABI_VERSION, 0,     "cuda",       kIsa,
                         ec::lastError,  query, streamCreate, streamDestroy,
                         streamThreads,  {},    run,          workspaceSize,
                         weightBytesOf,  pack,  unpack};
    for (int i = 0; i < EC_OP_COUNT; ++i) api.op[i] = kOps[i];
    it.table = &api;
    return it;
  }();
  return made;
}

}  // namespace
}  // namespace ec::cuda

#define EC_EXPORT extern "C" __attribute__((visibility("default")))
EC_EXPORT const ec_api* ec_cuda(void) { return ec::cuda::found().table; }
EC_EXPORT const char* ec_cuda_problem(void) { return ec::cuda::found().problem.c_str(); }
