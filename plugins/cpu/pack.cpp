// SPDX-License-Identifier: Apache-2.0
//
// Rows of floats to blocks of 32 rows x 64 columns. Every value is float32, every operation rounds
// once (no fused multiply-add), and rint rounds to nearest even, so that build_engine/quantize.py
// repeats it bit by bit.
//
//   U4_64, per row and group of 64 columns (columns beyond k count as 0):
//     m = the first w of the group whose |w| is largest
//     for each D of kDivisors, in order:
//       s = fp16(m / D),  inverse = s == 0 ? 0 : 1 / s
//       q[i] = min(max(rint(w[i] * inverse), -8), 7)
//       error = sum of (w[i] - q[i] * s)^2, i ascending, starting from 0
//     The smallest error wins, the first D among equals. Stored: code q + 8, scale s (+0 when s is
//     -0).
//   I8_64: s = fp16(max|w| / 127), inverse as above, q[i] = min(max(rint(w[i] * inverse), -127),
//   127).
//
// Rows beyond n have code 8 (0 in I8_64) and scale 0. |m| > 8 * 65504 or max|w| > 127 * 65504, and
// values that are not finite, are refused: no fp16 scale holds them. Bound: some 60 vector
// operations per 16 weights for the search. Reference: build_engine/quantize.py  Test:
// tests/test_linear_kernels.py
#include <algorithm>
#include <atomic>
#include <limits>

#include "acts.h"
#include "kernels.h"
#include "simd.h"

