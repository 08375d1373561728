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
// A NaN is never chosen. Sums are double: at float precision one draw in a hundred over 131072
// tokens would differ from the definition. No sort of the vocabulary: cumulative sums are located
// by halving with nth_element. Bound: memory and exp, a few passes over vocab. Reference:
// edgecascade/sampling.py   Test: tests/test_sample_kernels.py
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "sequences.h"
#include "simd.h"

namespace ec::EC_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // logits of one unit of the first pass
constexpr int64_t kRun = 512;     // logits summed in float before they join a double
// Below e^-60 of the largest, 2^31 tokens together do not reach the last bit of a double's sum.
constexpr double kNegligible = 60.0;

struct Token {
  double mass;
  float score;
  int32_t id;
};

bool before(const Token& a, const Token& b) {
  return a.score > b.score || (a.score == b.score && a.id < b.id);
}

struct BlockSum {
  float max;   // of the raw logits that are numbers
  double sum;  // of exp(logit - max)
};

struct Scratch {
  int64_t blocks;
  float* scores;      // [n_out][vocab] logits, NaN replaced by -inf, penalised
  Token* tokens;      // [n_out][vocab]
  uint8_t* buckets;   // [n_out][vocab]
  BlockSum* partial;  // [n_out][blocks]

  Scratch(Arena& arena, const ec_step& step, const ec_sample& args)
      : blocks((args.vocab + kBlock - 1) / kBlock),
        scores(arena.take<float>(int64_t{step.n_out} * args.vocab)),
        tokens(arena.take<Token>(int64_t{step.n_out} * args.vocab)),
        buckets(arena.take<uint8_t>(int64_t{step.n_out} * args.vocab)),
        partial(arena.take<BlockSum>(step.n_out * blocks)) {}
};

ec_status checkRow(const ec_sample& args, int32_t row) {
  const ec_sampling& p = args.params[row];
  const auto refuse = [row](const char* field, double value, const char* range) {
    return fail(EC_INVALID, "sample: params[%d].%s is %g, must be %s", row, field, value, range);
  };
  if (!(p.temperature >= 0 && std::isfinite(p.temperature))) {
    return refuse("temperature", p.temperature, "finite and at least 0");
  }
  if (!(p.top_p > 0 && p.top_p <= 1)) return refuse("top_p", p.top_p, "in (0, 1]");
  if (!(p.min_p >= 0 && p.min_p <= 1)) return refuse("min_p", p.min_p, "in [0, 1]");
  if (!(p.repetition > 0 && std::isfinite(p.repetition))) {
    return refuse("repetition", p.repetition, "finite and above 0");
  }
  if (!std::isfinite(p.presence)) return refuse("presence", p.presence, "finite");
  if (!std::isfinite(p.frequency)) return refuse("frequency", p.frequency, "finite");
  if (p.top_k < 0) return refuse("top_k", p.top_k, "at least 0");
  if (p.n_seen < 0) return refuse("n_seen", p.n_seen, "at least 0");
  if (!(args.uniform[row] >= 0 && args.uniform[row] < 1)) {
    return fail(EC_INVALID, "sample: uniform[%d] is %g, must be in [0, 1)", row, args.uniform[row]);
  }
  if (p.n_seen > 0) {
    EC_TRY(checkPointer("sample", "params.seen", p.seen));
    EC_TRY(checkPointer("sample", "params.count", p.count));
  }
  for (int32_t i = 0; i < p.n_seen; ++i) {
    if (p.seen[i] < 0 || p.seen[i] >= args.vocab) {
      return fail(EC_INVALID, "sample: params[%d].seen[%d] is %d, the vocabulary has %d tokens",
                  row, i, p.seen[i], args.vocab);
    }
  }
  return EC_OK;
}

// Copies a block of logits with NaN as -inf; its largest value and the sum of exp below it.
BlockSum readBlock(const float* logits, int64_t count, float* scores) {
  const Vec lowest = set(-INFINITY);
  Vec top = lowest;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Vec v = max(load(logits + i), lowest);
    store(scores + i, v);
    top = max(v, top);
  }
  float largest = reduceMax(top);
  for (; i < count; ++i) {
    scores[i] = logits[i] > -INFINITY ? logits[i] : -INFINITY;
    largest = scores[i] > largest ? scores[i] : largest;
  }
  if (!std::isfinite(largest)) return {largest, largest > 0 ? 1.0 : 0.0};
  double sum = 0;
  for (int64_t from = 0; from < count; from += kRun) {
    const int64_t end = from + kRun < count ? from + kRun : count;
    Vec run = zero();
    for (i = from; i + kWidth <= end; i += kWidth) {
      run = run + exp(load(scores + i) - set(largest));
    }
    sum += reduceAdd(run);
    for (; i < end; ++i) sum += exp(scores[i] - largest);
  }
  return {largest, sum};
}

