// SPDX-License-Identifier: Apache-2.0
//
// What every CPU op shares: failures with a sentence, scratch memory, the rows that count, half
// floats.
//
// Code that is compiled once per ISA lives in namespace ec::EC_ISA; the macro comes from
// CMakeLists.txt. Inline functions must live there too: an inline function of plain namespace ec
// would be compiled once per ISA under one name, and the linker could keep the AVX-512 copy for a
// machine without it.
#ifndef EC_CPU_COMMON_H
#define EC_CPU_COMMON_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "edgecascade.h"

#ifndef EC_ISA
#define EC_ISA baseline
#endif
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace ec {

constexpr int kBlockRows = 32;
constexpr int kGroup = 64;           // columns that share a scale
constexpr int kU4BlockBytes = 1088;  // 1024 bytes of codes, 32 fp16 scales
constexpr int kI8BlockBytes = 2112;  // 2048 bytes of codes, 32 fp16 scales

// Stores the sentence that last_error() returns on this thread; returns `status`.
ec_status fail(ec_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));
const char* lastError();

// Sequences and rows of the step that count. Call them after checkStep().
int32_t liveSeqs(const ec_step& step);
int32_t liveTokens(const ec_step& step);

// The step's counts are positive, and its live rows lie inside it.
ec_status checkStep(const char* op, const ec_step& step);
// Scalars only, so that it may run before any pointer is known.
ec_status checkStepShape(const char* op, const ec_step& step);
ec_status checkPointer(const char* op, const char* field, const void* pointer);
ec_status checkPositive(const char* op, const char* field, int64_t value);
ec_status checkNorm(const char* op, const ec_norm& norm, int32_t k);
// Shape and type of a matrix (or of `experts` of them).
ec_status checkWeight(const char* op, const char* field, const ec_weight& w);
uint64_t weightBytes(int32_t type, int32_t n, int32_t k);  // 0: unknown type or bad shape

#define EC_TRY(expression)                        \
  do {                                            \
    ec_status ecTryStatus = (expression);         \
    if (ecTryStatus != EC_OK) return ecTryStatus; \
  } while (0)

// Hands out 64-byte aligned pieces of the step's workspace. Without a step it only measures, so
// that one layout function serves both the op and its workspace size:
//
//   struct Scratch { float* h; explicit Scratch(Arena& arena, ...) : h(arena.take<float>(n)) {} };
//   Arena arena(step); Scratch scratch(arena, ...); EC_TRY(arena.status("linear"));
class Arena {
 public:
  Arena();
  explicit Arena(const ec_step& step);
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(takeBytes(count, sizeof(T)));
  }
  size_t bytes() const;                    // taken so far, with room to align the base
  ec_status status(const char* op) const;  // EC_WORKSPACE when the workspace was too small

 private:
  void* takeBytes(int64_t count, size_t size);
  std::byte* base_;
  size_t capacity_;
  size_t used_;
};

namespace EC_ISA {

template <class T>
constexpr T roundUp(T value, T multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

#if defined(__F16C__)
inline float h2f(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t f2h(float f) { return _cvtss_sh(f, 0); }
#elif defined(__aarch64__)
inline float h2f(uint16_t h) {
  __fp16 value;
  std::memcpy(&value, &h, 2);
  return value;
}
inline uint16_t f2h(float f) {
  __fp16 value = static_cast<__fp16>(f);
  uint16_t h;
  std::memcpy(&h, &value, 2);
  return h;
}
#else
inline float h2f(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  uint32_t bits;
  if (rest >= 0x7c00u) {
    bits = 0x7f800000u | (rest & 0x3ffu) << 13;
    if (rest > 0x7c00u) bits |= 0x400000u;
  } else {
    // 2^112 moves the exponent from bias 15 to bias 127 and makes subnormals normal.
    const uint32_t shifted = rest << 13;
    float value;
    std::memcpy(&value, &shifted, 4);
    value *= 5.192296858534828e33f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
// Rounds to nearest, ties to even.
inline uint16_t f2h(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (bits >> 13 & 0x3ffu));
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {
    // Adding 0.5 leaves the value in units of 2^-24, rounded by the hardware.
    float value;
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + (bits >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}
#endif

}  // namespace EC_ISA
}  // namespace ec

#endif  // EC_CPU_COMMON_H
