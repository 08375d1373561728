// SPDX-License-Identifier: Apache-2.0
//
// What every backend's ops check before they run: scalars and shapes, never a pointer's target,
// which may be device memory. Failures carry a sentence.
#ifndef EC_COMMON_CHECKS_H
#define EC_COMMON_CHECKS_H

#include <cstddef>
#include <cstdint>

#include "edgecascade.h"

namespace ec {

constexpr int kBlockRows = 32;
constexpr int kGroup = 64;           // columns that share a scale
constexpr int kU4BlockBytes = 1088;  // 1024 bytes of codes, 32 fp16 scales
constexpr int kI8BlockBytes = 2112;  // 2048 bytes of codes, 32 fp16 scales
constexpr int kMaxConvKernel = 8;

// Stores the sentence that last_error() returns on this thread; returns `status`.
ec_status fail(ec_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));
const char* lastError();

// The step's counts are possible.
ec_status checkStepShape(const char* op, const ec_step& step);
ec_status checkPointer(const char* op, const char* field, const void* pointer);
ec_status checkPositive(const char* op, const char* field, int64_t value);
// Sizes are computed in 64 bits: no product of the arguments may come near 2^63.
ec_status checkValues(const char* op, const char* what, double values);
ec_status checkNorm(const char* op, const ec_norm& norm, int32_t k);
// Shape and type of a matrix (or of `experts` of them).
ec_status checkWeight(const char* op, const char* field, const ec_weight& w);
uint64_t weightBytes(int32_t type, int32_t n, int32_t k);  // 0: unknown type or bad shape

// The whole shape of an op's arguments.
ec_status checkEmbedShape(const ec_step& step, const ec_embed& args);
ec_status checkLinearShape(const ec_step& step, const ec_linear& args);
ec_status checkMambaShape(const char* op, const ec_step& step, const ec_mamba& args);
ec_status checkAttentionShape(const char* op, const ec_step& step, const ec_attention& args);
ec_status checkMoeShape(const ec_step& step, const ec_moe& args);
ec_status checkHeadShape(const ec_step& step, const ec_head& args);
ec_status checkSampleShape(const ec_step& step, const ec_sample& args);

// Every pointer that must not be NULL.
ec_status checkSequencePointers(const char* op, const ec_step& step);
ec_status checkEmbedPointers(const ec_embed& args);
ec_status checkLinearPointers(const ec_linear& args);
ec_status checkMambaPointers(const char* op, const ec_step& step, const ec_mamba& args);
ec_status checkAttentionPointers(const char* op, const ec_step& step, const ec_attention& args);
ec_status checkMoePointers(const ec_moe& args);
ec_status checkHeadPointers(const ec_step& step, const ec_head& args);
ec_status checkSamplePointers(const ec_sample& args);

#define EC_TRY(expression)                        \
  do {                                            \
    ec_status ecTryStatus = (expression);         \
    if (ecTryStatus != EC_OK) return ecTryStatus; \
  } while (0)

// Hands out 256-byte aligned pieces of the step's workspace. Without a step it only measures, so
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

}  // namespace ec

#endif  // EC_COMMON_CHECKS_H
