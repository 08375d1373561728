// SPDX-License-Identifier: Apache-2.0
//
// The one file that knows whether a kernel is compiled by nvcc for a GPU or by the C++ compiler for
// the emulator: launches, the few instructions without a spelling in C++, dynamic shared memory.
#ifndef EC_CUDA_PLATFORM_H
#define EC_CUDA_PLATFORM_H

#include "checks.h"

#ifdef EC_EMULATED
#include "emulator/emulator.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#include <unordered_set>
#endif

namespace ec::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAll = ~0u;
constexpr int kLine = 128;  // bytes of a line of the L2

struct Limits {
  int multiprocessors;
  int shared;  // bytes that a CTA may have
  int l2;      // bytes
};

// Copies of 16 bytes from global to shared memory that waitAsync() completes: copyAsync() starts
// one, commitAsync() closes a group, waitAsync<n>() waits for all groups of this thread but its
// last n.
//
// A launch that may begin early (EC_OVERLAP) begins when every CTA of the one before it has called
// startDependents() or has ended, and waits in awaitEarlier() until all of that one has ended and
// can be seen. So
//   - before awaitEarlier() a kernel neither reads what a launch of its step has written nor writes
//     what one may still read. Free to read are weights, the step's arrays, and the pools of states
//     and pages as the steps before have left them; free to write is shared memory;
//   - every CTA comes through awaitEarlier(): the launch after next may have begun, too, and relies
//     on this one not ending before the one it waited for. That makes the order transitive;
//   - a launch that is no such one waits for everything before it, as always.
// Without EC_OVERLAP, and before sm_90, both calls do nothing.

#ifdef EC_EMULATED

template <class T>
T* dynamicShared() {
  return reinterpret_cast<T*>(emulator::sharedMemory());
}

inline uint4 loadStreaming(const void* at) { return *static_cast<const uint4*>(at); }

inline void prefetchL2(const void* at) { emulator::prefetch(at); }

inline void copyAsync(uint4* to, const uint4* from) { emulator::copyAsync(to, from); }
inline void commitAsync() { emulator::commitAsync(); }
template <int kPending>
void waitAsync() {
  emulator::waitAsync(kPending);
}

inline void startDependents() {}
inline void awaitEarlier() { emulator::awaitEarlier(); }
using emulator::Together;

// 2^exponent
inline double power(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The exponent of a value, of a subnormal that of the least normal number, `least`.
inline int exponentOf(double value, int least) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const int exponent = static_cast<int>(bits >> 52 & 2047) - 1023;
  return exponent > least ? exponent : least;
}

// c + sum of x[i] y[i] as tensor cores add: all terms are shifted to the largest exponent, which of
// a product is the sum of its factors', and cut off 24 bits below it; the sum is cut off where a
// float ends. sm_80 to sm_89 do so with kCount = 8 halves or 4 tf32 at a time, later ones with more
// and 25 bits (Li et al., "MMA-Sim", arXiv 2511.10909); this is the coarser of the two.
template <int kCount>
__attribute__((no_sanitize("undefined"))) inline float addAtOnce(const double* x, const double* y,
                                                                 int least, float c) {
  constexpr int kKept = 24;
  double term[kCount + 1] = {c}, exact = c;
  int top = exponentOf(c, -126);
  for (int i = 0; i < kCount; ++i) {
    exact += term[i + 1] = x[i] * y[i];
    if (term[i + 1] != 0) top = std::max(top, exponentOf(x[i], least) + exponentOf(y[i], least));
  }
  if (!std::isfinite(exact)) return static_cast<float>(exact);
  double sum = 0;
  for (const double each : term) sum += std::trunc(each * power(kKept - top));
  sum *= power(top - kKept);
  const float nearest = static_cast<float>(sum);
  return std::fabs(nearest) > std::fabs(sum) && !std::isinf(nearest) ? std::nextafter(nearest, 0.f)
                                                                     : nearest;
}

// c += a b: a [16][16] and b [16][8] of halves, c [16][8] of floats, spread over the warp's lanes
// as the PTX manual says for mma.m16n8k16. With g = lane / 4 and t = lane % 4, a0 holds row g,
// columns 2t and 2t + 1; a1 row g + 8; a2 and a3 the same rows, columns 2t + 8 and 2t + 9; b0 holds
// column g, rows 2t and 2t + 1, b1 rows 2t + 8 and 2t + 9; c0, c1 row g, columns 2t and 2t + 1; c2,
// c3 row g + 8.
inline void mma16816(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
  const int lane = emulator::thread().lane, g = lane / 4, t = lane % 4;
  uint32_t(*slots)[8] = emulator::warpSlots();
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(slots[lane], mine, sizeof mine);
  emulator::warpBarrier(kAll);
  const auto element = [&](int owner, int slot, int k) {
    return __half2float(
        __ushort_as_half(static_cast<uint16_t>(slots[owner][slot] >> 16 * (k & 1))));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i / 2) * 8, column = 2 * t + i % 2;
    for (int high = 0; high < 2; ++high) {
      double x[8], y[8];
      for (int k = 0; k < 8; ++k) {
        x[k] = element(row % 8 * 4 + k / 2, 2 * high + row / 8, k);
        y[k] = element(column * 4 + k / 2, 4 + high, k);
      }
      c[i] = addAtOnce<8>(x, y, -14, c[i]);
    }
  }
  emulator::warpBarrier(kAll);
}

