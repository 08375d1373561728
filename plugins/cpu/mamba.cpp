// SPDX-License-Identifier: Apache-2.0
//
// Mamba-2 from the input projection to the gate. With z | x | B | C | dt = zxbcdt[t] and g = h /
// (heads / groups):
//
//   xBC_t = silu(bias + sum_j conv_weight[j] * xBC_{t - (kernel-1) + j})     x | B | C before the
//   convolution dt    = softplus(dt + dt_bias[h])                                        no clamp
//   S     = exp(dt a[h]) S + (dt x[h]) (x) B[g]                              S [head_dim][state],
//   fp32, in place y     = (S C[g] + d[h] x[h]) * silu(z[h])
//
// Shapes: zxbcdt [n_tok][2 di + 2 groups state + heads], di = heads head_dim; conv
// [slots][kernel][channels], a ring by position; ssm [slots][heads][head_dim][state]; y
// [n_tok][di]. A slot of a new sequence is all zeros.
//
// Bound: the step by memory, 8 bytes a state value; prefill by fp32 arithmetic. Prefill is the
// chunked scan: with cum_l = sum over i <= l of dt_i a, for l, s in one chunk and S0 the state
// before it,
//
//   y_l = exp(cum_l) S0 C_l + sum over s <= l of (C_l . B_s) exp(cum_l - cum_s) dt_s x_s
//   S1  = exp(cum_end) S0 + sum over s of exp(cum_end - cum_s) dt_s x_s (x) B_s
//
// No exponent is above 0, so nothing overflows whatever dt is.
// Reference: edgecascade/backends/reference.py   Test: tests/test_mamba_kernels.py
#include "kernels.h"
#include "sequences.h"
#include "simd.h"
#include "tile.h"

