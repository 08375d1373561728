// SPDX-License-Identifier: Apache-2.0
//
// Mixture of experts, from the norm to the residual.
//
//   h = norm(x),  score = sigmoid(router h),  choice = score + bias
//   y = x + sum over the chosen e, ascending, of weight_e down_e relu2(up_e h) + shared_down
//   relu2(shared_up h)
//
//   x, y [n_tok][d] float32, router [experts][d] float32, up [experts][ff][d] and down
//   [experts][d][ff] of any type
//
// Tokens are sorted by expert, so that each expert's weights are read once, in three regions:
// scores; up, whose units of 64 rows turn their results into one int8 group at once; down, whose
// units own 32 outputs of every token and add the experts in ascending order. So a token's result
// does not depend on the rest of the batch. Bound: memory up to a few tokens per expert, then the
// integer dot product. Reference: edgecascade/backends/reference.py  Test:
// tests/test_moe_kernels.py
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "matmul.h"

namespace ec::EC_ISA {

namespace {

constexpr int kRouterTokens = 16;   // per unit of work, when there are many
constexpr int kRouterExperts = 4;   // per unit of work, when there are few
constexpr int kStagedTokens = 256;  // x 64 hidden values per thread
constexpr int kDownUnits = 12;      // per thread at least, for an even end
static_assert(kStagedTokens * kGroup * sizeof(float) <= Pool::kScratchBytes);

struct Scratch {
  int64_t slots;   // (token, choice) pairs
  float* scores;   // [n_tok][experts]
  float* choices;  // [n_tok][experts]
  int32_t* start;  // [experts + 1] first slot of each expert, slots sorted by expert, then by token
  int32_t* active;    // [experts] those with a token
  int32_t* tokens;    // [slots]
  float* weights;     // [slots]
  int32_t* iota;      // [max(slots, n_tok)] 0, 1, 2, ..
  ActsBuffer x;       // [n_tok][d]
  ActsBuffer routed;  // [slots][ff]
  ActsBuffer shared;  // [n_tok][shared_ff]
  float* sums;        // [blocks of 32 outputs][n_tok][32]

  static ActsBuffer acts(Arena& arena, int64_t rows, const ec_weight& w) {
    return ActsBuffer(arena, rows, w.k, !isBlockType(w.type), isBlockType(w.type));
  }
  static bool usesBlocks(const ec_moe& args) {
    return isBlockType(args.up.type) || (args.shared_up.data && isBlockType(args.shared_up.type));
  }

