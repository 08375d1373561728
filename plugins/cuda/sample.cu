// SPDX-License-Identifier: Apache-2.0
//
// One token from each row of logits [n_out][vocab]:
//
//   penalties on `seen`: l > 0 ? l / repetition : l * repetition;  - presence if count > 0;  -
//   frequency * count temperature 0: the largest logit, the lowest id among equals else p =
//   softmax(l / temperature) over the top_k largest; the shortest prefix with sum >= top_p; of it p
//   >= min_p p_max; then the first token whose cumulative p exceeds uniform * sum, in the order (p
//   descending, id ascending) logprob = log softmax of the raw logits at the token
//
// Three launches, and no sort of the vocabulary:
//
//   readLogits     a CTA a block of 2048 tokens: penalised scores, their best, the raw logits' sum
//   orderTokens    likewise: those that may be drawn in their order, with running sums of p
//   chooseTokens   a CTA a row: where top-k, top-p, min-p and the draw end, found in all blocks at
//                  once by searching their sorted lists for 16 values at a time
//
// p over p_max is an integer (massOf), so that sums are exact whatever their order: the token does
// not depend on launch geometry, and no atomic addition is needed. Tokens that round to 0 cannot be
// drawn. A NaN is never chosen; a row without a token to choose gets -1. Bound: launches and
// latency; 24 bytes a token of the vocabulary. Reference: edgecascade/sampling.py
// Test: tests/test_sample_kernels.py
#include "kernels.h"
#include "platform.h"