namespace ec::EC_ISA {

namespace {

// Negative: the largest value takes a code on the side that reaches -8. Beyond 8 it is clipped, for
// a finer step. The positive ones keep groups exact that were quantized before with codes up to 7.
// On Gaussian rows: 9.03 % error, and 9.00 % with all divisors from 5 to 10 in steps of 0.1.
constexpr float kDivisors[] = {-8.f,  -8.25f, -8.5f, -8.75f, -9.f, -9.5f, -10.f, -7.75f,
                               -7.5f, -7.25f, -7.f,  -6.5f,  7.f,  7.5f,  8.f,   8.5f};
constexpr float kLargestHalf = 65504.f;
constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

struct Block {
  alignas(64) float w[kGroup][kBlockRows];  // transposed: lanes are rows
  alignas(64) float scale[kBlockRows];
  alignas(64) uint16_t half[kBlockRows];
  alignas(64) int8_t q[kGroup][kBlockRows];
};

void loadRow(const void* src, int32_t type, int64_t at, int64_t count, float* to) {
  if (type == EC_F32) {
    std::copy_n(static_cast<const float*>(src) + at, count, to);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(src) + at;
  for (int64_t i = 0; i < count; ++i) {
    if (type == EC_F16) {
      to[i] = h2f(from[i]);
    } else {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(to + i, &bits, 4);
    }
  }
}

// The part of src that the block covers; zeros beyond it. Returns the first column, if any, of the
// lowest row whose value is refused, as row * k + column, else kNone.
int64_t loadBlock(const ec_pack& args, int64_t blockRow, int64_t group, Block& block) {
  const float limit = args.dst_type == EC_U4_64 ? 8.f * kLargestHalf : 127.f * kLargestHalf;
  const int64_t column = group * kGroup, width = std::min<int64_t>(kGroup, args.k - column);
  int64_t refused = kNone;
  for (int r = 0; r < kBlockRows; ++r) {
    const int64_t row = blockRow * kBlockRows + r;
    alignas(64) float values[kGroup] = {};
    if (row < args.n) loadRow(args.src, args.src_type, row * args.k + column, width, values);
    bool fits = true;
    for (float v : values) fits &= std::fabs(v) <= limit;
    for (int i = 0; i < kGroup; ++i) block.w[i][r] = values[i];
    for (int i = 0; !fits && i < kGroup; ++i) {
      if (!(std::fabs(values[i]) <= limit)) refused = std::min(refused, row * args.k + column + i);
    }
  }
  return refused;
}

Vec inverseOf(const float* scale) {
  float inverse[kWidth];
  for (int i = 0; i < kWidth; ++i) inverse[i] = scale[i] == 0.f ? 0.f : 1.f / scale[i];
  return load(inverse);
}

Vec quantizeU4(Vec w, Vec inverse) { return min(set(7.f), max(set(-8.f), round(w * inverse))); }
Vec quantizeI8(Vec w, Vec inverse) { return min(set(127.f), max(set(-127.f), round(w * inverse))); }

// scale[r], as fp16(largest[r] / divisor), for kWidth rows.
void scaleFor(const float* largest, float divisor, uint16_t* half, float* scale) {
  storeHalf(half, load(largest) / set(divisor));
  store(scale, loadHalf(half));
}

void largestOf(const Block& block, float* largest) {
  std::fill_n(largest, kBlockRows, 0.f);
  for (const auto& column : block.w) {
    for (int r = 0; r < kBlockRows; ++r) {
      largest[r] = std::fabs(column[r]) > std::fabs(largest[r]) ? column[r] : largest[r];
    }
  }
}

// The best scale of kWidth rows from `first` on.
void searchScales(Block& block, int first, const float* largest) {
  float best[kWidth], scale[kWidth], error[kWidth];
  uint16_t half[kWidth];
  std::fill_n(best, kWidth, std::numeric_limits<float>::infinity());
  for (float divisor : kDivisors) {
    scaleFor(largest + first, divisor, half, scale);
    const Vec s = load(scale), inverse = inverseOf(scale);
    Vec sum = zero();
    for (const auto& column : block.w) {
      const Vec w = load(column + first), rest = w - quantizeU4(w, inverse) * s;
      sum = sum + rest * rest;
    }
    store(error, sum);
    for (int i = 0; i < kWidth; ++i) {
      const bool better = error[i] < best[i];
      best[i] = better ? error[i] : best[i];
      block.half[first + i] = better ? half[i] : block.half[first + i];
      block.scale[first + i] = better ? scale[i] : block.scale[first + i];
    }
  }
}

template <Vec (*quantize)(Vec, Vec)>
void quantizeBlock(Block& block) {
  for (int r = 0; r < kBlockRows; ++r) {
    if (block.scale[r] == 0.f) block.half[r] = 0;
  }
  for (int first = 0; first < kBlockRows; first += kWidth) {
    const Vec inverse = inverseOf(block.scale + first);
    for (int i = 0; i < kGroup; ++i) {
      float q[kWidth];
      store(q, quantize(load(block.w[i] + first), inverse));
      for (int r = 0; r < kWidth; ++r)
        block.q[i][first + r] = static_cast<int8_t>(static_cast<int32_t>(q[r]));
    }
  }
}

void packU4(Block& block, uint8_t* dst) {
  float largest[kBlockRows];
  largestOf(block, largest);
  for (int first = 0; first < kBlockRows; first += kWidth) searchScales(block, first, largest);
  quantizeBlock<quantizeU4>(block);
  for (int octet = 0; octet < 8; ++octet) {
    for (int r = 0; r < kBlockRows; ++r, dst += 4) {
      for (int b = 0; b < 4; ++b) {
        const int low = block.q[octet * 8 + b][r] + 8, high = block.q[octet * 8 + 4 + b][r] + 8;
        dst[b] = static_cast<uint8_t>(low | high << 4);
      }
    }
  }
  std::memcpy(dst, block.half, sizeof block.half);
}

void packI8(Block& block, uint8_t* dst) {
  float largest[kBlockRows];
  largestOf(block, largest);
  for (float& value : largest) value = std::fabs(value);
  for (int first = 0; first < kBlockRows; first += kWidth) {
    scaleFor(largest + first, 127.f, block.half + first, block.scale + first);
  }
  quantizeBlock<quantizeI8>(block);
  for (int quad = 0; quad < 16; ++quad) {
    for (int r = 0; r < kBlockRows; ++r, dst += 4) {
      for (int b = 0; b < 4; ++b) dst[b] = static_cast<uint8_t>(block.q[quad * 4 + b][r]);
    }
  }
  std::memcpy(dst, block.half, sizeof block.half);
}

ec_status check(const ec_pack& args) {
  EC_TRY(checkPointer("pack", "src", args.src));
  EC_TRY(checkPointer("pack", "dst", args.dst));
  if (args.src_type != EC_F32 && args.src_type != EC_F16 && args.src_type != EC_BF16) {
    return fail(EC_INVALID, "pack: src_type is %d; use EC_F32, EC_F16 or EC_BF16", args.src_type);
  }
  if (!isBlockType(args.dst_type)) {
    return fail(EC_INVALID, "pack: dst_type is %d; use EC_U4_64 or EC_I8_64", args.dst_type);
  }
  EC_TRY(checkPositive("pack", "n", args.n));
  EC_TRY(checkPositive("pack", "k", args.k));
  const uint64_t bytes = weightBytes(args.dst_type, args.n, args.k);
  if (args.dst_bytes != bytes) {
    return fail(EC_INVALID, "pack: dst_bytes is %llu, [%d][%d] takes %llu",
                static_cast<unsigned long long>(args.dst_bytes), args.n, args.k,
                static_cast<unsigned long long>(bytes));
  }
  return EC_OK;
}

ec_status refuse(const ec_pack& args, int64_t index) {
  float value;
  loadRow(args.src, args.src_type, index, 1, &value);
  return fail(EC_INVALID, "pack: row %lld, column %lld is %g, which no fp16 scale holds",
              static_cast<long long>(index / args.k), static_cast<long long>(index % args.k),
              static_cast<double>(value));
}

}  // namespace

ec_status pack(Pool& pool, const ec_pack& args) {
  EC_TRY(check(args));
  const int64_t groups = (args.k + kGroup - 1) / kGroup;
  const int64_t blockBytes = args.dst_type == EC_U4_64 ? kU4BlockBytes : kI8BlockBytes;
  std::atomic<int64_t> refused{kNone};
  pool.parallelFor(
      (int64_t{args.n} + kBlockRows - 1) / kBlockRows, [&](int64_t blockRow, int thread) {
        Block& block = *reinterpret_cast<Block*>(pool.scratch(thread));
        uint8_t* dst = static_cast<uint8_t*>(args.dst) + blockRow * groups * blockBytes;
        for (int64_t g = 0; g < groups; ++g, dst += blockBytes) {
          const int64_t bad = loadBlock(args, blockRow, g, block);
          if (bad != kNone) {
            for (int64_t seen = refused; bad < seen && !refused.compare_exchange_weak(seen, bad);) {
            }
          } else if (args.dst_type == EC_U4_64) {
            packU4(block, dst);
          } else {
            packI8(block, dst);
          }
        }
      });
  return refused == kNone ? EC_OK : refuse(args, refused);
}

}  // namespace ec::EC_ISA