namespace ec::EC_ISA {
namespace {

constexpr int64_t kMaxState = 4096;
constexpr int64_t kMaxChunk = 32;       // measured: 128 costs 20 % more with AVX-512, 9 % with AVX2
constexpr int64_t kMaxPanel = 64;       // columns of a head that one unit of the scan handles
constexpr int64_t kConvChannels = 512;  // channels of one unit of the convolution
constexpr int64_t kPanelFloats = 65536;  // state x panel and state x chunk stay below
static_assert(2 * kPanelFloats * sizeof(float) <= Pool::kScratchBytes, "half is for the chunk");

struct Layout {
  int64_t heads, dim, groups, state, inner, channels, row, kernel;
  explicit Layout(const ec_mamba& a)
      : heads(a.heads),
        dim(a.head_dim),
        groups(a.groups),
        state(a.state),
        inner(heads * dim),
        channels(inner + 2 * groups * state),
        row(inner + channels + heads),
        kernel(a.kernel) {}
  int64_t groupOf(int64_t head) const { return head / (heads / groups); }
};

ec_status checkShape(const char* op, const ec_step& step, const ec_mamba& args) {
  EC_TRY(checkMambaShape(op, step, args));
  if (args.state > kMaxState) {
    return fail(EC_UNSUPPORTED, "%s: state is %d, this backend takes at most %d", op, args.state,
                static_cast<int>(kMaxState));
  }
  return EC_OK;
}

ec_status check(const char* op, const ec_step& step, const ec_mamba& args) {
  EC_TRY(checkShape(op, step, args));
  EC_TRY(checkStep(op, step));
  EC_TRY(checkMambaPointers(op, step, args));
  return checkSequences(op, step);
}

// One unit of the convolution: all tokens of a sequence, `count` channels from `first`. The ring
// rows of a channel are read before they are written, and only here.
void convolve(const ec_step& step, const ec_mamba& args, const Layout& m, int32_t seq,
              int64_t first, int64_t count, float* xbc) {
  const int64_t row0 = step.start[seq], tokens = step.start[seq + 1] - row0, past = step.past[seq];
  float* ring = args.conv + step.slot[seq] * m.kernel * m.channels + first;
  const float* fresh = args.zxbcdt + row0 * m.row + m.inner + first;
  const auto ringRow = [&](int64_t position) {
    return ring + (position + m.kernel) % m.kernel * m.channels;
  };
  for (int64_t t = 0; t < tokens; ++t) {
    const float* tap[kMaxConvKernel];
    for (int64_t j = 0; j < m.kernel; ++j) {
      const int64_t from = t - (m.kernel - 1) + j;
      tap[j] = from >= 0 ? fresh + from * m.row : ringRow(past + from);
    }
    float* out = xbc + (row0 + t) * m.channels + first;
    const auto convolved = [&](int64_t c, auto... lanes) {
      Vec sum = args.conv_bias ? load(args.conv_bias + first + c, lanes...) : zero();
      for (int64_t j = 0; j < m.kernel; ++j) {
        const float* weight = args.conv_weight + j * m.channels + first + c;
        sum = fma(load(weight, lanes...), load(tap[j] + c, lanes...), sum);
      }
      return silu(sum);
    };
    int64_t c = 0;
    for (; c + kWidth <= count; c += kWidth) store(out + c, convolved(c));
    const int rest = static_cast<int>(count - c);
    if (rest > 0) store(out + c, convolved(c, rest), rest);
  }
  for (int64_t t = tokens > m.kernel ? tokens - m.kernel : 0; t < tokens; ++t) {
    std::memcpy(ringRow(past + t), fresh + t * m.row, count * sizeof(float));
  }
}

// Convolution and SiLU of all live rows into xbc [n_tok][channels].
void convolveAll(Pool& pool, const ec_step& step, const ec_mamba& args, const Layout& m,
                 float* xbc) {
  const int64_t blocks = ceilDiv(m.channels, kConvChannels);
  pool.parallelFor(liveSeqs(step) * blocks, [&](int64_t unit, int) {
    const int64_t first = unit % blocks * kConvChannels;
    convolve(step, args, m, static_cast<int32_t>(unit / blocks), first,
             atMost(kConvChannels, m.channels - first), xbc);
  });
}

// y = (y + d x) * silu(z), `count` channels.
void gate(float* y, const float* x, const float* z, float d, int64_t count) {
  const auto gated = [&](int64_t i, auto... lanes) {
    return fma(set(d), load(x + i, lanes...), load(y + i, lanes...)) * silu(load(z + i, lanes...));
  };
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(y + i, gated(i));
  const int rest = static_cast<int>(count - i);
  if (rest > 0) store(y + i, gated(i, rest), rest);
}

// R rows of a head's state: S = decay S + dtx (x) b, y = S c. One pass over the state.
template <int R>
void stepRows(float* s, int64_t state, float decay, const float* dtx, const float* b,
              const float* c, float* y) {
  Vec sum[R], input[R];
  for (int r = 0; r < R; ++r) sum[r] = zero(), input[r] = set(dtx[r]);
  const auto advance = [&](int64_t n, auto... lanes) {
    const Vec bn = load(b + n, lanes...), cn = load(c + n, lanes...);
    for (int r = 0; r < R; ++r) {
      float* at = s + r * state + n;
      const Vec value = fma(set(decay), load(at, lanes...), input[r] * bn);
      store(at, value, lanes...);
      sum[r] = fma(value, cn, sum[r]);
    }
  };
  int64_t n = 0;
  for (; n + kWidth <= state; n += kWidth) advance(n);
  if (n < state) advance(n, static_cast<int>(state - n));
  for (int r = 0; r < R; ++r) y[r] = reduceAdd(sum[r]);
}

// One token of one head.
void stepHead(const ec_step& step, const ec_mamba& args, const Layout& m, int32_t seq, int64_t head,
              const float* xbc) {
  const int64_t row = step.start[seq];
  const float* in = args.zxbcdt + row * m.row;
  const float* x = xbc + row * m.channels + head * m.dim;
  const float* b = xbc + row * m.channels + m.inner + m.groupOf(head) * m.state;
  const float* c = b + m.groups * m.state;
  float* s = args.ssm + (step.slot[seq] * m.heads + head) * m.dim * m.state;
  float* y = args.y + row * m.inner + head * m.dim;
  const float dt = softplus(in[m.row - m.heads + head] + args.dt_bias[head]);
  const float decay = exp(dt * args.a[head]);
  constexpr int kRows = 4;
  int64_t p = 0;
  for (; p + kRows <= m.dim; p += kRows) {
    const float dtx[kRows] = {dt * x[p], dt * x[p + 1], dt * x[p + 2], dt * x[p + 3]};
    stepRows<kRows>(s + p * m.state, m.state, decay, dtx, b, c, y + p);
  }
  for (; p < m.dim; ++p) {
    const float dtx = dt * x[p];
    stepRows<1>(s + p * m.state, m.state, decay, &dtx, b, c, y + p);
  }
  gate(y, x, in + head * m.dim, args.d[head], m.dim);
}

// How the scan cuts its work, and what it keeps for all rows of the step.
struct Scan {
  int64_t chunk;       // tokens
  int64_t chunkWidth;  // the same, padded to a vector
  int64_t panel;       // columns of a head
  int64_t panels;
  float* xbc;     // [n_tok][channels] after convolution and SiLU
  float* scores;  // [n_tok][groups][chunkWidth]: C_l . B_s of the row's chunk, s <= l

