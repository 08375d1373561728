// SPDX-License-Identifier: Apache-2.0
#include "common.h"

#include <cstdarg>
#include <cstdio>

namespace ec {

namespace {

thread_local char lastSentence[512] = "";

constexpr size_t kAlign = 64;

}  // namespace

ec_status fail(ec_status status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(lastSentence, sizeof lastSentence, format, values);
  va_end(values);
  return status;
}

const char* lastError() { return lastSentence; }

int32_t liveSeqs(const ec_step& step) { return step.live ? *step.live : step.n_seq; }

int32_t liveTokens(const ec_step& step) { return step.live ? step.start[*step.live] : step.n_tok; }

ec_status checkStepShape(const char* op, const ec_step& step) {
  EC_TRY(checkPositive(op, "step.n_tok", step.n_tok));
  if (step.n_seq < 0)
    return fail(EC_INVALID, "%s: step.n_seq is %d; it cannot be negative", op, step.n_seq);
  if (step.n_out < 0)
    return fail(EC_INVALID, "%s: step.n_out is %d; it cannot be negative", op, step.n_out);
  return EC_OK;
}

ec_status checkStep(const char* op, const ec_step& step) {
  EC_TRY(checkStepShape(op, step));
  if (!step.live) return EC_OK;
  EC_TRY(checkPointer(op, "step.start (needed with step.live)", step.start));
  const int32_t live = *step.live;
  if (live < 0 || live > step.n_seq) {
    return fail(EC_INVALID, "%s: step.live is %d, outside 0..n_seq = %d", op, live, step.n_seq);
  }
  const int32_t tokens = step.start[live];
  if (tokens < 0 || tokens > step.n_tok) {
    return fail(EC_INVALID, "%s: step.start[%d] is %d, outside 0..n_tok = %d", op, live, tokens,
                step.n_tok);
  }
  return EC_OK;
}

ec_status checkPointer(const char* op, const char* field, const void* pointer) {
  if (pointer) return EC_OK;
  return fail(EC_INVALID, "%s: %s is NULL", op, field);
}

ec_status checkPositive(const char* op, const char* field, int64_t value) {
  if (value > 0) return EC_OK;
  return fail(EC_INVALID, "%s: %s is %lld; it must be positive", op, field,
              static_cast<long long>(value));
}

ec_status checkNorm(const char* op, const ec_norm& norm, int32_t k) {
  if (!norm.gamma) return EC_OK;
  EC_TRY(checkPositive(op, "norm.groups", norm.groups));
  if (k % norm.groups != 0) {
    return fail(EC_INVALID, "%s: norm.groups is %d, which does not divide k = %d", op, norm.groups,
                k);
  }
  if (!(norm.eps >= 0.f))
    return fail(EC_INVALID, "%s: norm.eps is %g; it must be >= 0", op, norm.eps);
  return EC_OK;
}

ec_status checkWeight(const char* op, const char* field, const ec_weight& w) {
  if (w.n <= 0 || w.k <= 0) {
    return fail(EC_INVALID, "%s: %s is [%d][%d]; n and k must be positive", op, field, w.n, w.k);
  }
  const uint64_t bytes = weightBytes(w.type, w.n, w.k);
  if (bytes == 0) {
    return fail(EC_INVALID, "%s: %s.type is %d; use EC_F32, EC_F16, EC_U4_64 or EC_I8_64", op,
                field, w.type);
  }
  if (w.experts > 1 && w.expert_stride < bytes) {
    return fail(EC_INVALID, "%s: %s.expert_stride is %llu bytes, less than one matrix of %llu", op,
                field, static_cast<unsigned long long>(w.expert_stride),
                static_cast<unsigned long long>(bytes));
  }
  return EC_OK;
}

uint64_t weightBytes(int32_t type, int32_t n, int32_t k) {
  if (n <= 0 || k <= 0) return 0;
  const uint64_t rows = static_cast<uint64_t>(n), columns = static_cast<uint64_t>(k);
  const uint64_t blocks = (rows + kBlockRows - 1) / kBlockRows * ((columns + kGroup - 1) / kGroup);
  switch (type) {
    case EC_F32:
      return rows * columns * 4;
    case EC_F16:
      return rows * columns * 2;
    case EC_U4_64:
      return blocks * kU4BlockBytes;
    case EC_I8_64:
      return blocks * kI8BlockBytes;
    default:
      return 0;
  }
}

Arena::Arena() : base_(nullptr), capacity_(0), used_(0) {}

Arena::Arena(const ec_step& step)
    : base_(static_cast<std::byte*>(step.workspace)), capacity_(0), used_(0) {
  if (!base_) return;
  const size_t skip = (kAlign - reinterpret_cast<uintptr_t>(base_) % kAlign) % kAlign;
  base_ += skip;
  capacity_ = step.workspace_bytes > skip ? step.workspace_bytes - skip : 0;
}

void* Arena::takeBytes(int64_t count, size_t size) {
  const size_t offset = used_;
  used_ += (static_cast<size_t>(count) * size + kAlign - 1) / kAlign * kAlign;
  return base_ && used_ <= capacity_ ? base_ + offset : nullptr;
}

size_t Arena::bytes() const { return used_ ? used_ + kAlign : 0; }

ec_status Arena::status(const char* op) const {
  if (used_ <= capacity_) return EC_OK;
  return fail(EC_WORKSPACE,
              "%s: needs %zu bytes of workspace, step.workspace holds %zu; ask workspace_size()",
              op, bytes(), capacity_);
}

}  // namespace ec