  Scratch(Arena& arena, const ec_step& step, const ec_moe& args)
      : slots(int64_t{step.n_tok} * args.top_k),
        scores(arena.take<float>(int64_t{step.n_tok} * args.up.experts)),
        choices(arena.take<float>(int64_t{step.n_tok} * args.up.experts)),
        start(arena.take<int32_t>(args.up.experts + 1)),
        active(arena.take<int32_t>(args.up.experts)),
        tokens(arena.take<int32_t>(slots)),
        weights(arena.take<float>(slots)),
        iota(arena.take<int32_t>(slots)),
        x(arena, step.n_tok, args.up.k, true, usesBlocks(args)),
        routed(acts(arena, slots, args.down)),
        shared(acts(arena, args.shared_up.data ? step.n_tok : 0, args.shared_down)),
        sums(arena.take<float>(roundUp<int64_t>(args.down.n, kBlockRows) * step.n_tok)) {}
};

ec_status checkForcedIds(const ec_moe& args, int64_t slots) {
  for (int64_t i = 0; i < slots; ++i) {
    if (args.ids[i] < 0 || args.ids[i] >= args.up.experts) {
      return fail(EC_INVALID, "moe: forced ids[%d][%d] is %d, outside 0..%d",
                  static_cast<int>(i / args.top_k), static_cast<int>(i % args.top_k), args.ids[i],
                  args.up.experts - 1);
    }
  }
  return EC_OK;
}

// scores[t][e] = sigmoid(router[e] . h[t]) for some tokens and some experts.
void scoreTile(const ec_moe& args, const Scratch& s, int64_t firstToken, int64_t lastToken,
               int64_t firstExpert, int64_t lastExpert) {
  const int64_t d = args.up.k, experts = args.up.experts;
  alignas(64) float out[kFloatTileTokens * kBlockRows];
  const auto tile = [&](auto width, int64_t token, int64_t expert, int count) {
    constexpr int M = decltype(width)::value;
    const float* x[M];
    for (int m = 0; m < M; ++m) x[m] = s.x.f + (token + m) * d;
    floatTile<M>(args.router + expert * d, count, d, x, out);
    for (int m = 0; m < M; ++m) {
      for (int r = 0; r < count; ++r) {
        s.scores[(token + m) * experts + expert + r] =
            1.f / (1.f + std::exp(-out[m * kBlockRows + r]));
      }
    }
  };
  for (int64_t e = firstExpert; e < lastExpert; e += kRouterExperts) {
    const int count = static_cast<int>(std::min<int64_t>(kRouterExperts, lastExpert - e));
    int64_t t = firstToken;
    for (; t + kFloatTileTokens <= lastToken; t += kFloatTileTokens) {
      tile(std::integral_constant<int, kFloatTileTokens>(), t, e, count);
    }
    for (; t < lastToken; ++t) tile(std::integral_constant<int, 1>(), t, e, count);
  }
}

void score(Pool& pool, const ec_moe& args, const Scratch& s, int64_t tokens) {
  const int64_t experts = args.up.experts;
  if (tokens >= kRouterTokens * int64_t{pool.threads()}) {
    pool.parallelFor((tokens + kRouterTokens - 1) / kRouterTokens, [&](int64_t unit, int) {
      const int64_t first = unit * kRouterTokens;
      scoreTile(args, s, first, std::min(tokens, first + kRouterTokens), 0, experts);
    });
    return;
  }
  pool.parallelFor((experts + kRouterExperts - 1) / kRouterExperts, [&](int64_t unit, int) {
    const int64_t first = unit * kRouterExperts;
    scoreTile(args, s, 0, tokens, first, std::min(experts, first + kRouterExperts));
  });
}

// Sum of the two largest of n values; the value itself when there is one.
float topTwo(const float* values, int64_t n) {
  float first = values[0], second = -std::numeric_limits<float>::infinity();
  for (int64_t i = 1; i < n; ++i) {
    second = std::max(second, std::min(first, values[i]));
    first = std::max(first, values[i]);
  }
  return n > 1 ? first + second : first;
}

// Sets the choices of all groups but the topk_group best to NaN.
void dropGroups(const ec_moe& args, float* choices) {
  const int64_t size = args.up.experts / args.n_group;
  const float dropped = std::numeric_limits<float>::quiet_NaN();
  for (int drop = args.n_group - args.topk_group; drop > 0; --drop) {
    int64_t worst = -1;
    float worstScore = 0;
    for (int64_t g = 0; g < args.n_group; ++g) {
      if (std::isnan(choices[g * size])) continue;
      const float total = topTwo(choices + g * size, size);
      if (worst < 0 || total <= worstScore) {  // of equal groups the later one goes
        worst = g;
        worstScore = total;
      }
    }
    std::fill_n(choices + worst * size, size, dropped);
  }
}

// ids and weights of token t.
void chooseExperts(const ec_moe& args, const Scratch& s, int64_t t) {
  const int64_t experts = args.up.experts;
  const float* scores = s.scores + t * experts;
  float* choices = s.choices + t * experts;
  for (int64_t e = 0; e < experts; ++e) {
    const float choice = scores[e] + args.bias[e];
    choices[e] =
        std::isnan(choice) ? -std::numeric_limits<float>::infinity() : choice;  // chosen last
  }
  if (args.topk_group < args.n_group) dropGroups(args, choices);
  int32_t* ids = args.ids + t * args.top_k;
  for (int i = 0; i < args.top_k; ++i) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (!std::isnan(choices[e]) && (best < 0 || choices[e] > choices[best])) best = e;
    }
    ids[i] = static_cast<int32_t>(best);
    choices[best] = std::numeric_limits<float>::quiet_NaN();
  }
  std::sort(ids, ids + args.top_k);
  float* weights = args.weights + t * args.top_k;
  float total = 0.f;
  for (int i = 0; i < args.top_k; ++i) total += scores[ids[i]];
  const float divisor = args.normalize ? total + 1e-20f : 1.f;
  for (int i = 0; i < args.top_k; ++i) weights[i] = scores[ids[i]] / divisor * args.scale;
}