// c += a b: a [16][8] and b [8][8] of tf32, floats of which the last 13 bits are not looked at.
// With g and t as above, a0 holds row g, column t, a1 row g + 8, a2 and a3 the same rows, column t
// + 4; b0 holds column g, row t, b1 row t + 4; c as above.
inline void mmaTf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int lane = emulator::thread().lane, g = lane / 4, t = lane % 4;
  uint32_t(*slots)[8] = emulator::warpSlots();
  std::memcpy(slots[lane], a, sizeof a);
  std::memcpy(slots[lane] + 4, b, sizeof b);
  emulator::warpBarrier(kAll);
  const auto element = [&](int owner, int slot) {
    return double{__uint_as_float(slots[owner][slot] & 0xffffe000u)};
  };
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    for (int high = 0; high < 2; ++high) {
      double x[4], y[4];
      for (int k = 0; k < 4; ++k) {
        x[k] = element(g * 4 + k, i / 2 + high * 2);
        y[k] = element(column * 4 + k, 4 + high);
      }
      c[i] = addAtOnce<4>(x, y, -126, c[i]);
    }
  }
  emulator::warpBarrier(kAll);
}

// Four matrices of 8 x 8 halves: lanes 8 i to 8 i + 7 point to the rows of matrix i in shared
// memory. r[i] holds its row lane / 4, columns 2 (lane % 4) and the next; transposed, its column
// lane / 4 and those rows.
template <bool kTransposed>
inline void loadMatrices(uint32_t (&r)[4], const uint4* row) {
  const int lane = emulator::thread().lane, g = lane / 4, t = lane % 4;
  uint32_t(*slots)[8] = emulator::warpSlots();
  std::memcpy(slots[lane], &row, sizeof row);
  emulator::warpBarrier(kAll);
  for (int i = 0; i < 4; ++i) {
    uint16_t halves[2];
    for (int e = 0; e < 2; ++e) {
      const uint4* from;
      std::memcpy(&from, slots[8 * i + (kTransposed ? 2 * t + e : g)], sizeof from);
      const uint4 eight = *from;  // aligned to 16 bytes
      std::memcpy(halves + e,
                  reinterpret_cast<const char*>(&eight) + 2 * (kTransposed ? g : 2 * t + e), 2);
    }
    std::memcpy(&r[i], halves, sizeof halves);
  }
  emulator::warpBarrier(kAll);
}

// d = start + a b
inline void mma16816(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1, const float4& start) {
  d[0] = start.x, d[1] = start.y, d[2] = start.z, d[3] = start.w;
  mma16816(d, a0, a1, a2, a3, b0, b1);
}

// Small, so that few columns are a CTA's fair share and many rows take several rounds.
inline Limits limits() { return {2, 24 << 10, 16 << 10}; }
template <class... Parameters>
int residentBlocks(void (*)(Parameters...), int, size_t) {
  return limits().multiprocessors;
}

template <class... Parameters, class... Arguments>
ec_status start(const char*, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                ec_stream stream, bool early, const Arguments&... arguments) {
  emulator::launch(
      grid, dim3(threads), shared, stream, early,
      [kernel, values = std::make_tuple(Parameters(arguments)...)] { std::apply(kernel, values); });
  return EC_OK;
}

#else

template <class T>
__device__ __forceinline__ T* dynamicShared() {
  extern __shared__ __align__(16) unsigned char ecShared[];
  return reinterpret_cast<T*>(ecShared);
}

