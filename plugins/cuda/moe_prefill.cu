// SPDX-License-Identifier: Apache-2.0
//
// Mixture of experts for more than 8 tokens; moe.cu has the equation.
//
// The (token, choice) pairs are sorted by expert on the device and cut into tiles of up to 64, each
// of one expert. Up and down are one product of tiles each (gemm.cuh); the grid covers as many
// tiles as there can be, and those beyond the last return. Every pair has a row of its own to
// write, and a last launch adds a token's rows in the order of its experts: no atomics. Bound:
// memory of the experts that are taken, then the tensor cores. Reference:
// edgecascade/backends/reference.py  Test: tests/test_moe_kernels.py
#include "moe.h"
#include "moe_route.cuh"
#include "product.cuh"

namespace ec::cuda {
namespace {

// Pairs sorted by expert, by token within one.
struct Order {
  int32_t* token;       // [pairs]
  int32_t* place;       // [n_tok][top_k] where a pair went
  int32_t* tileExpert;  // [tiles]
  int32_t* tileFirst;   // [tiles]
  int32_t* tileCount;   // [tiles]
  int32_t* tiles;       // [1]

  static int64_t maxTiles(const ec_step& step, const ec_moe& args) {
    const int64_t pairs = int64_t(step.n_tok) * args.top_k;
    return pairs / kTile + (pairs < args.up.experts ? pairs : args.up.experts);
  }
  Order(Arena& arena, const ec_step& step, const ec_moe& args)
      : token(arena.take<int32_t>(int64_t(step.n_tok) * args.top_k)),
        place(arena.take<int32_t>(int64_t(step.n_tok) * args.top_k)),
        tileExpert(arena.take<int32_t>(maxTiles(step, args))),
        tileFirst(arena.take<int32_t>(maxTiles(step, args))),
        tileCount(arena.take<int32_t>(maxTiles(step, args))),
        tiles(arena.take<int32_t>(1)) {}
};

struct Scratch {
  Order order;
  Acts x;               // [n_tok] norm(x)
  float* hidden;        // [pairs][ff]
  Acts hiddenActs;      // [pairs]
  float* routed;        // [pairs][d] down relu2(up h)
  float* sharedHidden;  // [n_tok][shared ff]
  Acts sharedActs;      // [n_tok]
  float* shared;        // [n_tok][d]