// Counting sort of the slots by expert. Returns how many experts have a token.
int64_t sortByExpert(const ec_moe& args, const Scratch& s, int64_t tokens) {
  const int64_t slots = tokens * args.top_k, experts = args.up.experts;
  std::fill_n(s.start, experts + 1, 0);
  for (int64_t i = 0; i < slots; ++i) ++s.start[args.ids[i] + 1];
  int64_t active = 0;
  for (int32_t e = 0; e < experts; ++e) {
    if (s.start[e + 1] > 0) s.active[active++] = e;
    s.start[e + 1] += s.start[e];
  }
  for (int64_t i = 0; i < slots; ++i) {
    const int32_t slot = s.start[args.ids[i]]++;
    s.tokens[slot] = static_cast<int32_t>(i / args.top_k);
    s.weights[slot] = args.weights[i];
  }
  for (int64_t e = experts; e > 0; --e)
    s.start[e] = s.start[e - 1];  // each start had moved to the next one's
  s.start[0] = 0;
  return active;
}

// 64 hidden values of m tokens: relu2(up h), as one group of the activations of down.
void upGroup(const Matrix& up, int64_t group, const Acts& x, const int32_t* rows, int64_t m,
             const ActsBuffer& hidden, int64_t firstRow, float* staged) {
  for (int64_t first = 0; first < m; first += kStagedTokens) {
    const int64_t count = std::min<int64_t>(kStagedTokens, m - first);
    for (int half = 0; half < 2; ++half) {
      const int64_t b = 2 * group + half;
      const int valid = b < up.blockRows() ? up.rowsIn(b) : 0;
      if (valid < kBlockRows) {
        for (int64_t i = 0; i < count; ++i)
          std::fill_n(staged + i * kGroup + half * kBlockRows, kBlockRows, 0.f);
      }
      if (valid == 0) continue;
      multiply(up, b, x, rows + first, count, [&](int64_t at, int tile, const float* out) {
        for (int i = 0; i < tile; ++i, out += kBlockRows) {
          float* to = staged + (at + i) * kGroup + half * kBlockRows;
          for (int r = 0; r < valid; ++r) to[r] = activate(EC_RELU2, out[r]);
        }
      });
    }
    const int64_t column = group * kGroup, width = std::min<int64_t>(kGroup, up.n - column);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = firstRow + first + i, at = row * hidden.groups + group;
      if (hidden.f) std::copy_n(staged + i * kGroup, width, hidden.f + row * hidden.k + column);
      if (hidden.q) {
        quantizeGroup(staged + i * kGroup, hidden.q + at * kGroup, hidden.scale + at,
                      hidden.correction + at);
      }
    }
  }
}

void up(Pool& pool, const ec_moe& args, const Scratch& s, int64_t tokens, int64_t active) {
  const Acts x = s.x.acts();
  const int64_t groups = s.routed.groups, sharedGroups = args.shared_up.data ? s.shared.groups : 0;
  pool.parallelFor(sharedGroups + active * groups, [&](int64_t unit, int thread) {
    float* staged = reinterpret_cast<float*>(pool.scratch(thread));
    if (unit < sharedGroups) {
      upGroup(Matrix(args.shared_up), unit, x, s.iota, tokens, s.shared, 0, staged);
      return;
    }
    unit -= sharedGroups;
    const int32_t expert = s.active[unit / groups], first = s.start[expert];
    upGroup(Matrix(args.up, expert), unit % groups, x, s.tokens + first,
            s.start[expert + 1] - first, s.routed, first, staged);
  });
}