double logSumExp(const BlockSum* partial, int64_t blocks) {
  float largest = -INFINITY;
  for (int64_t b = 0; b < blocks; ++b) largest = std::max(largest, partial[b].max);
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (partial[b].sum > 0) sum += partial[b].sum * std::exp(double{partial[b].max} - largest);
  }
  return largest + std::log(sum);
}

void penalise(const ec_sampling& p, float* scores) {
  if (p.repetition == 1 && p.presence == 0 && p.frequency == 0) return;
  for (int32_t i = 0; i < p.n_seen; ++i) {
    float& score = scores[p.seen[i]];
    score = score > 0 ? score / p.repetition : score * p.repetition;
    if (p.count[i] > 0) score -= p.presence;
    score -= p.frequency * static_cast<float>(p.count[i]);
  }
}

// The first index of the largest score; -1 if all are -inf.
int64_t argmax(const float* scores, int64_t count) {
  Vec top = set(-INFINITY);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) top = max(load(scores + i), top);
  float largest = reduceMax(top);
  for (; i < count; ++i) largest = scores[i] > largest ? scores[i] : largest;
  if (largest == -INFINITY) return -1;
  for (i = 0; i + kWidth <= count && !anyEqual(load(scores + i), set(largest));) i += kWidth;
  while (scores[i] != largest) ++i;
  return i;
}

// exp(x) in double for -100 <= x <= 0, within 4e-16: plain arithmetic that the compiler turns into
// vectors, which the library's exp is not.
inline double expBelow(double x) {
  constexpr double kRound =
      6755399441055744.0;  // 1.5 * 2^52: adding it leaves the nearest integer in the low bits
  const double shifted = x * 1.4426950408889634 + kRound, n = shifted - kRound;
  const double r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
  double p = 1.0 / 6227020800.0;
  for (const double over : {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0,
                            120.0, 24.0, 6.0, 2.0, 1.0, 1.0}) {
    p = p * r + 1.0 / over;
  }
  int64_t power, bits;
  std::memcpy(&power, &shifted, sizeof power);
  std::memcpy(&bits, &p, sizeof bits);
  bits += static_cast<int64_t>(static_cast<uint64_t>(power) << 52);
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

double total(const Token* begin, const Token* end) {
  double sum = 0;
  for (; begin != end; ++begin) sum += begin->mass;
  return sum;
}

// The first token, in order, at which the cumulative mass reaches `target` (or exceeds it). What
// precedes it in order precedes it in memory afterwards.
Token* locate(Token* begin, Token* end, double target, bool exceed) {
  const auto reached = [exceed](double mass, double goal) {
    return exceed ? mass > goal : mass >= goal;
  };
  while (end - begin > 32) {
    Token* middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, before);
    const double mass = total(begin, middle);
    if (reached(mass, target)) {
      end = middle;
    } else {
      target -= mass;
      begin = middle;
    }
  }
  std::sort(begin, end, before);
  for (double mass = 0; begin != end - 1; ++begin) {
    mass += begin->mass;
    if (reached(mass, target)) break;
  }
  return begin;
}

// The tokens of one row in the order of their scores, cut into buckets by score so that no step
// sorts more than one of them. Kept are the buckets below last_ and, of that bucket, the tokens in
// [edge_, end_).
class Ranking {
 public:
  Ranking(const float* scores, int64_t vocab, float largest, float temperature, uint8_t* bucket,
          Token* tokens)
      : scores_(scores),
        vocab_(vocab),
        largest_(largest),
        temperature_(temperature),
        bucket_(bucket),
        edge_(tokens) {
    for (int64_t from = 0; from < vocab; from += kRun) {
      fill(from, from + kRun < vocab ? from + kRun : vocab);
    }
    while (count_[last_] == 0) --last_;
    open(last_);
  }

  void keepCount(int64_t k) {
    int64_t preceding = 0;
    int b = 0;
    while (b < last_ && preceding + count_[b] < k) preceding += count_[b++];
    open(b);
    if (k - preceding >= end_ - edge_) return;
    std::nth_element(edge_, edge_ + (k - preceding), end_, before);
    end_ = edge_ + (k - preceding);
  }
  void keepMass(double share) { end_ = find(share * kept(), false) + 1; }
  void keepAtLeast(double least) {
    for (;;) {
      end_ = std::remove_if(edge_, end_, [least](const Token& t) { return t.mass < least; });
      if (end_ != edge_ || last_ == 0) return;
      // A whole bucket below `least` need not be opened.
      int b = last_ - 1;
      while (b > 0 && (count_[b] == 0 || std::exp(-b / kBucketsPerUnit) < 0.999 * least)) --b;
      open(b);
    }
  }
  int32_t draw(double uniform) { return find(uniform * kept(), true)->id; }

 private:
  static constexpr int kBuckets = 256;
  static constexpr double kBucketsPerUnit = 4.0;
  static constexpr int kDropped = kBuckets - 1;
  static_assert(kNegligible * kBucketsPerUnit < kDropped);

