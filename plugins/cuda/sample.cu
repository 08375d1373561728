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
// One CTA a row, and no sort. p over p_max is an integer in units of 2^-40, so that sums are exact
// in any order of the threads; tokens below one unit cannot be drawn and are left out first. A
// place in the order is found as radix select does: four times 8 bits of the score, by counts or by
// sums. A NaN is never chosen; a row without a token to choose gets -1. Bound: a few passes over
// vocab. Reference: edgecascade/sampling.py   Test: tests/test_sample_kernels.py
#include "kernels.h"
#include "platform.h"

namespace ec::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarp;
constexpr float kUnits = 1099511627776.f;  // 2^40

using Mass = unsigned long long;

struct Candidate {
  uint32_t key;  // smaller for larger scores
  int32_t id;
};

struct Scratch {
  float* scores;          // [n_out][vocab] penalised
  Candidate* candidates;  // [n_out][vocab] ids ascending
  Scratch(Arena& arena, const ec_step& step, const ec_sample& args)
      : scores(arena.take<float>(int64_t(step.n_out) * args.vocab)),
        candidates(arena.take<Candidate>(int64_t(step.n_out) * args.vocab)) {}
};

__device__ __forceinline__ uint32_t keyOf(float score) {
  const uint32_t bits = __float_as_uint(score == 0.f ? 0.f : score);  // -0 equals 0
  return bits >> 31 ? bits : ~(bits | 0x80000000u);
}
__device__ __forceinline__ float scoreOf(uint32_t key) {
  return __uint_as_float(key >> 31 ? key : ~key & 0x7fffffffu);
}

// What the threads of a CTA tell each other.
struct Exchange {
  float values[kWarps];
  int ids[kWarps];
  Mass masses[kWarps];
  Mass mass[256];
  unsigned count[256];
  int bucket;
  Mass target;
  int found;
};

__device__ float blockMax(Exchange& x, float value) {
  value = warpMax(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) x.values[threadIdx.x / kWarp] = value;
  __syncthreads();
  float top = x.values[0];
  for (int w = 1; w < kWarps; ++w) top = fmaxf(top, x.values[w]);
  return top;
}

template <class T>
__device__ T blockSum(T* parts, T value) {
  value = warpSum(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  T sum = parts[0];
  for (int w = 1; w < kWarps; ++w) sum += parts[w];
  return sum;
}

// The lowest id that has the largest score.
__device__ int blockArgmax(Exchange& x, const float* scores, int vocab, float top) {
  int id = vocab;
  for (int i = threadIdx.x; i < vocab; i += kThreads) {
    if (scores[i] == top && i < id) id = i;
  }
  for (int bits = 16; bits > 0; bits >>= 1) id = min(id, __shfl_xor_sync(kAll, id, bits));
  __syncthreads();
  if (threadIdx.x % kWarp == 0) x.ids[threadIdx.x / kWarp] = id;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) id = min(id, x.ids[w]);
  return id;
}

// The candidates of a row, and which of them are still kept: a prefix of the order, above a mass.
struct Ranking {
  Exchange& x;
  Candidate* candidates;
  int count;
  float top, temperature;
  uint32_t lastKey;
  int lastId;
  Mass least;

  __device__ Mass massOf(uint32_t key) const {
    return static_cast<Mass>(expf((scoreOf(key) - top) / temperature) * kUnits);
  }
  __device__ bool keeps(const Candidate& c, Mass mass) const {
    return (c.key < lastKey || (c.key == lastKey && c.id <= lastId)) && mass >= least;
  }
  __device__ Mass total() const {
    Mass sum = 0;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const Mass mass = massOf(candidates[i].key);
      if (keeps(candidates[i], mass)) sum += mass;
    }
    return blockSum(x.masses, sum);
  }

  // The first kept candidate at which the sum, or the count, reaches `target`; exceeds it if
  // `exceed`. Makes it the last one that is kept.
  __device__ void cutAt(Mass target, bool byCount, bool exceed) {
    uint32_t prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = threadIdx.x; i < 256; i += kThreads) {
        x.mass[i] = 0;
        x.count[i] = 0;
      }
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const Candidate c = candidates[i];
        const Mass mass = massOf(c.key);
        const bool same = shift == 24 || c.key >> (shift + 8) == prefix;
        if (!same || !keeps(c, mass)) continue;
        atomicAdd(&x.mass[c.key >> shift & 255], byCount ? Mass{1} : mass);
        atomicAdd(&x.count[c.key >> shift & 255], 1u);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        int bucket = -1;
        for (int i = 0; i < 256; ++i) {
          if (x.count[i] == 0) continue;
          bucket = i;  // the last that holds any, if rounding puts the target behind them all
          if (exceed ? x.mass[i] > target : x.mass[i] >= target) break;
          target -= x.mass[i] < target ? x.mass[i] : target;
        }
        x.bucket = bucket;
        x.target = target;
      }
      __syncthreads();
      target = x.target;
      prefix = prefix << 8 | static_cast<uint32_t>(x.bucket);
      __syncthreads();
    }
    // Among equal scores the ids decide: rank is how many of them come before.
    const Mass each = byCount ? 1 : massOf(prefix);
    Mass rank = 0;
    if (each > 0) rank = exceed ? target / each : target > 0 ? (target - 1) / each : 0;
    const Mass equals = x.count[prefix & 255];
    cutAtEqual(prefix, static_cast<int>(rank < equals ? rank : equals - 1));
  }

  // Candidates are in the order of their ids: each warp counts its stretch, then one finds the
  // place.
  __device__ void cutAtEqual(uint32_t key, int rank) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int stretch = ceilDiv(ceilDiv(count, kWarps), kWarp) * kWarp;
    const int from = warp * stretch, to = min(count, from + stretch);
    int mine = 0;
    for (int i = from; i < to; i += kWarp) {
      const bool equal = i + lane < to && isKept(i + lane, key);
      mine += __popc(__ballot_sync(kAll, equal));
    }
    __syncthreads();
    if (lane == 0) x.ids[warp] = mine;
    __syncthreads();
    int before = 0;
    for (int w = 0; w < warp; ++w) before += x.ids[w];
    for (int i = from; i < to; i += kWarp) {
      const bool equal = i + lane < to && isKept(i + lane, key);
      const unsigned bits = __ballot_sync(kAll, equal);
      if (equal && before + __popc(bits & ((1u << lane) - 1)) == rank)
        x.found = candidates[i + lane].id;
      before += __popc(bits);
    }
    __syncthreads();
    lastKey = key;
    lastId = x.found;
    __syncthreads();
  }
  __device__ bool isKept(int i, uint32_t key) const {
    return candidates[i].key == key && keeps(candidates[i], massOf(key));
  }
};