namespace ec::cuda {
namespace {

constexpr int kBlock = 2048;  // tokens
constexpr int kThreads = 512;
constexpr int kPivots = 16;     // values that chooseTokens looks up at a time
constexpr int kMostLanes = 64;  // threads for each of them
constexpr int kMostWarps = kPivots * kMostLanes / kWarp;

using Key = unsigned long long;   // (score descending, id ascending) as one number: none is equal
using Mass = unsigned long long;  // p over p_max

// What readLogits knows of a block.
struct Part {
  float rawTop, rawSum;  // sum of exp(logit - rawTop)
  float top;             // after the penalties
  int32_t id;            // the lowest that has it
};

struct Scratch {
  int blocks, stride;
  int unitBits;   // p_max is 2^unitBits: at most 46, and the vocabulary's sum has to fit into 64
                  // bits
  float* scores;  // [n_out][vocab] penalised
  Part* parts;    // [n_out][blocks]
  int32_t* kept;  // [n_out][blocks] tokens in a block's list
  Key* order;     // [n_out][blocks][stride] the lists
  Mass* sums;     // likewise: of the mass up to here
  Scratch(Arena& arena, const ec_step& step, const ec_sample& args)
      : blocks(ceilDiv(args.vocab, kBlock)),
        stride(args.vocab < kBlock ? args.vocab : kBlock),
        unitBits(46),
        scores(arena.take<float>(int64_t(step.n_out) * args.vocab)),
        parts(arena.take<Part>(int64_t(step.n_out) * blocks)),
        kept(arena.take<int32_t>(int64_t(step.n_out) * blocks)),
        order(arena.take<Key>(int64_t(step.n_out) * blocks * stride)),
        sums(arena.take<Mass>(int64_t(step.n_out) * blocks * stride)) {
    while (unitBits > 32 && int64_t(args.vocab) > int64_t(1) << (63 - unitBits)) --unitBits;
  }
};

template <class T, class Join>
__device__ T blockReduce(T* parts, T value, Join join) {
  for (int bits = 16; bits > 0; bits >>= 1) value = join(value, __shfl_xor_sync(kAll, value, bits));
  __syncthreads();
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  T all = parts[0];
  for (int w = 1; w < int(blockDim.x) / kWarp; ++w) all = join(all, parts[w]);
  return all;
}

struct Largest {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Least {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

__device__ __forceinline__ Key keyOf(float score, int id) {
  const uint32_t bits = __float_as_uint(score == 0.f ? 0.f : score);  // -0 equals 0
  return Key(bits >> 31 ? bits : ~(bits | 0x80000000u)) << 31 | Key(id);
}
__device__ __forceinline__ float scoreOf(Key key) {
  const uint32_t bits = static_cast<uint32_t>(key >> 31);
  return __uint_as_float(bits >> 31 ? bits : ~bits & 0x7fffffffu);
}
__device__ __forceinline__ int idOf(Key key) { return static_cast<int>(key & 0x7fffffffu); }

// 2^(62 - j/32)
__device__ const long long kPowers[32] = {
    4611686018427387904, 4512867096753504463, 4416165660797809419, 4321536337207803251,
    4228934724888366668, 4138317374168289834, 4049641766413219908, 3962866294075461077,
    3877950241171266237, 3794853764176460055, 3713537873331429433, 3633964414346709481,
    3556096050500581047, 3479896245120279830, 3405329244438597040, 3332360060817827770,
    3260954456333195553, 3191078926708050276, 3122700685593301682, 3055787649183712190,
    2990308421163830843, 2926232277976504838, 2863529154407056491, 2802169629476361550,
    2742124912636209756, 2683366830260470360, 2625867812425724110, 2569600879975159024,
    2514539631859660218, 2460658232750154058, 2407931400915394245, 2356334396359501942};

// exp((score - top) / temperature) in units of 2^-unitBits, rounded. Its own error is below 2^-36
// of it: that of float, 2^-24, would move one draw in a hundred from a flat distribution to a
// neighbour of the definition's token; doubles are slow on small GPUs.
//
// The quotient is a sum of two floats, y + less; with n = round(y 32/ln 2), which takes 12 bits, ln
// 2/32 is split so that n times each part, and what remains of y, are exact floats.
__device__ Mass massOf(float score, float top, float temperature, int unitBits) {
  constexpr float kPart = 0x1.62ep-6f, kPart2 = 0x1.0bcp-20f, kPart3 = 8.7180213e-10f;
  const float far = top - score, back = far - top;
  const float lost = (top - (far - back)) + (-score - back);
  const float y = far / temperature;
  if (!(y < 64.f)) return 0;  // -inf, too
  const float less = (fmaf(-y, temperature, far) + lost) / temperature;
  const float n = rintf(y * 46.1662413f);
  const float high = fmaf(n, kPart2, fmaf(n, kPart, -y));  // + low: ln of what 2^(-n/32) misses
  const float low = fmaf(n, kPart3, -less);
  const float r = high + low;
  const float rest = low + r * r * (0.5f + r * (0.16666667f + r * (0.041666668f + r * 0.0083333f)));
  constexpr float kUnits = 4503599627370496.f;  // 2^52
  const long long more =
      static_cast<long long>(high * kUnits) + static_cast<long long>(rest * kUnits);
  const int whole = static_cast<int>(n);
  const long long power = kPowers[whole % 32];
  const long long mass = (power >> 12) + __mul64hi(power, more);  // in units of 2^-50
  const int drop = 50 - unitBits + whole / 32;
  return drop > 51 ? 0 : static_cast<Mass>(mass + (1ll << (drop - 1))) >> drop;
}

__device__ float rowTop(float* shared, const Part* parts, int blocks) {
  float top = -INFINITY;
  for (int b = threadIdx.x; b < blocks; b += blockDim.x) top = fmaxf(top, parts[b].top);
  return blockReduce(shared, top, Largest());
}

// Beside an infinite logit no other has a probability.
__device__ bool isGreedy(const ec_sampling& p, float top) {
  return !(p.temperature > 0.f) || !(fabsf(top) < INFINITY);
}

__global__ void __launch_bounds__(kThreads) readLogits(ec_sample args, Scratch scratch) {
  __shared__ float scores[kBlock];
  __shared__ float values[kThreads / kWarp];
  __shared__ int ids[kThreads / kWarp];
  const int row = blockIdx.y, from = blockIdx.x * kBlock, count = min(kBlock, args.vocab - from);
  const ec_sampling p = args.params[row];
  const float* logits = args.logits + int64_t(row) * args.vocab + from;
  float raw = -INFINITY;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const float v = logits[i] > -INFINITY ? logits[i] : -INFINITY;  // NaN, too
    scores[i] = v;
    raw = fmaxf(raw, v);
  }
  raw = blockReduce(values, raw, Largest());
  float sum = 0.f;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    if (scores[i] > -INFINITY) sum += expf(scores[i] - raw);
  }
  sum = blockReduce(values, sum, Sum());
  const bool penalises = p.repetition != 1.f || p.presence != 0.f || p.frequency != 0.f;
  for (int i = threadIdx.x; penalises && i < p.n_seen; i += kThreads) {
    const int at = p.seen[i] - from;
    if (at < 0 || at >= count) continue;
    float score = scores[at];
    score = score > 0 ? score / p.repetition : score * p.repetition;
    if (p.count[i] > 0) score -= p.presence;
    // Rounded twice, as on the CPU: a fused subtraction would draw other tokens now and then.
    scores[at] = score - __fmul_rn(p.frequency, static_cast<float>(p.count[i]));
  }
  __syncthreads();
  float top = -INFINITY;
  float* kept = scratch.scores + int64_t(row) * args.vocab + from;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    kept[i] = scores[i];
    top = fmaxf(top, scores[i]);
  }
  top = blockReduce(values, top, Largest());
  int id = count;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    if (scores[i] == top) id = min(id, i);
  }
  id = blockReduce(ids, id, Least());
  if (threadIdx.x == 0) {
    scratch.parts[int64_t(row) * scratch.blocks + blockIdx.x] = {raw, sum, top, from + id};
  }
}

