// SPDX-License-Identifier: Apache-2.0
//
// Rows of activations in the two forms that weights multiply: float32 for EC_F32 and EC_F16, int8
// for blocks.
//
//   int8 form, per group of 64 columns:  scale = max|x| / 127,  q = round(x / scale),  correction =
//   -8 sum(q)
//
// The correction turns sum(code q) into sum((code - 8) q). All of it is plain float32 arithmetic in
// a fixed order, so that every ISA gets the same bits. A NaN or infinity in a group makes its scale
// NaN or infinite, and with it every result that depends on the group: bad values stay visible.
#ifndef EC_CPU_ACTS_H
#define EC_CPU_ACTS_H

#include <cmath>

#include "common.h"

namespace ec::EC_ISA {

struct Acts {
  const float* f = nullptr;  // [row][stride]
  int64_t stride = 0;
  const int8_t* q = nullptr;            // [row][groups * 64], zero beyond k
  const float* scale = nullptr;         // [row][groups]
  const int32_t* correction = nullptr;  // [row][groups]
  int64_t groups = 0;
};

inline bool isBlockType(int32_t type) { return type == EC_U4_64 || type == EC_I8_64; }

// Memory for the forms that are needed.
struct ActsBuffer {
  float* f = nullptr;
  int8_t* q = nullptr;
  float* scale = nullptr;
  int32_t* correction = nullptr;
  int64_t k;
  int64_t groups;

  ActsBuffer(Arena& arena, int64_t rows, int64_t columns, bool floats, bool blocks)
      : k(columns), groups((columns + kGroup - 1) / kGroup) {
    if (floats) f = arena.take<float>(rows * k);
    if (!blocks) return;
    q = arena.take<int8_t>(rows * groups * kGroup);
    scale = arena.take<float>(rows * groups);
    correction = arena.take<int32_t>(rows * groups);
  }
  Acts acts() const { return {f, k, q, scale, correction, groups}; }
};

// v[64] -> q[64]
inline void quantizeGroup(const float* v, int8_t* q, float* scale, int32_t* correction) {
  // Comparing bit patterns orders |x| with NaN above infinity.
  int32_t largest = 0;
  for (int i = 0; i < kGroup; ++i) {
    int32_t bits;
    std::memcpy(&bits, v + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float amax;
  std::memcpy(&amax, &largest, 4);
  // Below 1e-36 the reciprocal overflows, and the products with any fp16 scale are zero in float32
  // anyway.
  const bool tiny = amax < 1e-36f;
  const float inverse = tiny || !(amax <= 3.4028235e38f) ? 0.f : 127.f / amax;
  *scale = tiny ? 0.f : amax / 127.f;
  int32_t sum = 0;
  for (int i = 0; i < kGroup; ++i) {
    // Adding 1.5 * 2^23 leaves round-to-nearest-even of |x| <= 127 in the low mantissa bits, on any
    // ISA.
    const float shifted = v[i] * inverse + 12582912.f;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    const int8_t code = static_cast<int8_t>(bits);
    q[i] = code;
    sum += code;
  }
  *correction = -8 * sum;
}

// 1 / sqrt(mean(x^2) + eps). Sums in double in 8 fixed lanes: no overflow for any float, the same
// bits on every ISA.
inline float rmsInverse(const float* x, int64_t n, float eps) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j)
      lanes[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
  }
  for (int j = 0; i + j < n; ++j)
    lanes[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
  const double sum = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
                     ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  return static_cast<float>(1.0 /
                            std::sqrt(sum / static_cast<double>(n) + static_cast<double>(eps)));
}

// One row of norm(x), piece by piece in ascending order.
class NormedRow {
 public:
  NormedRow(const float* x, const ec_norm& norm, int64_t k)
      : x_(x), norm_(norm), size_(norm.gamma ? k / norm.groups : k) {}

  // out[0, count) = norm(x)[first, first + count)
  void read(int64_t first, int64_t count, float* out) {
    if (!norm_.gamma) {
      std::memcpy(out, x_ + first, static_cast<size_t>(count) * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < count;) {
      const int64_t at = first + i, group = at / size_;
      if (group != group_) {
        inverse_ = rmsInverse(x_ + group * size_, size_, norm_.eps);
        group_ = group;
      }
      const int64_t end = (group + 1) * size_ - first;
      const int64_t stop = end < count ? end : count;
      const float inverse = inverse_;
      const float *x = x_ + first, *gamma = norm_.gamma + first;
      for (; i < stop; ++i) out[i] = x[i] * inverse * gamma[i];
    }
  }

 private:
  const float* x_;
  const ec_norm& norm_;
  const int64_t size_;  // of a norm group
  int64_t group_ = -1;
  float inverse_ = 1.f;
};

// norm(x) of one row into row `row` of the buffer, in the forms the buffer has.
inline void prepareRow(const float* x, const ec_norm& norm, const ActsBuffer& buffer, int64_t row) {
  NormedRow source(x, norm, buffer.k);
  alignas(64) float piece[kGroup];
  for (int64_t g = 0; g < buffer.groups; ++g) {
    const int64_t first = g * kGroup, left = buffer.k - first;
    const int count = left < kGroup ? static_cast<int>(left) : kGroup;
    source.read(first, count, piece);
    for (int i = count; i < kGroup; ++i) piece[i] = 0.f;
    if (buffer.f)
      std::memcpy(buffer.f + row * buffer.k + first, piece,
                  static_cast<size_t>(count) * sizeof(float));
    if (buffer.q) {
      const int64_t at = row * buffer.groups + g;
      quantizeGroup(piece, buffer.q + at * kGroup, buffer.scale + at, buffer.correction + at);
    }
  }
}

}  // namespace ec::EC_ISA

#endif  // EC_CPU_ACTS_H