  double exponent(int64_t i) const {
    const double x = (static_cast<double>(scores_[i]) - largest_) / temperature_;
    return x > -100.0 ? x : -100.0;
  }

  void fill(int64_t from, int64_t end) {
    double x[kRun], mass[kRun];
    for (int64_t i = from; i < end; ++i) x[i - from] = exponent(i);
    for (int64_t i = 0; i < end - from; ++i) mass[i] = expBelow(x[i]);
    for (int64_t i = 0; i < end - from; ++i) {
      const int b = x[i] > -kNegligible ? static_cast<int>(x[i] * -kBucketsPerUnit) : kDropped;
      bucket_[from + i] = static_cast<uint8_t>(b);
      mass_[b] += mass[i];
      ++count_[b];
    }
  }

  // Makes b the last bucket, with all its tokens, unless it already is and may have lost some.
  void open(int b) {
    if (b == last_ && end_) return;
    last_ = b;
    end_ = edge_;
    for (int64_t i = 0; i < vocab_; ++i) {
      if (bucket_[i] == b) {
        *end_++ = {expBelow(exponent(i)), scores_[i], static_cast<int32_t>(i)};
      }
    }
  }

  double kept() const {
    double sum = total(edge_, end_);
    for (int b = 0; b < last_; ++b) sum += mass_[b];
    return sum;
  }

  Token* find(double target, bool exceed) {
    int b = 0;
    for (; b < last_; ++b) {
      if (exceed ? mass_[b] > target : mass_[b] >= target) break;
      target -= mass_[b];
    }
    // Rounding may put the target just behind a bucket that holds nothing.
    while (b < last_ && count_[b] == 0) ++b;
    open(b);
    return locate(edge_, end_, target, exceed);
  }

  const float* scores_;
  const int64_t vocab_;
  const double largest_, temperature_;
  uint8_t* bucket_;  // [vocab]
  double mass_[kBuckets] = {};
  int64_t count_[kBuckets] = {};
  int last_ = kDropped - 1;
  Token* edge_;
  Token* end_ = nullptr;
};

int32_t draw(const ec_sampling& p, float uniform, Ranking ranking) {
  if (p.top_k > 0) ranking.keepCount(p.top_k);
  // At top_p 1 the rounding of the sum must not cost the last tokens.
  if (p.top_p < 1) ranking.keepMass(p.top_p);
  if (p.min_p > 0) ranking.keepAtLeast(p.min_p);
  return ranking.draw(uniform);
}

}  // namespace

ec_status sampleWorkspace(const ec_step& step, const ec_sample& args, size_t* bytes) {
  EC_TRY(checkSampleShape(step, args));
  Arena arena;
  Scratch(arena, step, args);
  *bytes = arena.bytes();
  return EC_OK;
}

ec_status sample(Pool& pool, const ec_step& step, const ec_sample& args) {
  EC_TRY(checkSampleShape(step, args));
  EC_TRY(checkSamplePointers(args));
  for (int32_t row = 0; row < step.n_out; ++row) EC_TRY(checkRow(args, row));
  Arena arena(step);
  const Scratch scratch(arena, step, args);
  EC_TRY(arena.status("sample"));

  const int64_t vocab = args.vocab;
  pool.parallelFor(step.n_out * scratch.blocks, [&](int64_t unit, int) {
    const int64_t row = unit / scratch.blocks, from = unit % scratch.blocks * kBlock;
    const int64_t count = from + kBlock < vocab ? kBlock : vocab - from;
    scratch.partial[unit] =
        readBlock(args.logits + row * vocab + from, count, scratch.scores + row * vocab + from);
  });
  pool.parallelFor(step.n_out, [&](int64_t row, int) {
    const ec_sampling& p = args.params[row];
    float* scores = scratch.scores + row * vocab;
    penalise(p, scores);
    int64_t token = argmax(scores, vocab);
    // Beside an infinite logit no other has a probability.
    if (token >= 0 && p.temperature > 0 && scores[token] < INFINITY) {
      const Ranking ranking(scores, vocab, scores[token], p.temperature,
                            scratch.buckets + row * vocab, scratch.tokens + row * vocab);
      token = draw(p, args.uniform[row], ranking);
    }
    args.token[row] = static_cast<int32_t>(token);
    if (token < 0) return;
    const double norm = logSumExp(scratch.partial + row * scratch.blocks, scratch.blocks);
    args.logprob[row] = static_cast<float>(args.logits[row * vocab + token] - norm);
  });
  for (int32_t row = 0; row < step.n_out; ++row) {
    if (args.token[row] < 0) {
      return fail(EC_INVALID,
                  "sample: row %d has no token to choose: all %d logits are NaN or -inf; the mask "
                  "allows nothing, or the weights are damaged",
                  row, args.vocab);
    }
  }
  return EC_OK;
}

}  // namespace ec::EC_ISA