// Puts `size` keys, a power of two, into ascending order: a bitonic network.
__device__ void sortKeys(Key* keys, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int gap = run / 2; gap > 0; gap /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int a = 2 * i - (i & (gap - 1)), b = a + gap;
        const Key first = keys[a], second = keys[b];
        if ((first > second) == ((a & run) == 0)) {
          keys[a] = second;
          keys[b] = first;
        }
      }
      __syncthreads();
    }
  }
}

// The sum of a value over the threads up to this one.
__device__ Mass blockScan(Mass* parts, Mass value) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int by = 1; by < kWarp; by *= 2) {
    const Mass other = __shfl_sync(kAll, value, lane - by);
    if (lane >= by) value += other;
  }
  __syncthreads();
  if (lane == kWarp - 1) parts[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += parts[w];
  return value;
}

__global__ void __launch_bounds__(kThreads) orderTokens(ec_sample args, Scratch scratch) {
  __shared__ Key keys[kBlock];
  __shared__ float values[kThreads / kWarp];
  __shared__ Mass masses[kThreads / kWarp];
  __shared__ int found;
  const int row = blockIdx.y, from = blockIdx.x * kBlock, count = min(kBlock, args.vocab - from);
  const ec_sampling p = args.params[row];
  const int64_t block = int64_t(row) * scratch.blocks + blockIdx.x;
  const float top = rowTop(values, scratch.parts + int64_t(row) * scratch.blocks, scratch.blocks);
  if (isGreedy(p, top)) return;
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  const float* scores = scratch.scores + int64_t(row) * args.vocab + from;
  const int lane = threadIdx.x % kWarp;
  for (int first = threadIdx.x - lane; first < count; first += kThreads) {
    const int i = first + lane;
    const float score = i < count ? scores[i] : -INFINITY;
    const bool drawable = massOf(score, top, p.temperature, scratch.unitBits) > 0;
    const unsigned bits = __ballot_sync(kAll, drawable);
    int at = lane == 0 ? atomicAdd(&found, __popc(bits)) : 0;
    at = __shfl_sync(kAll, at, 0) + __popc(bits & ((1u << lane) - 1));
    if (drawable) keys[at] = keyOf(score, from + i);
  }
  __syncthreads();
  const int kept = found;
  int size = 1;
  while (size < kept) size *= 2;
  for (int i = kept + threadIdx.x; i < size; i += kThreads) keys[i] = ~Key{0};
  __syncthreads();
  sortKeys(keys, size);
  constexpr int kEach = kBlock / kThreads;
  const int mine = threadIdx.x * kEach;
  Mass sums[kEach], sum = 0;
  for (int i = 0; i < kEach; ++i) {
    if (mine + i < kept)
      sum += massOf(scoreOf(keys[mine + i]), top, p.temperature, scratch.unitBits);
    sums[i] = sum;
  }
  const Mass before = blockScan(masses, sum) - sum;
  for (int i = 0; i < kEach && mine + i < kept; ++i) {
    scratch.order[block * scratch.stride + mine + i] = keys[mine + i];
    scratch.sums[block * scratch.stride + mine + i] = before + sums[i];
  }
  if (threadIdx.x == 0) scratch.kept[block] = kept;
}

