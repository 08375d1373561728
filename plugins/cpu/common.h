// SPDX-License-Identifier: Apache-2.0
//
// What every CPU op shares beside the checks of all backends: the rows that count, half floats.
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

#include "checks.h"

#ifndef EC_ISA
#define EC_ISA baseline
#endif
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace ec {

// Sequences and rows of the step that count. Call them after checkStep().
int32_t liveSeqs(const ec_step& step);
int32_t liveTokens(const ec_step& step);

// The step's counts are positive, and its live rows lie inside it.
ec_status checkStep(const char* op, const ec_step& step);

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
    // From bias 15 to bias 127. A subnormal is what it adds to 2^-14: read as a float of its own it
    // would be one, too, and those may be flushed (flush.h).
    bits = (rest << 13) + 0x38000000u;
    if (rest < 0x400u) {
      bits += 0x800000u;
      float value;
      std::memcpy(&value, &bits, 4);
      value -= 6.103515625e-05f;
      std::memcpy(&bits, &value, 4);
    }
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
