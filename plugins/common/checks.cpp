// SPDX-License-Identifier: Apache-2.0
#include "checks.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <limits>

namespace ec {

namespace {

thread_local char lastSentence[512] = "";

constexpr size_t kAlign = 256;  // what device memory is aligned to

}  // namespace

ec_status fail(ec_status status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(lastSentence, sizeof lastSentence, format, values);
  va_end(values);
  return status;
}

const char* lastError() { return lastSentence; }

ec_status checkStepShape(const char* op, const ec_step& step) {
  EC_TRY(checkPositive(op, "step.n_tok", step.n_tok));
  if (step.n_seq < 0)
    return fail(EC_INVALID, "%s: step.n_seq is %d; it cannot be negative", op, step.n_seq);
  if (step.n_out < 0)
    return fail(EC_INVALID, "%s: step.n_out is %d; it cannot be negative", op, step.n_out);
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

ec_status checkValues(const char* op, const char* what, double values) {
  if (values <= 1e12) return EC_OK;
  return fail(EC_INVALID, "%s: the step's %s would have %.3g values", op, what, values);
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

ec_status checkEmbedShape(const ec_step& step, const ec_embed& args) {
  EC_TRY(checkStepShape("embed", step));
  EC_TRY(checkWeight("embed", "table", args.table));
  if (args.table.type != EC_F32 && args.table.type != EC_F16) {
    return fail(EC_UNSUPPORTED,
                "embed: table.type is %d; rows can be looked up in EC_F32 and EC_F16",
                args.table.type);
  }
  return EC_OK;
}

ec_status checkLinearShape(const ec_step& step, const ec_linear& args) {
  EC_TRY(checkStepShape("linear", step));
  EC_TRY(checkWeight("linear", "w", args.w));
  EC_TRY(checkNorm("linear", args.norm, args.w.k));
  if (args.act != EC_IDENTITY && args.act != EC_RELU2) {
    return fail(EC_INVALID, "linear: act is %d; use EC_IDENTITY or EC_RELU2", args.act);
  }
  return EC_OK;
}

ec_status checkMambaShape(const char* op, const ec_step& step, const ec_mamba& args) {
  EC_TRY(checkStepShape(op, step));
  EC_TRY(checkPositive(op, "heads", args.heads));
  EC_TRY(checkPositive(op, "head_dim", args.head_dim));
  EC_TRY(checkPositive(op, "groups", args.groups));
  EC_TRY(checkPositive(op, "state", args.state));
  EC_TRY(checkPositive(op, "chunk", args.chunk));
  if (args.heads % args.groups != 0) {
    return fail(EC_INVALID, "%s: heads %d is no multiple of groups %d", op, args.heads,
                args.groups);
  }
  if (args.kernel < 2 || args.kernel > kMaxConvKernel) {
    return fail(EC_INVALID, "%s: kernel is %d, must be 2 to %d", op, args.kernel, kMaxConvKernel);
  }
  const double row = 2.0 * args.heads * args.head_dim + 2.0 * args.groups * args.state + args.heads;
  return checkValues(op, "rows", step.n_tok * row);
}

ec_status checkAttentionShape(const char* op, const ec_step& step, const ec_attention& args) {
  EC_TRY(checkStepShape(op, step));
  EC_TRY(checkPositive(op, "heads", args.heads));
  EC_TRY(checkPositive(op, "kv_heads", args.kv_heads));
  EC_TRY(checkPositive(op, "head_dim", args.head_dim));
  EC_TRY(checkPositive(op, "step.max_pages", step.max_pages));
  EC_TRY(checkPositive(op, "step.max_context", step.max_context));
  if (args.heads % args.kv_heads != 0) {
    return fail(EC_INVALID, "%s: heads %d is no multiple of kv_heads %d", op, args.heads,
                args.kv_heads);
  }
  if (args.kv_type != EC_F32 && args.kv_type != EC_F16 && args.kv_type != EC_I8_ROW) {
    return fail(EC_INVALID, "%s: kv_type is %d, must be EC_F32, EC_F16 or EC_I8_ROW", op,
                args.kv_type);
  }
  if (!std::isfinite(args.scale)) return fail(EC_INVALID, "%s: scale is %g", op, args.scale);
  return EC_OK;
}

namespace {

ec_status checkPair(const char* upName, const ec_weight& up, const char* downName,
                    const ec_weight& down) {
  EC_TRY(checkWeight("moe", upName, up));
  EC_TRY(checkWeight("moe", downName, down));
  if (up.n == down.k && up.k == down.n) return EC_OK;
  return fail(EC_INVALID,
              "moe: %s is [%d][%d] and %s is [%d][%d]; one must be the other's transpose", upName,
              up.n, up.k, downName, down.n, down.k);
}

ec_status checkChoice(const ec_step& step, const ec_moe& args) {
  const int32_t experts = args.up.experts;
  EC_TRY(checkPositive("moe", "up.experts", experts));
  if (args.down.experts != experts) {
    return fail(EC_INVALID, "moe: up has %d experts, down has %d", experts, args.down.experts);
  }
  if (args.top_k < 1 || args.top_k > experts) {
    return fail(EC_INVALID, "moe: top_k is %d, outside 1..%d experts", args.top_k, experts);
  }
  if (args.n_group < 1 || experts % args.n_group != 0) {
    return fail(EC_INVALID, "moe: n_group is %d, which does not divide %d experts", args.n_group,
                experts);
  }
  if (args.topk_group < 1 || args.topk_group > args.n_group) {
    return fail(EC_INVALID, "moe: topk_group is %d, outside 1..n_group = %d", args.topk_group,
                args.n_group);
  }
  if (args.top_k > args.topk_group * (experts / args.n_group)) {
    return fail(EC_INVALID, "moe: top_k is %d, but %d groups of %d experts hold fewer", args.top_k,
                args.topk_group, experts / args.n_group);
  }
  if (int64_t{step.n_tok} * args.top_k > std::numeric_limits<int32_t>::max()) {
    return fail(EC_INVALID, "moe: %d tokens x top_k %d is too many for one step", step.n_tok,
                args.top_k);
  }
  return EC_OK;
}

}  // namespace

ec_status checkMoeShape(const ec_step& step, const ec_moe& args) {
  EC_TRY(checkStepShape("moe", step));
  EC_TRY(checkPair("up", args.up, "down", args.down));
  EC_TRY(checkNorm("moe", args.norm, args.up.k));
  EC_TRY(checkChoice(step, args));
  if (!args.shared_up.data != !args.shared_down.data) {
    return fail(EC_INVALID, "moe: shared_up and shared_down must be both there or both absent");
  }
  if (!args.shared_up.data) return EC_OK;
  EC_TRY(checkPair("shared_up", args.shared_up, "shared_down", args.shared_down));
  if (args.shared_up.k == args.up.k) return EC_OK;
  return fail(EC_INVALID, "moe: shared_up.k is %d, up.k is %d; they must be equal",
              args.shared_up.k, args.up.k);
}

ec_status checkHeadShape(const ec_step& step, const ec_head& args) {
  EC_TRY(checkStepShape("head", step));
  EC_TRY(checkWeight("head", "w", args.w));
  return checkNorm("head", args.norm, args.w.k);
}

ec_status checkSampleShape(const ec_step& step, const ec_sample& args) {
  EC_TRY(checkPositive("sample", "vocab", args.vocab));
  EC_TRY(checkPositive("sample", "step.n_out", step.n_out));
  return checkValues("sample", "logits", static_cast<double>(step.n_out) * args.vocab);
}

ec_status checkSequencePointers(const char* op, const ec_step& step) {
  EC_TRY(checkPointer(op, "start", step.start));
  EC_TRY(checkPointer(op, "slot", step.slot));
  return checkPointer(op, "past", step.past);
}

ec_status checkEmbedPointers(const ec_embed& args) {
  EC_TRY(checkPointer("embed", "tokens", args.tokens));
  EC_TRY(checkPointer("embed", "table.data", args.table.data));
  return checkPointer("embed", "x", args.x);
}

ec_status checkLinearPointers(const ec_linear& args) {
  EC_TRY(checkPointer("linear", "x", args.x));
  EC_TRY(checkPointer("linear", "w.data", args.w.data));
  return checkPointer("linear", "y", args.y);
}

ec_status checkMambaPointers(const char* op, const ec_step& step, const ec_mamba& args) {
  EC_TRY(checkSequencePointers(op, step));
  EC_TRY(checkPointer(op, "zxbcdt", args.zxbcdt));
  EC_TRY(checkPointer(op, "conv_weight", args.conv_weight));
  EC_TRY(checkPointer(op, "a", args.a));
  EC_TRY(checkPointer(op, "d", args.d));
  EC_TRY(checkPointer(op, "dt_bias", args.dt_bias));
  EC_TRY(checkPointer(op, "conv", args.conv));
  EC_TRY(checkPointer(op, "ssm", args.ssm));
  return checkPointer(op, "y", args.y);
}

ec_status checkAttentionPointers(const char* op, const ec_step& step, const ec_attention& args) {
  EC_TRY(checkSequencePointers(op, step));
  EC_TRY(checkPointer(op, "qkv", args.qkv));
  EC_TRY(checkPointer(op, "kv", args.kv));
  EC_TRY(checkPointer(op, "y", args.y));
  return checkPointer(op, "page_table", step.page_table);
}

ec_status checkMoePointers(const ec_moe& args) {
  EC_TRY(checkPointer("moe", "x", args.x));
  EC_TRY(checkPointer("moe", "up.data", args.up.data));
  EC_TRY(checkPointer("moe", "down.data", args.down.data));
  EC_TRY(checkPointer("moe", "ids", args.ids));
  EC_TRY(checkPointer("moe", "weights", args.weights));
  EC_TRY(checkPointer("moe", "y", args.y));
  if (args.force) return EC_OK;
  EC_TRY(checkPointer("moe", "router", args.router));
  return checkPointer("moe", "bias", args.bias);
}

ec_status checkHeadPointers(const ec_step& step, const ec_head& args) {
  EC_TRY(checkPointer("head", "step.out_row", step.out_row));
  EC_TRY(checkPointer("head", "x", args.x));
  EC_TRY(checkPointer("head", "w.data", args.w.data));
  return checkPointer("head", "logits", args.logits);
}

ec_status checkSamplePointers(const ec_sample& args) {
  EC_TRY(checkPointer("sample", "logits", args.logits));
  EC_TRY(checkPointer("sample", "params", args.params));
  EC_TRY(checkPointer("sample", "uniform", args.uniform));
  EC_TRY(checkPointer("sample", "token", args.token));
  return checkPointer("sample", "logprob", args.logprob);
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