  Scan(Arena& arena, const ec_step& step, const ec_mamba& args) {
    const Layout m(args);
    const int64_t fits = kPanelFloats / m.state / 16 * 16;
    chunk = atMost(atMost(args.chunk, kMaxChunk), fits);
    chunkWidth = roundUp<int64_t>(chunk, 16);
    panel = atMost(atMost(roundUp<int64_t>(m.dim, 16), kMaxPanel), fits);
    panels = ceilDiv(m.dim, panel);
    xbc = arena.take<float>(step.n_tok * m.channels);
    scores = arena.take<float>(step.n_tok * m.groups * chunkWidth);
  }
};

// scores[l][s] = C_l . B_s for one chunk and group.
void scoreChunk(const Layout& m, const Scan& scan, int64_t row0, int64_t tokens, int64_t group,
                float* columns) {
  const float* b = scan.xbc + row0 * m.channels + m.inner + group * m.state;
  const float* c = b + m.groups * m.state;
  float* scores = scan.scores + (row0 * m.groups + group) * scan.chunkWidth;
  const int64_t width = roundUp<int64_t>(tokens, kWidth);
  for (int64_t n = 0; n < m.state; ++n) {
    float* to = columns + n * width;
    for (int64_t s = 0; s < tokens; ++s) to[s] = b[s * m.channels + n];
    for (int64_t s = tokens; s < width; ++s) to[s] = 0.0f;
  }
  forTiles(tokens, width, [&](auto tile, int64_t l, int64_t s) {
    if (s >= l + kTileRows) return;  // above the diagonal
    tile.clear();
    tile.multiplyAdd(c + l * m.channels, m.channels, 1, columns + s, width, m.state);
    tile.store(scores + l * m.groups * scan.chunkWidth + s, m.groups * scan.chunkWidth);
  });
}

void scoreAll(Pool& pool, const ec_step& step, const Layout& m, const Scan& scan) {
  const int32_t live = liveSeqs(step);
  int64_t chunks = 0;
  for (int32_t s = 0; s < live; ++s)
    chunks += ceilDiv(step.start[s + 1] - step.start[s], scan.chunk);
  pool.parallelFor(chunks * m.groups, [&](int64_t unit, int thread) {
    int64_t index = unit / m.groups;
    int32_t s = 0;
    for (;; ++s) {
      const int64_t here = ceilDiv(step.start[s + 1] - step.start[s], scan.chunk);
      if (index < here) break;
      index -= here;
    }
    const int64_t row0 = step.start[s] + index * scan.chunk;
    scoreChunk(m, scan, row0, atMost(scan.chunk, step.start[s + 1] - row0), unit % m.groups,
               reinterpret_cast<float*>(pool.scratch(thread)));
  });
}

// The scan of one panel of one head over one sequence, chunk by chunk. All buffers are the thread's
// scratch.
class PanelScan {
 public:
  PanelScan(const ec_mamba& args, const Layout& m, const Scan& scan, int64_t head, int64_t panel,
            std::byte* scratch)
      : args_(args),
        m_(m),
        scan_(scan),
        head_(head),
        group_(m.groupOf(head)),
        first_(panel * scan.panel),
        columns_(atMost(scan.panel, m.dim - first_)),
        width_(roundUp<int64_t>(columns_, kWidth)) {
    float* next = reinterpret_cast<float*>(scratch);
    const auto take = [&](int64_t floats) {
      float* taken = next;
      next += roundUp<int64_t>(floats, 16);
      return taken;
    };
    state_ = take(m.state * width_);
    input_ = take(scan.chunk * width_);
    late_ = take(scan.chunk * width_);
    mix_ = take(kTileRows * scan.chunkWidth);
    cum_ = take(scan.chunkWidth);
    cumLow_ = take(scan.chunkWidth);
    carry_ = take(scan.chunkWidth);
    fade_ = take(scan.chunkWidth);
    dt_ = take(scan.chunkWidth);
  }