// Weights are read once a step: past L1, and kept out of it.
__device__ __forceinline__ uint4 loadStreaming(const void* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

__device__ __forceinline__ void prefetchL2(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

__device__ __forceinline__ void copyAsync(uint4* to, const uint4* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
__device__ __forceinline__ void commitAsync() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void waitAsync() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void startDependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void awaitEarlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void mma16816(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// d = start + a b
__device__ __forceinline__ void mma16816(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1,
                                         const float4& start) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(start.x), "f"(start.y),
        "f"(start.z), "f"(start.w));
}

// Around a call of the library, whose launches may overlap: for the emulator.
struct Together {
  Together() {}  // not trivial: it is there without being used
};

// A CTA's memory that CUDA keeps for itself. For sm_90 and later the compiler counts it among a
// kernel's static bytes, so the driver may allow that much less: nothing plans with the last of it.
constexpr int kReserved = 1 << 10;

// Of the current device, asked once.
inline const Limits& limits() {
  static const Limits found = [] {
    int device = 0;
    Limits here = {1, 48 << 10, 0};
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&here.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&here.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&here.l2, cudaDevAttrL2CacheSize, device);
    here.shared -= kReserved;
    return here;
  }();
  return found;
}
inline bool beginsEarly() {
  static const bool able = [] {
    int device = 0, major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major >= 9;
  }();
  return able;
}

// Loads a kernel and allows it all the shared memory of a CTA. Once, and not what a launch takes: a
// captured launch must find no less when it is replayed, whatever others of the kernel took since.
inline cudaError_t allowShared(const void* kernel) {
  static std::mutex mutex;
  static std::unordered_set<const void*> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count(kernel)) return cudaSuccess;
  cudaFuncAttributes its;
  cudaError_t error = cudaFuncGetAttributes(&its, kernel);
  if (error == cudaSuccess) {
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             limits().shared + kReserved - static_cast<int>(its.sharedSizeBytes));
  }
  if (error == cudaSuccess) allowed.insert(kernel);
  return error;
}

// CTAs of a kernel that the whole device runs at once.
template <class... Parameters>
int residentBlocks(void (*kernel)(Parameters...), int threads, size_t shared) {
  int each = 0;
  allowShared(reinterpret_cast<const void*>(kernel));
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared);
  return (each > 0 ? each : 1) * limits().multiprocessors;
}

__device__ __forceinline__ void mmaTf32(float (&c)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <bool kTransposed>
__device__ __forceinline__ void loadMatrices(uint32_t (&r)[4], const uint4* row) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  }
}

template <class... Parameters, class... Arguments>
ec_status start(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads,
                size_t shared, ec_stream stream, bool early, const Arguments&... arguments) {
  cudaError_t error = allowShared(reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess && early) {
    // CTAs of two kernels share a multiprocessor only if it splits its memory alike for both.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = early && beginsEarly() ? 1 : 0;
    const auto begin = [&](Parameters... values) {
      void* addresses[] = {&values...};
      return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), addresses);
    };
    error = begin(arguments...);
  }
  if (error == cudaSuccess) return EC_OK;
  return fail(EC_DEVICE, "%s: %s", op, cudaGetErrorString(error));
}

#endif

template <class... Parameters, class... Arguments>
ec_status launch(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads,
                 size_t shared, ec_stream stream, const Arguments&... arguments) {
  return start(op, kernel, grid, threads, shared, stream, false, arguments...);
}
// A kernel that keeps the rules of awaitEarlier().
template <class... Parameters, class... Arguments>
ec_status launchEarly(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads,
                      size_t shared, ec_stream stream, const ec_step& step,
                      const Arguments&... arguments) {
  return start(op, kernel, grid, threads, shared, stream, step.flags & EC_OVERLAP, arguments...);
}

template <class T>
__host__ __device__ constexpr T ceilDiv(T value, T by) {
  return (value + by - 1) / by;
}

// What the sequences of a step that count own: the others' rows are left as they are.
__device__ __forceinline__ int liveSequences(const ec_step& step) {
  return step.live ? *step.live : step.n_seq;
}
__device__ __forceinline__ int liveRows(const ec_step& step) {
  return step.live ? step.start[*step.live] : step.n_tok;
}

// The sequence that owns a row, by its start; n_seq is small.
__device__ __forceinline__ int sequenceOf(const ec_step& step, int row) {
  int sequence = 0;
  while (step.start[sequence + 1] <= row) ++sequence;
  return sequence;
}

// The same number in all lanes, which the compiler knows in this form.
__device__ __forceinline__ int warpIndex() {
  return __shfl_sync(kAll, static_cast<int>(threadIdx.x) / kWarp, 0);
}

template <class T>
__device__ __forceinline__ T warpSum(T value) {
  for (int bits = 16; bits > 0; bits >>= 1) value += __shfl_xor_sync(kAll, value, bits);
  return value;
}
__device__ __forceinline__ float warpMax(float value) {
  for (int bits = 16; bits > 0; bits >>= 1)
    value = fmaxf(value, __shfl_xor_sync(kAll, value, bits));
  return value;
}

__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }
__device__ __forceinline__ float relu2(float x) {
  const float positive = fmaxf(x, 0.f);
  return positive * positive;
}
__device__ __forceinline__ float activate(int act, float x) {
  return act == EC_RELU2 ? relu2(x) : x;
}

}  // namespace ec::cuda

#endif  // EC_CUDA_PLATFORM_H
