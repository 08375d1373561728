// SPDX-License-Identifier: Apache-2.0
//
// What each op reads first of its weights; ahead.cuh has the reason.
#include "ahead.cuh"
#include "blocks.cuh"

namespace ec::cuda {
namespace {

constexpr int kMostRows = 8;  // of a step whose launches are bound by weights

thread_local const ec_call* following = nullptr;

bool isAsked(const ec_step& step) { return step.flags & EC_PREFETCH && step.n_tok <= kMostRows; }

// A quarter of the L2: what arrives during a border is less, and the rest is the launch's own.
int64_t mostBytes() { return limits().l2 / 4; }

Ahead piecesOf(const void* data, int64_t rowBytes, int64_t step, int64_t pieces, int64_t bytes) {
  return {static_cast<const uint8_t*>(data), static_cast<unsigned>(rowBytes),
          static_cast<unsigned>(step), static_cast<unsigned>(pieces), static_cast<unsigned>(bytes)};
}

// The first bytes, as far as whole lines go.
Ahead startOf(const void* data, int64_t bytes) {
  if (bytes > mostBytes()) bytes = mostBytes();
  const int64_t pieces = limits().multiprocessors, each = bytes / pieces / kLine * kLine;
  return each ? piecesOf(data, each, 1 << 16, pieces, each) : piecesOf(data, 0, 0, 1, bytes);
}

// Rows that the CTAs of a launch divide among themselves: the start of each multiprocessor's share.
Ahead sharesOf(const void* data, int64_t rows, int64_t rowBytes) {
  const int64_t pieces = limits().multiprocessors;
  if (rows * rowBytes <= mostBytes() || rows > UINT16_MAX) return startOf(data, rows * rowBytes);
  return piecesOf(data, rowBytes, ceilDiv(rows << 16, pieces), pieces, mostBytes() / pieces);
}

int64_t rowsOf(const ec_weight& w) { return ceilDiv(w.n, kBlockRows); }
int64_t rowBytesOf(const ec_weight& w) {
  return ceilDiv(w.k, kGroup) * int64_t{w.type == EC_U4_64 ? kU4BlockBytes : kI8BlockBytes};
}

Ahead productOf(const ec_weight& w) {
  return isBlockType(w.type) ? sharesOf(w.data, rowsOf(w), rowBytesOf(w)) : Ahead{};
}

// The router's CTAs are the first; who forces the experts leaves them out.
Ahead moeOf(const ec_step& step, const ec_moe& args) {
  if (args.force || !isBlockType(args.up.type)) return aheadOf(step, args.shared_up);
  return sharesOf(args.router, args.up.experts, int64_t{args.up.k} * sizeof(float));
}

}  // namespace

Following::Following(const ec_call* next) { following = next; }
Following::~Following() { following = nullptr; }

Ahead aheadOf(const ec_step& step) {
  if (!isAsked(step) || !following) return {};
  const void* args = following->args;
  switch (following->op) {
    case EC_OP_LINEAR:
      return productOf(static_cast<const ec_linear*>(args)->w);
    case EC_OP_HEAD:
      return productOf(static_cast<const ec_head*>(args)->w);
    case EC_OP_MOE:
      return moeOf(step, *static_cast<const ec_moe*>(args));
    default:
      return {};
  }
}

Ahead aheadOf(const ec_step& step, const ec_weight& w) {
  if (!isAsked(step) || !w.data || !isBlockType(w.type)) return {};
  return startOf(w.data, rowsOf(w) * rowBytesOf(w));
}

}  // namespace ec::cuda