// What the threads of chooseTokens tell each other.
struct Exchange {
  float values[kMostWarps];
  int ids[kMostWarps];
  Mass masses[kMostWarps];
  Key keys[kMostWarps];
  Key found;
};

// The lists of a row, each kept up to a length: together they are a prefix of the order.
struct Lists {
  Exchange& x;
  const Key* order;
  const Mass* sums;
  int blocks, stride;
  int* kept;   // [blocks] shared
  int* low;    // [blocks] a lower bound of what cutAt looks for
  int* trial;  // [kPivots][blocks]

  __device__ Mass sumOf(int b, int length) const {
    return length > 0 ? sums[int64_t(b) * stride + length - 1] : 0;
  }
  __device__ Mass total() const {
    Mass sum = 0;
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) sum += sumOf(b, kept[b]);
    return blockReduce(x.masses, sum, Sum());
  }

  // How many keys of a list, at least `from` and at most `to`, are not above a value.
  __device__ int lengthTo(int b, int from, int to, Key value) const {
    const Key* list = order + int64_t(b) * stride;
    while (from < to) {
      const int middle = (from + to) / 2;
      if (list[middle] <= value) {
        from = middle + 1;
      } else {
        to = middle;
      }
    }
    return from;
  }

  // Keeps what precedes, in the order, the first token at which the mass, or the count, reaches
  // `target` (exceeds it if `exceed`), and that token, which it returns.
  __device__ Key cutAt(Mass target, bool byCount, bool exceed) {
    const int lanes = blockDim.x / kPivots, pivot = threadIdx.x / lanes;
    Key below = ~Key{0}, last = 0;  // the token is in (below, last]
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) {
      low[b] = 0;
      if (kept[b] == 0) continue;
      below = min(below, order[int64_t(b) * stride]);
      last = max(last, order[int64_t(b) * stride + kept[b] - 1]);
    }
    below = blockReduce(x.keys, below, Least()) - 1;
    last = blockReduce(x.keys, last, Largest());
    int left = 2;
    while (left > 1 && last - below > 1) {
      const Key step = (last - below) / kPivots + ((last - below) % kPivots != 0);
      const auto value = [&](int p) {
        const Key offset = step * Key(p + 1);
        return offset < last - below ? below + offset : last;
      };
      Mass sum = 0;
      for (int b = threadIdx.x % lanes; b < blocks; b += lanes) {
        const int length = lengthTo(b, low[b], kept[b], value(pivot));
        trial[pivot * blocks + b] = length;
        sum += byCount ? Mass(length) : sumOf(b, length);
      }
      sum = warpSum(sum);
      __syncthreads();
      if (threadIdx.x % kWarp == 0) x.masses[threadIdx.x / kWarp] = sum;
      __syncthreads();
      // Without a value that reaches the target, rounding put it behind them all: the last.
      int first = kPivots - 1;
      for (int p = kPivots - 2; p >= 0; --p) {
        Mass reached = 0;
        for (int w = 0; w < lanes / kWarp; ++w) reached += x.masses[p * (lanes / kWarp) + w];
        if (exceed ? reached > target : reached >= target) first = p;
      }
      left = 0;
      for (int b = threadIdx.x; b < blocks; b += blockDim.x) {
        if (first > 0) low[b] = trial[(first - 1) * blocks + b];
        kept[b] = trial[first * blocks + b];
        left += kept[b] - low[b];
      }
      left = blockReduce(x.ids, left, Sum());
      const Key end = value(first);
      if (first > 0) below = value(first - 1);
      last = end;
    }
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) {
      if (kept[b] > low[b]) x.found = order[int64_t(b) * stride + low[b]];
    }
    __syncthreads();
    const Key found = x.found;
    __syncthreads();
    return found;
  }

  // Drops tokens of less mass, which are the last ones of each list.
  __device__ void keepAtLeast(double least) {
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) {
      int from = 0, to = kept[b];
      while (from < to) {
        const int middle = (from + to) / 2;
        if (static_cast<double>(sumOf(b, middle + 1) - sumOf(b, middle)) >= least) {
          from = middle + 1;
        } else {
          to = middle;
        }
      }
      kept[b] = from;
    }
    __syncthreads();
  }
};

