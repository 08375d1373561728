// SPDX-License-Identifier: Apache-2.0
//
// Mixture of experts for 1 to 8 tokens in three launches; moe.cu has the equation.
//
//   first   8 experts of the router a CTA, and 32 rows of shared_up: the choice of experts is not
//           on the way of the shared expert's memory
//   up      rows of blocks of the taken experts. Each CTA finds the experts itself from the
//           router's logits, which costs less than a launch
//   down    32 rows of y a CTA: the shared expert, whose weights can be requested before anything
//           is known, then all taken ones in ascending order, the residual last
//
// Every product takes all tokens, and what a token has nothing to do with does not count: a matrix
// is read once for them all, and a token has the same bits in any batch. Which warp adds a block
// depends on the expert and the block only. Bound: memory, one read of what is taken.
// Reference: edgecascade/backends/reference.py  Test: tests/test_moe_kernels.py
#include "gemv.cuh"
#include "moe.h"
#include "moe_route.cuh"

namespace ec::cuda {
namespace {

constexpr int kRouterWarps = 2, kRouterExperts = kManyWarps / kRouterWarps;  // of one; of a CTA
// Threads that the registers of `first` and `down` must do for: a quarter more than they have, so
// that a CTA of the next launch fits beside them.
constexpr int kBeside = kManyWarps * kWarp * 5 / 4;
constexpr int kWords = kMaxExperts / 32;
constexpr int kMostTaken = kColumns * kMaxTopK;

struct Scratch {
  float* logits;  // [n_tok][experts]
  float* routed;  // [n_tok][top_k][ff] relu2(up h), the choices in ascending order
  float* shared;  // [n_tok][shared ff]