  void run(const ec_step& step, int32_t seq) {
    const int64_t slot = step.slot[seq];
    float* stored = args_.ssm + ((slot * m_.heads + head_) * m_.dim + first_) * m_.state;
    for (int64_t n = 0; n < m_.state; ++n) {
      for (int64_t p = 0; p < width_; ++p) {
        state_[n * width_ + p] = p < columns_ ? stored[p * m_.state + n] : 0.0f;
      }
    }
    const int64_t end = step.start[seq + 1];
    for (int64_t row = step.start[seq]; row < end; row += scan_.chunk) {
      const int64_t tokens = atMost(scan_.chunk, end - row);
      decays(row, tokens);
      inputs(row, tokens);
      outputs(row, tokens);
      advance(row, tokens);
    }
    for (int64_t p = 0; p < columns_; ++p) {
      for (int64_t n = 0; n < m_.state; ++n) stored[p * m_.state + n] = state_[n * width_ + p];
    }
  }

 private:
  // cum_l as a sum of two floats: differences of large neighbours then keep their low digits.
  void decays(int64_t row, int64_t tokens) {
    const float* dt = args_.zxbcdt + row * m_.row + m_.row - m_.heads + head_;
    double sum = 0;
    for (int64_t l = 0; l < tokens; ++l) {
      dt_[l] = softplus(dt[l * m_.row] + args_.dt_bias[head_]);
      sum += static_cast<double>(dt_[l]) * args_.a[head_];
      cum_[l] = static_cast<float>(sum);
      cumLow_[l] = static_cast<float>(sum - cum_[l]);
    }
    const Vec high = set(cum_[tokens - 1]), low = set(cumLow_[tokens - 1]);
    for (int64_t l = 0; l < tokens; l += kWidth) {
      store(carry_ + l, exp(load(cum_ + l)));
      store(fade_ + l, exp((high - load(cum_ + l)) + (low - load(cumLow_ + l))));
    }
  }

  // input_[s] = dt_s x_s and late_[s] = exp(cum_end - cum_s) dt_s x_s
  void inputs(int64_t row, int64_t tokens) {
    for (int64_t s = 0; s < tokens; ++s) {
      const float* x = scan_.xbc + (row + s) * m_.channels + head_ * m_.dim + first_;
      float* input = input_ + s * width_;
      float* late = late_ + s * width_;
      for (int64_t p = 0; p < columns_; ++p) {
        input[p] = dt_[s] * x[p];
        late[p] = fade_[s] * input[p];
      }
      for (int64_t p = columns_; p < width_; ++p) input[p] = late[p] = 0.0f;
    }
  }

  // mix_[i][s] = (C_l . B_s) exp(cum_l - cum_s), l = first + i, s <= l
  void mixRows(int64_t row, int64_t first, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t l = first + i;
      const float* scores = scan_.scores + ((row + l) * m_.groups + group_) * scan_.chunkWidth;
      const Vec high = set(cum_[l]), low = set(cumLow_[l]);
      for (int64_t s = 0; s <= l; s += kWidth) {
        const Vec gap = (high - load(cum_ + s)) + (low - load(cumLow_ + s));
        store(mix_ + i * scan_.chunkWidth + s, load(scores + s) * exp(min(zero(), gap)));
      }
    }
  }

  void outputs(int64_t row, int64_t tokens) {
    const float* c = scan_.xbc + row * m_.channels + m_.inner + (m_.groups + group_) * m_.state;
    forTiles(tokens, width_, [&](auto tile, int64_t l, int64_t p) {
      constexpr int kRows = decltype(tile)::kRows;
      if (p == 0) mixRows(row, l, kRows);
      tile.clear();
      tile.multiplyAdd(c + l * m_.channels, m_.channels, 1, state_ + p, width_, m_.state);
      for (int i = 0; i < kRows; ++i) tile.scaleRow(i, carry_[l + i]);
      tile.multiplyAdd(mix_, scan_.chunkWidth, 1, input_ + p, width_, l);
      // The diagonal: row i must not touch later tokens, not even with weight 0, which keeps a NaN.
      for (int i = 0; i < kRows; ++i) {
        for (int s = 0; s <= i; ++s) {
          tile.addRow(i, mix_[i * scan_.chunkWidth + l + s], input_ + (l + s) * width_ + p);
        }
      }
      float out[kRows * decltype(tile)::kColumns];
      tile.store(out, decltype(tile)::kColumns);
      for (int i = 0; i < kRows; ++i) {
        finishRow(row + l + i, p, out + i * decltype(tile)::kColumns,
                  atMost(decltype(tile)::kColumns, columns_ - p));
      }
    });
  }

