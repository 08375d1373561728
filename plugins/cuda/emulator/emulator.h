// SPDX-License-Identifier: Apache-2.0
//
// Runs CUDA kernels on the CPU, one thread of a block a fiber: what nvcc compiles for a GPU, the
// C++ compiler compiles against this header, so that the suite of the ops tests every index,
// barrier and fragment of the kernels where no GPU is.
//
// Between two barriers the threads of a block run in a random order, and so do the blocks: what
// works only in one order fails. Shared memory, dynamic and static, is all ones when a block
// begins: NaN, and no index. An asynchronous copy leaves NaN where it goes until its thread waits
// for it, and has read its source at the time it was started or at the time it is waited for. A
// launch that may begin early has one of its blocks run up to awaitEarlier() before the launch
// before it does anything, and often before the one before that.
//
// A sentence, and the process's end, are for a barrier that some threads never reach, a warp
// operation that a lane of its mask misses, a thread that should come through awaitEarlier() and
// does not, a grid that no GPU takes; for two accesses of memory that nothing orders, where
// the kernels are watched (races.cpp); for a load, a store or a copy that is not aligned to its
// type, an index outside of its array, an int that overflows, a shift by too much, a float that its
// integer cannot hold, a bool that nobody has written (undefined.cpp); and for an access beyond
// dynamic shared memory or an array of ec_emulated_alloc(), which end, or in one of four turns
// start, at a closed page (bounds.h). What it cannot show: speed, an access from one static array,
// or one piece of an op's scratch memory, to the next.
#ifndef EC_CUDA_EMULATOR_H
#define EC_CUDA_EMULATOR_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <tuple>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// In functions that are no templates: of those, GCC does not heed the section.
#define __shared__ static __attribute__((section("ec_shared")))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace ec::emulator {

struct Thread {
  dim3 index;
  int lane, warp;
};
// By value: what a kernel reads by itself is looked at by the detector of races.
Thread thread();
dim3 block();    // blockIdx
dim3 blocks();   // gridDim
dim3 threads();  // blockDim

// One sentence for stderr, with the block; die() ends the process.
void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

// On a stream of a stand-in for the driver, as that does with what is put on its streams: at once,
// or when a captured graph is launched. On ownStream() when the call of the library ends.
void launch(dim3 grid, dim3 size, size_t sharedBytes, void* stream, bool early,
            std::function<void()> body);
void* ownStream();
// Lives as long as a call of the library, whose launches may overlap. May be nested.
struct Together {
  Together();
  ~Together();
};
void awaitEarlier();
void copyAsync(void* to, const void* from);  // 16 bytes
void commitAsync();
void waitAsync(int pending);
void prefetch(const void* at);
unsigned char* sharedMemory();
void blockBarrier();
// Only __syncwarp() orders accesses of memory: an exchange between lanes does not.
void warpBarrier(unsigned mask, bool orders = false);
// What each lane of the warp puts there for the others to read between two barriers.
uint32_t (*warpSlots())[8];

template <class T>
T exchange(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 32);
  std::memcpy(warpSlots()[thread().lane], &value, sizeof value);
  warpBarrier(mask);
  T got;
  std::memcpy(&got, warpSlots()[from & 31], sizeof got);
  warpBarrier(mask);
  return got;
}

}  // namespace ec::emulator

#define threadIdx (ec::emulator::thread().index)
#define blockIdx (ec::emulator::block())
#define gridDim (ec::emulator::blocks())
#define blockDim (ec::emulator::threads())

inline void __syncthreads() { ec::emulator::blockBarrier(); }
inline void __syncwarp(unsigned mask = ~0u) { ec::emulator::warpBarrier(mask, true); }
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return ec::emulator::exchange(mask, value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return ec::emulator::exchange(mask, value, ec::emulator::thread().lane ^ bits);
}
template <class Join>
unsigned reduceWarp(unsigned mask, unsigned value, const Join& join) {
  ec::emulator::warpSlots()[ec::emulator::thread().lane][0] = value;
  ec::emulator::warpBarrier(mask);
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) value = join(value, ec::emulator::warpSlots()[lane][0]);
  }
  ec::emulator::warpBarrier(mask);
  return value;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return reduceWarp(mask, value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return reduceWarp(mask, value, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline unsigned __ballot_sync(unsigned mask, bool set) {
  std::memset(ec::emulator::warpSlots()[ec::emulator::thread().lane], 0, 32);
  ec::emulator::warpSlots()[ec::emulator::thread().lane][0] = set;
  ec::emulator::warpBarrier(mask);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) bits |= (ec::emulator::warpSlots()[lane][0] & 1u) << lane;
  }
  ec::emulator::warpBarrier(mask);
  return bits;
}
inline unsigned __match_any_sync(unsigned mask, int value) {
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) bits |= (ec::emulator::exchange(mask, value, lane) == value) << lane;
  }
  return bits;
}
template <class T>
T atomicAdd(T* at, T value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

template <class T>
T __ldg(const T* at) {
  return *at;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline long long __mul64hi(long long a, long long b) {
  return static_cast<long long>(static_cast<__int128>(a) * b >> 64);
}
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned select) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> 8 * (select >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
using std::max;
using std::min;
inline float __fmul_rn(float x, float y) { return x * y; }  // nothing is fused here

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
float __half2float(__half h);
__half __float2half_rn(float f);
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline __half2 __half2half2(__half h) { return {h, h}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __hsub2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) - __half2float(b.x),
                           __half2float(a.y) - __half2float(b.y));
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) * __half2float(b.x),
                           __half2float(a.y) * __half2float(b.y));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const auto fma = [](__half p, __half q, __half r) {  // float holds every product of two halves
    return static_cast<float>(double{__half2float(p)} * __half2float(q) + __half2float(r));
  };
  return __floats2half2_rn(fma(a.x, b.x, c.x), fma(a.y, b.y, c.y));
}

#endif  // EC_CUDA_EMULATOR_H