// Adds one expert's weighted results to sums[token][32] of block row b.
void addExpert(const ec_moe& args, const Scratch& s, const Acts& hidden, int32_t expert, int64_t b,
               float* sums) {
  const int32_t first = s.start[expert], count = s.start[expert + 1] - first;
  const auto add = [&](int64_t at, int tile, const float* out) {
    for (int m = 0; m < tile; ++m, out += kBlockRows) {
      const int64_t slot = first + at + m;
      float* sum = sums + s.tokens[slot] * kBlockRows;
      for (int r = 0; r < kBlockRows; ++r) sum[r] += s.weights[slot] * out[r];
    }
  };
  multiply(Matrix(args.down, expert), b, hidden, s.iota + first, count, add);
}

void addShared(const ec_moe& args, const Scratch& s, int64_t tokens, int64_t b, float* sums) {
  const auto add = [&](int64_t at, int tile, const float* out) {
    for (int i = 0; i < tile * kBlockRows; ++i) sums[at * kBlockRows + i] += out[i];
  };
  multiply(Matrix(args.shared_down), b, s.shared.acts(), s.iota, tokens, add);
}

void down(Pool& pool, const ec_moe& args, const Scratch& s, int64_t tokens, int64_t active) {
  const int64_t d = args.down.n, blockRows = Matrix(args.down).blockRows();
  // Neighbouring block rows of an expert are one stretch of memory and share its activations.
  const int64_t run = std::clamp<int64_t>(blockRows / (kDownUnits * pool.threads()), 1, 4);
  pool.parallelFor((blockRows + run - 1) / run, [&](int64_t unit, int) {
    const int64_t firstRow = unit * run, lastRow = std::min(blockRows, firstRow + run);
    const auto sumsOf = [&](int64_t b) { return s.sums + b * tokens * kBlockRows; };
    std::fill(sumsOf(firstRow), sumsOf(lastRow), 0.f);
    for (int64_t i = 0; i < active; ++i) {
      if (i + 1 < active) prefetchStart(Matrix(args.down, s.active[i + 1]), firstRow);
      for (int64_t b = firstRow; b < lastRow; ++b) {
        addExpert(args, s, s.routed.acts(), s.active[i], b, sumsOf(b));
      }
    }
    for (int64_t b = firstRow; b < lastRow; ++b) {
      if (args.shared_down.data) addShared(args, s, tokens, b, sumsOf(b));
      const int valid = Matrix(args.down).rowsIn(b);
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t at = t * d + b * kBlockRows;
        const float* sum = sumsOf(b) + t * kBlockRows;
        for (int r = 0; r < valid; ++r) args.y[at + r] = args.x[at + r] + sum[r];
      }
    }
  });
}

}  // namespace

ec_status moeWorkspace(const ec_step& step, const ec_moe& args, size_t* bytes) {
  EC_TRY(checkMoeShape(step, args));
  Arena arena;
  Scratch scratch(arena, step, args);
  *bytes = arena.bytes();
  return EC_OK;
}

ec_status moe(Pool& pool, const ec_step& step, const ec_moe& args) {
  EC_TRY(checkMoeShape(step, args));
  EC_TRY(checkStep("moe", step));
  EC_TRY(checkMoePointers(args));
  Arena arena(step);
  Scratch s(arena, step, args);
  EC_TRY(arena.status("moe"));

  const int64_t tokens = liveTokens(step), slots = tokens * args.top_k, d = args.up.k;
  if (args.force) EC_TRY(checkForcedIds(args, slots));
  if (tokens == 0) return EC_OK;
  for (int64_t i = 0; i < slots; ++i) s.iota[i] = static_cast<int32_t>(i);
  pool.parallelFor(tokens, [&](int64_t t, int) { prepareRow(args.x + t * d, args.norm, s.x, t); });
  if (!args.force) {
    score(pool, args, s, tokens);
    pool.parallelFor(tokens, [&](int64_t t, int) { chooseExperts(args, s, t); });
  }
  const int64_t active = sortByExpert(args, s, tokens);
  up(pool, args, s, tokens, active);
  down(pool, args, s, tokens, active);
  return EC_OK;
}

}  // namespace ec::EC_ISA
