// SPDX-License-Identifier: Apache-2.0
//
// Mixture of experts for more than 8 tokens; moe.cu has the equation.
//
// The (token, choice) pairs are sorted by expert on the device, and by token within one, and cut
// into tiles of up to 64, each of one expert. Up and down are one product of tiles each (gemm.cuh),
// which leaves out what a tile does not fill; the grid covers as many tiles as there can be, and
// those beyond the last return. Every pair has a row of its own to
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

constexpr int kSortWarps = kMaxExperts / kWarp;

// One CTA. A warp takes a stretch of the pairs, 32 at a time: expert(lane's pair), or -1, and which
// of the 32 have the same.
template <class Visit>
__device__ __forceinline__ void visitPairs(const ec_moe& args, int pairs, const Visit& visit) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int stretch = ceilDiv(ceilDiv(pairs, kWarp), kSortWarps) * kWarp;
  const int end = min((warp + 1) * stretch, pairs);
  for (int first = warp * stretch; first < end; first += kWarp) {
    const int pair = first + lane, id = pair < end ? args.ids[pair] : -1;
    visit(pair, id, __match_any_sync(kAll, id));
    __syncwarp();
  }
}

// The sum of the values of threads 0 to the own one. sums: [threads]
__device__ __forceinline__ int sumUpTo(int value, int* sums) {
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int distance = 1; distance < kMaxExperts; distance *= 2) {
    const int before = int(threadIdx.x) >= distance ? sums[threadIdx.x - distance] : 0;
    __syncthreads();
    sums[threadIdx.x] += before;
    __syncthreads();
  }
  const int sum = sums[threadIdx.x];
  __syncthreads();
  return sum;
}

// Each warp counts the experts of its pairs; a thread for each expert sums the counts up over the
// warps, and the CTA over the experts; then each warp puts its pairs where they belong.
__global__ void __launch_bounds__(kMaxExperts) sortPairs(ec_step step, ec_moe args, Order order) {
  const int experts = args.up.experts, pairs = liveRows(step) * args.top_k, e = threadIdx.x;
  int* sums = dynamicShared<int>();  // [threads]
  int* next = sums + kMaxExperts;    // [warps][experts] counts, then the next place
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int i = threadIdx.x; i < kSortWarps * experts; i += kMaxExperts) next[i] = 0;
  __syncthreads();
  visitPairs(args, pairs, [&](int, int id, unsigned same) {
    if (id >= 0 && same >> lane == 1) next[warp * experts + id] += __popc(same);
  });
  __syncthreads();
  int count = 0;
  for (int w = 0; e < experts && w < kSortWarps; ++w) {
    const int here = next[w * experts + e];
    next[w * experts + e] = count;
    count += here;
  }
  const int tiles = ceilDiv(count, kTile);
  const int start = sumUpTo(count, sums) - count, firstTile = sumUpTo(tiles, sums) - tiles;
  for (int w = 0; e < experts && w < kSortWarps; ++w) next[w * experts + e] += start;
  for (int i = 0; i < tiles; ++i) {
    order.tileExpert[firstTile + i] = e;
    order.tileFirst[firstTile + i] = start + i * kTile;
    order.tileCount[firstTile + i] = min(kTile, count - i * kTile);
  }
  if (e == kMaxExperts - 1) *order.tiles = firstTile + tiles;
  __syncthreads();
  visitPairs(args, pairs, [&](int pair, int id, unsigned same) {
    int* place = next + warp * experts + id;
    if (id >= 0) {
      const int at = *place + __popc(same & ((1u << lane) - 1));
      order.token[at] = pair / args.top_k;
      order.place[pair] = at;
    }
    __syncwarp();
    if (id >= 0 && same >> lane == 1) *place += __popc(same);
  });
}

// y[pair] = act(W[expert of the pair] acts[rowOf(pair)])
template <class Codec, class RowOf>
__global__ void __launch_bounds__(kGemmThreads, 3)
    expertTiles(ec_weight w, Acts acts, Order order, RowOf rowOf, int act, float* y) {
  const int tile = blockIdx.y;
  if (tile >= *order.tiles) return;
  const int first = order.tileFirst[tile], row0 = blockIdx.x * kGemmRows;
  const uint8_t* blocks = static_cast<const uint8_t*>(w.data) +
                          w.expert_stride * order.tileExpert[tile] +
                          int64_t(row0 / kBlockRows) * ceilDiv(w.k, kGroup) * Codec::kBytes;
  multiplyTile<Codec>(
      blocks, w.n - row0, w.k, acts, order.tileCount[tile], [&](int i) { return rowOf(first + i); },
      [&](int, int, float(&values)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = activate(act, values[j]);
      },
      [&](int i, int r, const float(&values)[4]) {
        storeFour(y + int64_t(first + i) * w.n + row0 + r, values, w.n - row0 - r, w.n % 4 == 0);
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
  __device__ float* at(int row, int r) const { return y + row * n + r; }
  __device__ float value(int, int, float product) const { return activate(act, product); }
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
  return launch("moe", kernel, grid, kGemmThreads, gemmShared(w), stream, w, acts, order, rowOf,
                act, y);
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
  EC_TRY(launch("moe", sortPairs, dim3(1), kMaxExperts,
                sizeof(int) * (kMaxExperts + kSortWarps * args.up.experts), stream, step, args,
                s.order));
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