// Those that may be drawn, ids ascending; how many.
__device__ int collect(Exchange& x, const float* scores, int vocab, float top, float temperature,
                       Candidate* candidates) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int stretch = ceilDiv(ceilDiv(vocab, kWarps), kWarp) * kWarp;
  const int from = warp * stretch, to = min(vocab, from + stretch);
  const auto counts = [&](int i) {
    return i < to && expf((scores[i] - top) / temperature) * kUnits >= 1.f;
  };
  int mine = 0;
  for (int i = from; i < to; i += kWarp) mine += __popc(__ballot_sync(kAll, counts(i + lane)));
  __syncthreads();
  if (lane == 0) x.ids[warp] = mine;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += x.ids[w];
    all += x.ids[w];
  }
  for (int i = from; i < to; i += kWarp) {
    const bool counted = counts(i + lane);
    const unsigned bits = __ballot_sync(kAll, counted);
    if (counted) {
      candidates[before + __popc(bits & ((1u << lane) - 1))] = {keyOf(scores[i + lane]), i + lane};
    }
    before += __popc(bits);
  }
  __syncthreads();
  return all;
}

__global__ void __launch_bounds__(kThreads) sampleRows(ec_sample args, Scratch scratch) {
  __shared__ Exchange x;
  const int row = blockIdx.x, vocab = args.vocab;
  const ec_sampling p = args.params[row];
  const float* logits = args.logits + int64_t(row) * vocab;
  float* scores = scratch.scores + int64_t(row) * vocab;
  float raw = -INFINITY;
  for (int i = threadIdx.x; i < vocab; i += kThreads) {
    const float v = logits[i] > -INFINITY ? logits[i] : -INFINITY;  // NaN, too
    scores[i] = v;
    raw = fmaxf(raw, v);
  }
  raw = blockMax(x, raw);
  float sum = 0.f;
  for (int i = threadIdx.x; i < vocab; i += kThreads) {
    if (scores[i] > -INFINITY) sum += expf(scores[i] - raw);
  }
  const float norm = raw + logf(blockSum(x.values, sum));
  for (int i = threadIdx.x; i < p.n_seen; i += kThreads) {
    float score = scores[p.seen[i]];
    score = score > 0 ? score / p.repetition : score * p.repetition;
    if (p.count[i] > 0) score -= p.presence;
    scores[p.seen[i]] = score - p.frequency * static_cast<float>(p.count[i]);
  }
  __syncthreads();
  float top = -INFINITY;
  for (int i = threadIdx.x; i < vocab; i += kThreads) top = fmaxf(top, scores[i]);
  top = blockMax(x, top);
  int token = top > -INFINITY ? blockArgmax(x, scores, vocab, top) : -1;
  if (token >= 0 && p.temperature > 0 && top < INFINITY) {
    Candidate* candidates = scratch.candidates + int64_t(row) * vocab;
    const int count = collect(x, scores, vocab, top, p.temperature, candidates);
    Ranking ranking{x, candidates, count, top, p.temperature, ~0u, vocab, 0};
    if (p.top_k > 0 && p.top_k < count) ranking.cutAt(Mass(p.top_k), true, false);
    // At top_p 1 the rounding of the sum must not cost the last tokens.
    if (p.top_p < 1) {
      ranking.cutAt(static_cast<Mass>(double{p.top_p} * static_cast<double>(ranking.total())),
                    false, false);
    }
    if (p.min_p > 0) ranking.least = static_cast<Mass>(p.min_p * kUnits);
    ranking.cutAt(
        static_cast<Mass>(double{args.uniform[row]} * static_cast<double>(ranking.total())), false,
        true);
    token = ranking.lastId;
  }
  if (threadIdx.x == 0) {
    args.token[row] = token;
    if (token >= 0) args.logprob[row] = logits[token] - norm;
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
  return launch("sample", sampleRows, dim3(step.n_out), kThreads, 0, stream, args, scratch);
}

}  // namespace ec::cuda