  Scratch(Arena& arena, const ec_step& step, const ec_moe& args)
      : logits(arena.take<float>(int64_t(step.n_tok) * args.up.experts)),
        routed(arena.take<float>(int64_t(step.n_tok) * args.top_k * args.up.n)),
        shared(
            arena.take<float>(args.shared_up.data ? int64_t(step.n_tok) * args.shared_up.n : 0)) {}
};

// Row of x of a token.
struct TokenOf {
  const float* x;
  int64_t d;
  __device__ const float* operator()(int i) const { return x + i * d; }
};

__device__ __forceinline__ auto tokensOf(const ec_moe& args, int n) {
  return normedRows(TokenOf{args.x, args.up.k}, args.norm, n, args.up.k);
}

// Parts of the router's dots, and of the norm's squares, of one CTA.
struct RouterParts {
  float dot[kRouterExperts][kRouterWarps][kColumns], squares[kRouterWarps][kColumns];
};

// One warp: its half of the columns of one expert, for kRows rows from `first` on, of which
// those below n are there. squares: NULL where another warp writes the same.
template <int kRows>
__device__ __forceinline__ void routerDots(const ec_moe& args, int expert, int part, int first,
                                           int n, const GemvShared& shared, float* dots,
                                           float* squares) {
  const int lane = threadIdx.x % kWarp, d = args.up.k, groups = groupsOf(args.norm);
  const int columns = ceilDiv(d, 8 * kRouterWarps) * 8, end = min(d, (part + 1) * columns);
  const float* row = args.router + int64_t(expert) * d;
  const bool aligned = isAligned(row, d) && isAligned(args.x, d) && isAligned(args.norm.gamma, d);
  float dot[kRows] = {}, square[kRows] = {};
#pragma unroll 2
  for (int column = part * columns + 8 * lane; column < end; column += 8 * kWarp) {
    EightColumns w, gamma;
    w.load(row, column, end, aligned);
    if (args.norm.gamma) {
      gamma.load(args.norm.gamma, column, end, aligned);
#pragma unroll
      for (int j = 0; j < 8; ++j) w.v[j] *= gamma.v[j];
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + i >= n) continue;
      EightColumns x;
      x.load(args.x + int64_t(first + i) * d, column, end, aligned);
      square[i] += x.squares();
      const float* inverse = shared.inverse() + (first + i) * groups;
      for (int j = 0; groups > 1 && j < 8; ++j) {
        if (column + j < end) x.v[j] *= inverse[(column + j) / (d / groups)];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) dot[i] = fmaf(w.v[j], x.v[j], dot[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (first + i >= n) continue;
    const float allDots = warpSum(dot[i]), allSquares = warpSum(square[i]);
    if (lane == 0) dots[first + i] = allDots;
    if (lane == 0 && squares) squares[first + i] = allSquares;
  }
}

// The whole CTA: the logits of kRouterExperts experts from `from` on.
__device__ __forceinline__ void routeCta(const ec_step& step, const ec_moe& args, int from,
                                         const GemvShared& shared, float* logits) {
  __shared__ RouterParts parts;
  const int warp = warpIndex(), lane = threadIdx.x % kWarp, experts = args.up.experts;
  const int each = warp / kRouterWarps, part = warp % kRouterWarps, expert = from + each;
  if (expert < experts && part == 0) {  // to the L2, while the launch before this one ends
    const auto* row =
        reinterpret_cast<const unsigned char*>(args.router + int64_t(expert) * args.up.k);
    for (int64_t at = 128 * lane; at < args.up.k * int64_t{4}; at += 128 * kWarp)
      prefetchL2(row + at);
  }
  awaitEarlier();
  const int n = liveRows(step);
  if (groupsOf(args.norm) > 1) {
    tokensOf(args, n).findInverses(shared, warp, kManyWarps);
    __syncthreads();
  }
  float *dots = parts.dot[each][part], *squares = each == 0 ? parts.squares[part] : nullptr;
  if (expert < experts && n == 1) {
    routerDots<1>(args, expert, part, 0, n, shared, dots, squares);
  } else if (expert < experts) {
    for (int i = 0; i < n; i += 2) routerDots<2>(args, expert, part, i, n, shared, dots, squares);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n * kRouterExperts; i += kManyWarps * kWarp) {
    const int e = i % kRouterExperts, token = i / kRouterExperts;
    if (from + e >= experts) continue;
    float dot = 0.f, squares = 0.f;
    for (int p = 0; p < kRouterWarps; ++p) {
      dot += parts.dot[e][p][token];
      squares += parts.squares[p][token];
    }
    const bool wholeRow = args.norm.gamma && args.norm.groups == 1;
    const float factor = wholeRow ? 1.f / sqrtf(squares / args.up.k + args.norm.eps) : 1.f;
    logits[int64_t(token) * experts + from + e] = dot * factor;
  }
}

// Rows of blocks of the shared expert, a CTA each.
template <class Codec>
struct SharedRow {
  const uint8_t* row;
  int perRow;
  __device__ __forceinline__ int size() const { return 1; }
  __device__ __forceinline__ int blocks(int) const { return perRow; }
  __device__ __forceinline__ int start(int, int warp) const { return warp; }
  __device__ __forceinline__ int bytes(int) const { return Codec::kBytes; }
  __device__ __forceinline__ const uint8_t* base(int) const { return firstPiece<Codec>(row); }
  __device__ __forceinline__ void copy(int, const uint8_t* from, unsigned char* slot) const {
    copyBlock<Codec>(from, slot);
  }
};

template <class Codec>
__global__ void __launch_bounds__(kBeside, 1)
    first(ec_step step, ec_moe args, Scratch scratch, GemvShape shape, int routers) {
  startDependents();
  const int d = args.up.k, cta = blockIdx.x - routers;
  const GemvShared shared(shape);
  if (cta < 0) {
    return routeCta(step, args, blockIdx.x * kRouterExperts, shared, scratch.logits);
  }
  const int perRow = ceilDiv(d, kGroup);
  const SharedRow<Codec> segments{
      static_cast<const uint8_t*>(args.shared_up.data) + int64_t(cta) * perRow * Codec::kBytes,
      perRow};
  Ring<kManyWarps, kDepth<Codec, kManyWarps>> ring(shared.base, shape.slotBytes);
  ring.finish(segments);
  const int n = liveRows(step);
  const auto rows = tokensOf(args, n);
  rows.holdGamma(shared, shape);
  __syncthreads();
  awaitEarlier();
  if (n == 0) return ring.drain();
  multiplySegments<Codec, kManyWarps>(ring, segments, rows, shared, Ahead{},
                                      [&](int, int i, int r, float value) {
                                        const int row = cta * kBlockRows + r, ff = args.shared_up.n;
                                        if (row < ff)
                                          scratch.shared[int64_t(i) * ff + row] = relu2(value);
                                      });
}

// The experts of the step's tokens, in shared memory.
struct Taken {
  uint32_t set[kColumns][kWords];  // of a token: bit e % 32 of word e / 32
  int active[kMostTaken];          // all of them, ascending
  int count;

  __device__ __forceinline__ bool has(int token, int expert) const {
    return set[token][expert / 32] >> expert % 32 & 1;
  }
  // Which of its experts, ascending, it is to a token.
  __device__ __forceinline__ int rank(int token, int expert) const {
    int before = __popc(set[token][expert / 32] & ((1u << expert % 32) - 1));
#pragma unroll 1
    for (int j = 0; j < expert / 32; ++j) before += __popc(set[token][j]);
    return before;
  }
  // Warp t < n, of token t: lane j has word j of its set. One barrier or two, the last at the end.
  __device__ __forceinline__ void gather(uint32_t word, int n, int experts) {
    const int warp = warpIndex(), lane = threadIdx.x % kWarp;
    if (warp < n && lane < kWords) set[warp][lane] = word;
    if (n > 1) __syncthreads();
    if (warp == 0) {
      __syncwarp();
      uint32_t all = 0;
      for (int i = 0; lane < kWords && i < n; ++i) all |= set[i][lane];
      listSet(all, experts, active);
      int sum = __popc(all);
      for (int bits = 16; bits > 0; bits >>= 1) sum += __shfl_xor_sync(kAll, sum, bits);
      if (lane == 0) count = sum;
    }
    __syncthreads();
  }
};

// One warp: the set that a token's ids are, lane k having the k-th; its word of lane j.
__device__ __forceinline__ uint32_t setOf(int id, int topK) {
  uint32_t word = 0;
  for (int k = 0; k < topK; ++k) {
    const int other = __shfl_sync(kAll, id, k);
    if (other / 32 == int(threadIdx.x % kWarp)) word |= 1u << other % 32;
  }
  return word;
}

// Rows of blocks of the taken experts, expert by expert: a CTA's share of them.
template <class Codec>
struct TakenRows {
  const uint8_t* data;
  int64_t stride;
  const Taken& taken;
  int from, to, perRow, perExpert;

  __device__ TakenRows(const ec_weight& w, const Taken& of)
      : data(static_cast<const uint8_t*>(w.data)),
        stride(w.expert_stride),
        taken(of),
        perRow(ceilDiv(w.k, kGroup)),
        perExpert(ceilDiv(w.n, kBlockRows)) {
    const int64_t rows = int64_t(of.count) * perExpert;
    from = static_cast<int>(rows * blockIdx.x / gridDim.x);
    to = static_cast<int>(rows * (blockIdx.x + 1) / gridDim.x);
  }
  __device__ __forceinline__ int expert(int segment) const {
    return taken.active[(from + segment) / perExpert];
  }
  __device__ __forceinline__ int row(int segment) const { return (from + segment) % perExpert; }
  __device__ __forceinline__ int size() const { return to - from; }
  __device__ __forceinline__ int blocks(int) const { return perRow; }
  __device__ __forceinline__ int start(int, int warp) const { return warp; }
  __device__ __forceinline__ int bytes(int) const { return Codec::kBytes; }
  __device__ __forceinline__ const uint8_t* base(int segment) const {
    return firstPiece<Codec>(data + stride * expert(segment) +
                             int64_t(row(segment)) * perRow * Codec::kBytes);
  }
  __device__ __forceinline__ void copy(int, const uint8_t* from, unsigned char* slot) const {
    copyBlock<Codec>(from, slot);
  }
};

// Scores of a token's experts and their scratch: [rows][2][experts] behind the GEMV's memory.
__device__ __forceinline__ float* scoresOf(const GemvShared& shared, int token, int experts) {
  return shared.at<float>(shared.shape.bytes) + 2 * token * experts;
}

// Shared variables of no template: only those the emulator can unset at a CTA's start.
__device__ __forceinline__ Taken& takenOfCta() {
  __shared__ Taken taken;
  return taken;
}
__device__ __forceinline__ float* weightsOfCta() {
  __shared__ float weights[kMostTaken];  // [n][top_k]
  return weights;
}

template <class Codec>
__global__ void __launch_bounds__(kFewWarps* kWarp, kCtasAtOnce<Codec, kFewWarps>)
    up(ec_step step, ec_moe args, Scratch scratch, GemvShape shape, Ahead ahead) {
  Taken& taken = takenOfCta();
  startDependents();
  const int experts = args.up.experts, topK = args.top_k, ff = args.up.n;
  const int lane = threadIdx.x % kWarp, warp = warpIndex();
  const GemvShared shared(shape);
  const int n = liveRows(step);
  const auto rows = tokensOf(args, n);
  rows.holdGamma(shared, shape);
  awaitEarlier();
  if (n == 0) return;
  float* scores = scoresOf(shared, warp, experts);
  uint32_t word = 0;
  if (warp < n) {
    word = args.force ? setOf(lane < topK ? args.ids[warp * topK + lane] : 0, topK)
                      : chooseExperts(args, scratch.logits + int64_t(warp) * experts, scores,
                                      scores + experts);
  }
  taken.gather(word, n, experts);
  const TakenRows<Codec> segments(args.up, taken);
  Ring<kFewWarps, kDepth<Codec, kFewWarps>> ring(shared.base, shape.slotBytes);
  ring.finish(segments);
  if (!args.force && blockIdx.x == 0 && warp < n)
    weighExperts(args, word, scores, args.ids + warp * topK, args.weights + warp * topK);
  multiplySegments<Codec, kFewWarps>(
      ring, segments, rows, shared, ahead, [&](int segment, int i, int r, float value) {
        const int expert = segments.expert(segment);
        const int row = segments.row(segment) * kBlockRows + r;
        if (!taken.has(i, expert) || row >= ff) return;
        scratch.routed[(int64_t(i) * topK + taken.rank(i, expert)) * ff + row] = relu2(value);
      });
}

// The blocks behind 32 rows of y: the shared expert's, then those of each taken one.
template <class Codec, class SharedCodec>
struct DownRow {
  const ec_moe& args;
  const Taken& taken;
  int known = 0;  // experts

  __device__ __forceinline__ int perExpert() const { return ceilDiv(args.down.k, kGroup); }
  __device__ __forceinline__ int perShared() const {
    return args.shared_down.data ? ceilDiv(args.shared_down.k, kGroup) : 0;
  }
  __device__ __forceinline__ int common() const { return args.shared_down.data ? 1 : 0; }
  __device__ __forceinline__ bool isShared(int i) const { return i < common(); }
  __device__ __forceinline__ int expert(int i) const { return taken.active[i - common()]; }
  __device__ __forceinline__ int size() const { return common() + known; }
  __device__ __forceinline__ int blocks(int i) const {
    return isShared(i) ? perShared() : perExpert();
  }
  // Where one ends with a part of the warps, another begins with the others, for most.
  __device__ __forceinline__ int start(int i, int warp) const {
    const int rest = kManyWarps - perExpert() % kManyWarps;
    return isShared(i) ? warp : (warp + expert(i) * rest) % kManyWarps;
  }
  __device__ __forceinline__ int bytes(int i) const {
    return isShared(i) ? SharedCodec::kBytes : Codec::kBytes;
  }
  __device__ __forceinline__ const uint8_t* base(int i) const {
    const ec_weight& w = isShared(i) ? args.shared_down : args.down;
    const uint8_t* row =
        static_cast<const uint8_t*>(w.data) + int64_t(blockIdx.x) * blocks(i) * bytes(i);
    return isShared(i) ? firstPiece<SharedCodec>(row)
                       : firstPiece<Codec>(row + w.expert_stride * expert(i));
  }
  __device__ __forceinline__ void copy(int i, const uint8_t* from, unsigned char* slot) const {
    if (isShared(i)) return copyBlock<SharedCodec>(from, slot);
    copyBlock<Codec>(from, slot);
  }
  // Hidden values are staged in chunks of four blocks, each segment from a chunk of its own on.
  __device__ __forceinline__ int chunksBefore(int i) const {
    const int all = ceilDiv(perShared(), kChunkBlocks);
    return isShared(i) ? 0 : all + (i - common()) * ceilDiv(perExpert(), kChunkBlocks);
  }
  __device__ __forceinline__ int segmentOf(int chunk) const {
    const int all = ceilDiv(perShared(), kChunkBlocks);
    return chunk < all ? 0 : common() + (chunk - all) / ceilDiv(perExpert(), kChunkBlocks);
  }
};

// Hidden values of the tokens before `down`.
template <class Segments>
struct HiddenRows {
  const ec_moe& args;
  const Scratch& scratch;
  const Segments& segments;
  const Taken& taken;
  const float* weights;  // [n][top_k], the choices in ascending order
  int n;

  struct Loaded {
    EightColumns h;
    float weight;
    bool taken;
  };

  __device__ __forceinline__ Loaded load(int chunk, int token) const {
    const int segment = segments.segmentOf(chunk), lane = threadIdx.x % kWarp;
    const int first = (chunk - segments.chunksBefore(segment)) * kChunkBlocks * kGroup + 8 * lane;
    Loaded loaded = {{}, 1.f, true};
    const float* row = scratch.shared + int64_t(token) * args.shared_down.k;
    int k = args.shared_down.k;
    if (!segments.isShared(segment)) {
      const int expert = segments.expert(segment);
      loaded.taken = taken.has(token, expert);
      if (!loaded.taken) return loaded;
      const int slot = token * args.top_k + taken.rank(token, expert);
      loaded.weight = weights[slot];
      k = args.down.k;
      row = scratch.routed + int64_t(slot) * k;
    }
    loaded.h.load(row, first, k, isAligned(row, k));
    return loaded;
  }

  // The share of a warp in chunks [from, to).
  template <class Codec, class SharedCodec>
  __device__ __forceinline__ void stage(const GemvShared& shared, int from, int to) const {
    const auto pack = [&](int task, Loaded& loaded) {
      const int octet = task / n * kChunk + threadIdx.x % kWarp, token = task % n;
      if (!loaded.taken) {
        if (threadIdx.x % 8 == 0) storeFactor(shared, octet / 8, token, 0.f, 0.f);
      } else if (segments.isShared(segments.segmentOf(from + task / n))) {
        packBlock<SharedCodec>(shared, loaded.h.v, octet, token, 1.f);
      } else {
        packBlock<Codec>(shared, loaded.h.v, octet, token, loaded.weight);
      }
    };
    stageTasks<2>((to - from) * n, warpIndex(), kManyWarps,
                  [&](int task) { return load(from + task / n, task % n); }, pack);
  }
};

template <class Codec, class SharedCodec>
constexpr int kDownDepth =
    kDepth<Codec, kManyWarps> < kDepth<SharedCodec, kManyWarps> ? kDepth<Codec, kManyWarps>
                                                                : kDepth<SharedCodec, kManyWarps>;

// Two codecs are two loops, which take all the registers there are.
template <class Codec, class SharedCodec>
constexpr int kBesideDown = std::is_same_v<Codec, SharedCodec> ? kBeside : kManyWarps* kWarp;

template <class Codec, class SharedCodec>
__global__ void __launch_bounds__(kBesideDown<Codec, SharedCodec>, 1)
    down(ec_step step, ec_moe args, Scratch scratch, GemvShape shape, Ahead ahead) {
  Taken& taken = takenOfCta();
  float* const weights = weightsOfCta();
  startDependents();
  const int topK = args.top_k, lane = threadIdx.x % kWarp, warp = warpIndex();
  const int g = lane / 4;
  const GemvShared shared(shape);
  DownRow<Codec, SharedCodec> segments{args, taken};
  Ring<kManyWarps, kDownDepth<Codec, SharedCodec>> ring(shared.base, shape.slotBytes);
  ring.fill(segments);
  const int n = liveRows(step);
  if (threadIdx.x == 0) *shared.zero() = make_uint4(0, 0, 0, 0);
  awaitEarlier();
  if (n == 0) return ring.drain();
  uint32_t word = 0;
  if (warp < n) {
    const int id = lane < topK ? args.ids[warp * topK + lane] : 0;
    const float weight = lane < topK ? args.weights[warp * topK + lane] : 0.f;
    word = setOf(id, topK);
    int rank = 0;
    for (int j = 0; j <= (args.up.experts - 1) / 32; ++j) {
      const uint32_t bits = __shfl_sync(kAll, word, j);
      if (j <= id / 32) rank += __popc(j < id / 32 ? bits : bits & ((1u << id % 32) - 1));
    }
    bool again = false;  // an id that is forced twice counts once
    for (int k = 0; k < topK; ++k) again |= __shfl_sync(kAll, id, k) == id && k < lane;
    if (lane < topK && !again) weights[warp * topK + rank] = weight;
  }
  taken.gather(word, n, args.up.experts);
  segments.known = taken.count;
  ring.finish(segments);

  const HiddenRows<DownRow<Codec, SharedCodec>> hidden{args, scratch, segments, taken, weights, n};
  const int column = g < n ? g : n - 1;
  const int chunks = segments.chunksBefore(segments.size()), held = shape.staged / kChunkBlocks;
  float sum[2][4] = {};
  int segment = 0, kb = segments.size() ? segments.start(0, warp) : 0;
#pragma unroll 1
  for (int from = 0; from < chunks; from += held) {
    const int to = min(from + held, chunks);
    if (from > 0) __syncthreads();
    hidden.template stage<Codec, SharedCodec>(shared, from, to);
    __syncthreads();
#pragma unroll 1
    while (segment < segments.size()) {
      const int before = segments.chunksBefore(segment), blocks = segments.blocks(segment);
      const int end = min(blocks, (to - before) * kChunkBlocks);
      const int origin = (from - before) * kChunkBlocks;  // the segment's block that is held first
      const bool common = segments.isShared(segment);
      if (end == blocks && segment + 1 == segments.size()) prefetch(ahead);
      const bool counts = common || taken.has(column, segments.expert(segment));
      const Columns columns(shared, column, kb - origin, kManyWarps, counts);
      if (std::is_same_v<Codec, SharedCodec> || !common) {
        kb = addBlocks<Codec, kManyWarps>(ring, segments, kb, end, columns, sum);
      } else {
        kb = addBlocks<SharedCodec, kManyWarps>(ring, segments, kb, end, columns, sum);
      }
      if (end < blocks) break;  // the rest of it is held next
      if (++segment < segments.size()) kb = segments.start(segment, warp);
    }
  }
  reduceWarps<kManyWarps>(sum, shared, n, [&](int token, int r, float value) {
    const int row = blockIdx.x * kBlockRows + r;
    const int64_t at = int64_t(token) * args.down.n + row;
    if (row < args.down.n) args.y[at] = args.x[at] + value;
  });
}

template <class Codec>
ec_status launchFirst(ec_stream stream, const ec_step& step, const ec_moe& args,
                      const Scratch& scratch) {
  const int d = args.up.k, perRow = ceilDiv(d, kGroup);
  const int most = kManyWarps * kDepth<Codec, kManyWarps>;
  const int rows = args.shared_up.data ? ceilDiv(args.shared_up.n, kBlockRows) : 0;
  const int routers = args.force ? 0 : ceilDiv(args.up.experts, kRouterExperts);
  if (rows + routers == 0) return EC_OK;
  const GemvShape shape(step.n_tok, kManyWarps, perRow < most ? perRow : most, Codec::kBytes, d,
                        args.norm, static_cast<int>(sizeof(RouterParts)));
  return launchEarly("moe", first<Codec>, dim3(routers + rows), kManyWarps * kWarp, shape.bytes,
                     stream, step, step, args, scratch, shape, routers);
}

int mostTaken(const ec_step& step, const ec_moe& args) {
  const int choices = step.n_tok * args.top_k;
  return choices < args.up.experts ? choices : args.up.experts;
}

template <class Codec>
ec_status launchUp(ec_stream stream, const ec_step& step, const ec_moe& args,
                   const Scratch& scratch) {
  const int rows = mostTaken(step, args) * ceilDiv(args.up.n, kBlockRows);
  const int scores = 2 * step.n_tok * args.up.experts * static_cast<int>(sizeof(float));
  const GemvCall call =
      gemvCall<Codec, kFewWarps>(up<Codec>, step.n_tok, rows, args.up.k, args.norm, scores,
                                 scores + static_cast<int>(sizeof(Taken)));
  return launchEarly("moe", up<Codec>, dim3(call.ctas), kFewWarps * kWarp, call.shared, stream,
                     step, step, args, scratch, call.shape, aheadOf(step, args.shared_down));
}

template <class Codec, class SharedCodec>
ec_status launchDown(ec_stream stream, const ec_step& step, const ec_moe& args,
                     const Scratch& scratch) {
  const auto chunksOf = [](int k) { return ceilDiv(ceilDiv(k, kGroup), kChunkBlocks); };
  const int chunks = mostTaken(step, args) * chunksOf(args.down.k) +
                     (args.shared_down.data ? chunksOf(args.shared_down.k) : 0);
  const int slotBytes = Codec::kBytes > SharedCodec::kBytes ? Codec::kBytes : SharedCodec::kBytes;
  const GemvShape shape(step.n_tok, kManyWarps, kManyWarps * kDownDepth<Codec, SharedCodec>,
                        slotBytes, chunks * kChunkBlocks * kGroup, ec_norm{},
                        static_cast<int>(sizeof(Taken) + kMostTaken * sizeof(float)));
  return launchEarly("moe", down<Codec, SharedCodec>, dim3(ceilDiv(args.down.n, kBlockRows)),
                     kManyWarps * kWarp, shape.bytes, stream, step, step, args, scratch, shape,
                     aheadOf(step));
}

bool isU4(const ec_weight& w) { return w.type == EC_U4_64 || !w.data; }

}  // namespace

void moeDecodeScratch(Arena& arena, const ec_step& step, const ec_moe& args) {
  Scratch(arena, step, args);
}

ec_status moeDecode(ec_stream stream, const ec_step& step, const ec_moe& args, Arena& arena) {
  const Scratch scratch(arena, step, args);
  EC_TRY(arena.status("moe"));
  EC_TRY(isU4(args.shared_up) ? launchFirst<U4>(stream, step, args, scratch)
                              : launchFirst<I8>(stream, step, args, scratch));
  EC_TRY(isU4(args.up) ? launchUp<U4>(stream, step, args, scratch)
                       : launchUp<I8>(stream, step, args, scratch));
  if (isU4(args.down)) {
    return isU4(args.shared_down) ? launchDown<U4, U4>(stream, step, args, scratch)
                                  : launchDown<U4, I8>(stream, step, args, scratch);
  }
  return isU4(args.shared_down) ? launchDown<I8, U4>(stream, step, args, scratch)
                                : launchDown<I8, I8>(stream, step, args, scratch);
}

}  // namespace ec::cuda