// log of the sum of exp over the raw logits is top + log: kept apart, as a large top would cost the
// other its last digits.
struct LogSum {
  float top, log;
};
__device__ LogSum logSum(Exchange& x, const Part* parts, int blocks) {
  float raw = -INFINITY, sum = 0.f;
  for (int b = threadIdx.x; b < blocks; b += blockDim.x) raw = fmaxf(raw, parts[b].rawTop);
  raw = blockReduce(x.values, raw, Largest());
  for (int b = threadIdx.x; b < blocks; b += blockDim.x) {
    if (parts[b].rawTop > -INFINITY) sum += parts[b].rawSum * expf(parts[b].rawTop - raw);
  }
  return {raw, logf(blockReduce(x.values, sum, Sum()))};
}

__device__ int drawToken(const ec_sampling& p, float uniform, int unitBits, Lists lists) {
  if (p.top_k > 0) lists.cutAt(Mass(p.top_k), true, false);
  // At top_p 1 the rounding of the sum must not cost the last tokens.
  if (p.top_p < 1) {
    lists.cutAt(static_cast<Mass>(ceil(double{p.top_p} * static_cast<double>(lists.total()))),
                false, false);
  }
  if (p.min_p > 0) lists.keepAtLeast(double{p.min_p} * static_cast<double>(Mass{1} << unitBits));
  const double target = double{uniform} * static_cast<double>(lists.total());
  return idOf(lists.cutAt(static_cast<Mass>(target), false, true));
}

__global__ void __launch_bounds__(kPivots* kMostLanes)
    chooseTokens(ec_sample args, Scratch scratch) {
  __shared__ Exchange x;
  const int row = blockIdx.x, blocks = scratch.blocks;
  const ec_sampling p = args.params[row];
  const Part* parts = scratch.parts + int64_t(row) * blocks;
  const float top = rowTop(x.values, parts, blocks);
  const LogSum norm = logSum(x, parts, blocks);
  int token = -1;
  if (isGreedy(p, top)) {
    int id = args.vocab;
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) {
      if (parts[b].top == top) id = min(id, parts[b].id);
    }
    id = blockReduce(x.ids, id, Least());
    if (top > -INFINITY) token = id;
  } else {
    int* shared = dynamicShared<int>();
    const int64_t first = int64_t(row) * blocks;
    Lists lists{x,
                scratch.order + first * scratch.stride,
                scratch.sums + first * scratch.stride,
                blocks,
                scratch.stride,
                shared,
                shared + blocks,
                shared + 2 * blocks};
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) lists.kept[b] = scratch.kept[first + b];
    __syncthreads();
    token = drawToken(p, args.uniform[row], scratch.unitBits, lists);
  }
  if (threadIdx.x == 0) {
    args.token[row] = token;
    if (token >= 0) {
      args.logprob[row] = args.logits[int64_t(row) * args.vocab + token] - norm.top - norm.log;
    }
  }
}

}  // namespace

ec_status sampleWorkspace(const ec_step& step, const ec_sample& args, size_t* bytes) {
  EC_TRY(checkSampleShape(step, args));
  Arena arena;
  Scratch(arena, step, args);
  *bytes = arena.bytes();
  return EC_OK;
}

ec_status sample(ec_stream stream, const ec_step& step, const ec_sample& args) {
  EC_TRY(checkSampleShape(step, args));
  EC_TRY(checkSamplePointers(args));
  Arena arena(step);
  const Scratch scratch(arena, step, args);
  EC_TRY(arena.status("sample"));
  const dim3 grid(scratch.blocks, step.n_out);
  const int lanes = scratch.blocks > kWarp ? kMostLanes : kWarp;
  const size_t lists = (2 + kPivots) * sizeof(int) * scratch.blocks;
  EC_TRY(launch("sample", readLogits, grid, kThreads, 0, stream, args, scratch));
  EC_TRY(launch("sample", orderTokens, grid, kThreads, 0, stream, args, scratch));
  return launch("sample", chooseTokens, dim3(step.n_out), kPivots * lanes, lists, stream, args,
                scratch);
}

}  // namespace ec::cuda