  Scratch(Arena& arena, const ec_step& step, const ec_moe& args)
      : order(arena, step, args),
        x(arena, step.n_tok, args.up.k),
        hidden(arena.take<float>(pairs(step, args) * args.up.n)),
        hiddenActs(arena, pairs(step, args), args.up.n),
        routed(arena.take<float>(pairs(step, args) * args.down.n)),
        sharedHidden(arena.take<float>(sharedRows(step, args) * args.shared_up.n)),
        sharedActs(arena, sharedRows(step, args), args.shared_up.n),
        shared(arena.take<float>(sharedRows(step, args) * args.down.n)) {}
  static int64_t pairs(const ec_step& step, const ec_moe& args) {
    return int64_t(step.n_tok) * args.top_k;
  }
  static int64_t sharedRows(const ec_step& step, const ec_moe& args) {
    return args.shared_up.data ? step.n_tok : 0;
  }
};

// One CTA, a thread to an expert: counts, starts, and each pair's place.
__global__ void __launch_bounds__(kMaxExperts) sortPairs(ec_step step, ec_moe args, Order order) {
  __shared__ int start[kMaxExperts + 1], tileStart[kMaxExperts + 1];
  const int pairs = liveRows(step) * args.top_k, experts = args.up.experts, e = threadIdx.x;
  int count = 0;
  for (int i = 0; e < experts && i < pairs; ++i) count += args.ids[i] == e;
  if (e < experts) {
    start[e + 1] = count;
    tileStart[e + 1] = ceilDiv(count, kTile);
  }
  __syncthreads();
  if (e == 0) {
    start[0] = tileStart[0] = 0;
    for (int i = 0; i < experts; ++i) {
      start[i + 1] += start[i];
      tileStart[i + 1] += tileStart[i];
    }
    *order.tiles = tileStart[experts];
  }
  __syncthreads();
  if (e >= experts) return;
  for (int i = 0, at = start[e]; i < pairs; ++i) {
    if (args.ids[i] != e) continue;
    order.token[at] = i / args.top_k;
    order.place[i] = at++;
  }
  for (int tile = tileStart[e]; tile < tileStart[e + 1]; ++tile) {
    const int from = start[e] + (tile - tileStart[e]) * kTile;
    order.tileExpert[tile] = e;
    order.tileFirst[tile] = from;
    order.tileCount[tile] = min(kTile, start[e + 1] - from);
  }
}

// y[pair] = act(W[expert of the pair] acts[rowOf(pair)])
template <class Codec, class RowOf>
__global__ void __launch_bounds__(kGemmThreads)
    expertTiles(ec_weight w, Acts acts, Order order, RowOf rowOf, int act, float* y) {
  const int tile = blockIdx.y;
  if (tile >= *order.tiles) return;
  const int first = order.tileFirst[tile], row0 = blockIdx.x * kGemmRows;
  const uint8_t* blocks = static_cast<const uint8_t*>(w.data) +
                          w.expert_stride * order.tileExpert[tile] +
                          int64_t(row0 / kBlockRows) * ceilDiv(w.k, kGroup) * Codec::kBytes;
  multiplyTile<Codec>(
      blocks, w.n - row0, w.k, acts, order.tileCount[tile], [&](int i) { return rowOf(first + i); },
      [&](int i, int r, const float(&values)[4]) {
        float* to = y + int64_t(first + i) * w.n + row0 + r;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (row0 + r + j < w.n) to[j] = activate(act, values[j]);
        }
      });
}

__global__ void __launch_bounds__(kThreads) combine(ec_step step, ec_moe args, Scratch scratch) {
  const int token = blockIdx.y, column = blockIdx.x * kThreads + threadIdx.x, d = args.down.n;
  if (token >= liveRows(step) || column >= d) return;
  float sum = 0.f;
  for (int k = 0; k < args.top_k; ++k) {
    const int pair = token * args.top_k + k;
    sum = fmaf(args.weights[pair], scratch.routed[int64_t(scratch.order.place[pair]) * d + column],
               sum);
  }
  const int64_t at = int64_t(token) * d + column;
  if (args.shared_down.data) sum += scratch.shared[at];
  args.y[at] = args.x[at] + sum;
}

struct LiveRow {
  ec_step step;
  int perToken;  // rows
  __device__ int operator()(int i) const { return i < liveRows(step) * perToken ? i : -1; }
};
struct LiveTokens {
  ec_step step;
  __device__ int count() const { return liveRows(step); }
  __device__ int operator()(int i) const { return i; }
};
struct StoreActivated {
  float* y;
  int64_t n;
  int act;
  __device__ void operator()(int row, int r, float value) const {
    y[row * n + r] = activate(act, value);
  }
};
struct TokenOfPair {
  const int32_t* token;
  __device__ int operator()(int pair) const { return token[pair]; }
};
struct SamePair {
  __device__ int operator()(int pair) const { return pair; }
};

template <class RowOf>
ec_status launchExperts(ec_stream stream, const ec_weight& w, const Acts& acts, const Order& order,
                        int64_t tiles, const RowOf& rowOf, int act, float* y) {
  const dim3 grid(ceilDiv(w.n, kGemmRows), static_cast<unsigned>(tiles));
  const auto kernel = w.type == EC_U4_64 ? expertTiles<U4, RowOf> : expertTiles<I8, RowOf>;
  return launch("moe", kernel, grid, kGemmThreads, kGemmShared, stream, w, acts, order, rowOf, act,
                y);
}

}  // namespace

void moePrefillScratch(Arena& arena, const ec_step& step, const ec_moe& args) {
  Scratch(arena, step, args);
}

ec_status moePrefill(ec_stream stream, const ec_step& step, const ec_moe& args, Arena& arena) {
  const Scratch s(arena, step, args);
  EC_TRY(arena.status("moe"));
  const int pairs = static_cast<int>(Scratch::pairs(step, args));
  const int64_t tiles = Order::maxTiles(step, args);
  const ec_norm none = {};
  EC_TRY(routeTokens(stream, step, args));
  EC_TRY(launch("moe", sortPairs, dim3(1), kMaxExperts, 0, stream, step, args, s.order));
  EC_TRY(prepare("moe", stream, args.x, args.up.k, args.norm, step.n_tok, s.x, LiveRow{step, 1}));
  EC_TRY(launchExperts(stream, args.up, s.x, s.order, tiles, TokenOfPair{s.order.token}, EC_RELU2,
                       s.hidden));
  EC_TRY(prepare("moe", stream, s.hidden, args.up.n, none, pairs, s.hiddenActs,
                 LiveRow{step, args.top_k}));
  EC_TRY(launchExperts(stream, args.down, s.hiddenActs, s.order, tiles, SamePair{}, EC_IDENTITY,
                       s.routed));
  if (args.shared_up.data) {
    const LiveTokens rows{step};
    const ec_weight &up = args.shared_up, &down = args.shared_down;
    EC_TRY(tiledProduct("moe", stream, up, s.x, step.n_tok, rows,
                        StoreActivated{s.sharedHidden, up.n, EC_RELU2}));
    EC_TRY(prepare("moe", stream, s.sharedHidden, args.shared_up.n, none, step.n_tok, s.sharedActs,
                   LiveRow{step, 1}));
    EC_TRY(tiledProduct("moe", stream, down, s.sharedActs, step.n_tok, rows,
                        StoreActivated{s.shared, down.n, EC_IDENTITY}));
  }
  return launch("moe", combine, dim3(ceilDiv(args.down.n, kThreads), step.n_tok), kThreads, 0,
                stream, step, args, s);
}

}  // namespace ec::cuda