  void finishRow(int64_t row, int64_t p, float* out, int64_t count) {
    const int64_t at = head_ * m_.dim + first_ + p;
    gate(out, scan_.xbc + row * m_.channels + at, args_.zxbcdt + row * m_.row + at, args_.d[head_],
         count);
    std::memcpy(args_.y + row * m_.inner + at, out, count * sizeof(float));
  }

  void advance(int64_t row, int64_t tokens) {
    const float* b = scan_.xbc + row * m_.channels + m_.inner + group_ * m_.state;
    const float decay = carry_[tokens - 1];
    forTiles(m_.state, width_, [&](auto tile, int64_t n, int64_t p) {
      constexpr int kRows = decltype(tile)::kRows;
      tile.load(state_ + n * width_ + p, width_);
      for (int i = 0; i < kRows; ++i) tile.scaleRow(i, decay);
      tile.multiplyAdd(b + n, 1, m_.channels, late_ + p, width_, tokens);
      tile.store(state_ + n * width_ + p, width_);
    });
  }

  const ec_mamba& args_;
  const Layout& m_;
  const Scan& scan_;
  const int64_t head_, group_, first_, columns_, width_;
  float* state_;   // [state][width]
  float* input_;   // [chunk][width]
  float* late_;    // [chunk][width]
  float* mix_;     // [kTileRows][chunkWidth]
  float* cum_;     // [chunk], high part
  float* cumLow_;  // [chunk], low part
  float* carry_;   // [chunk] exp(cum)
  float* fade_;    // [chunk] exp(cum_end - cum)
  float* dt_;      // [chunk]
};

}  // namespace

ec_status mambaStepWorkspace(const ec_step& step, const ec_mamba& args, size_t* bytes) {
  EC_TRY(checkShape("mamba_step", step, args));
  Arena arena;
  arena.take<float>(step.n_tok * Layout(args).channels);
  *bytes = arena.bytes();
  return EC_OK;
}

ec_status mambaStep(Pool& pool, const ec_step& step, const ec_mamba& args) {
  EC_TRY(check("mamba_step", step, args));
  EC_TRY(checkOneTokenEach("mamba_step", "mamba_prefill", step));
  const Layout m(args);
  Arena arena(step);
  float* xbc = arena.take<float>(step.n_tok * m.channels);
  EC_TRY(arena.status("mamba_step"));
  convolveAll(pool, step, args, m, xbc);
  pool.parallelFor(liveSeqs(step) * m.heads, [&](int64_t unit, int) {
    stepHead(step, args, m, static_cast<int32_t>(unit / m.heads), unit % m.heads, xbc);
  });
  return EC_OK;
}

ec_status mambaPrefillWorkspace(const ec_step& step, const ec_mamba& args, size_t* bytes) {
  EC_TRY(checkShape("mamba_prefill", step, args));
  Arena arena;
  Scan(arena, step, args);
  *bytes = arena.bytes();
  return EC_OK;
}

ec_status mambaPrefill(Pool& pool, const ec_step& step, const ec_mamba& args) {
  EC_TRY(check("mamba_prefill", step, args));
  const Layout m(args);
  Arena arena(step);
  const Scan scan(arena, step, args);
  EC_TRY(arena.status("mamba_prefill"));
  convolveAll(pool, step, args, m, scan.xbc);
  scoreAll(pool, step, m, scan);
  const int64_t perSeq = m.heads * scan.panels;
  pool.parallelFor(liveSeqs(step) * perSeq, [&](int64_t unit, int thread) {
    const int64_t index = unit % perSeq;
    PanelScan(args, m, scan, index / scan.panels, index % scan.panels, pool.scratch(thread))
        .run(step, static_cast<int32_t>(unit / perSeq));
  });
  return EC_OK;
}

}  // namespace ec::EC_ISA
