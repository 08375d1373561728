// SPDX-License-Identifier: Apache-2.0
//
// Grouped-query attention over paged keys and values, without positional encoding:
//
//   y[t][h] = sum over i <= position(t) of softmax_i(scale q[t][h] . k[i][g]) v[i][g],   g = h /
//   (heads / kv_heads)
//
// Shapes: qkv [n_tok][(heads + 2 kv_heads) head_dim]; kv [pages][2][kv_heads][64][head_dim] fp32 or
// fp16, position p of a slot in page page_table[slot][p / 64]; y [n_tok][heads head_dim]. The
// step's keys and values are appended first. q, scores and sums are fp32 for both page types.
//
// The context is cut into splits of 256 positions. A split gives every row its maximum m, its sum l
// of exp(score - m) and its sum o of exp(score - m) v; splits are joined in ascending order. Decode
// works on splits in parallel, prefill on tiles of rows, and both take the same operations in the
// same order: a row's bits depend neither on the number of threads nor on the op that computed it.
//
// A tile's columns are (token, head) pairs that share a key head, so that one pass over K and V
// serves all of them and the softmax needs no sums across lanes. Bound: decode by the memory of K
// and V, from about 8 query heads per key head on by fp32 arithmetic; prefill by fp32 arithmetic.
// Reference: edgecascade/backends/reference.py   Test: tests/test_attention_kernels.py
#include <cmath>

#include "kernels.h"
#include "sequences.h"
#include "simd.h"
#include "tile.h"

namespace ec::EC_ISA {
namespace {

constexpr int64_t kPage = EC_PAGE_TOKENS;
constexpr int64_t kSplit = 256;
constexpr int64_t kColumns = 64;  // (token, head) pairs of a tile
constexpr int64_t kMaxHeadDim = 384;

// Floats of a thread's scratch that a tile uses: q, one page, o, joined o; scores; m and l twice.
constexpr int64_t kScratchFloats =
    kColumns * kMaxHeadDim + 3 * 64 * kMaxHeadDim + kSplit * kColumns + 4 * kColumns;
static_assert(kScratchFloats * sizeof(float) <= Pool::kScratchBytes);

struct Layout {
  int64_t heads, kvHeads, dim, padded, perKv, row;
  explicit Layout(const ec_attention& a)
      : heads(a.heads),
        kvHeads(a.kv_heads),
        dim(a.head_dim),
        padded(roundUp<int64_t>(a.head_dim, kWidth)),
        perKv(heads / kvHeads),
        row((heads + 2 * kvHeads) * dim) {}
  // Floats of one split's result for one row and head: m, l, o.
  int64_t partial() const { return 16 + padded; }
};

ec_status checkShape(const char* op, const ec_step& step, const ec_attention& args) {
  EC_TRY(checkAttentionShape(op, step, args));
  if (args.head_dim > kMaxHeadDim) {
    return fail(EC_UNSUPPORTED, "%s: head_dim is %d, this backend takes at most %d", op,
                args.head_dim, static_cast<int>(kMaxHeadDim));
  }
  const double splits = step.max_context / static_cast<double>(kSplit) + 1;
  return checkValues(op, "partial results",
                     splits * step.n_tok * args.heads * (args.head_dim + 16.0));
}

// The pages of every live sequence exist for all positions up to its last new token.
ec_status checkPages(const char* op, const ec_step& step) {
  const int32_t live = liveSeqs(step);
  for (int32_t s = 0; s < live; ++s) {
    const int64_t context = int64_t{step.past[s]} + step.start[s + 1] - step.start[s];
    if (context > step.max_pages * kPage || context > step.max_context) {
      return fail(EC_INVALID,
                  "%s: sequence %d reaches %lld tokens; max_pages %d holds %lld, max_context is %d",
                  op, s, static_cast<long long>(context), step.max_pages,
                  static_cast<long long>(step.max_pages * kPage), step.max_context);
    }
    const int32_t* pages = step.page_table + int64_t{step.slot[s]} * step.max_pages;
    for (int64_t p = 0; p < ceilDiv(context, kPage); ++p) {
      if (pages[p] < 0) {
        return fail(EC_INVALID, "%s: page_table[%d][%lld] is %d, but slot %d holds %lld tokens", op,
                    step.slot[s], static_cast<long long>(p), pages[p], step.slot[s],
                    static_cast<long long>(context));
      }
    }
  }
  return EC_OK;
}

ec_status check(const char* op, const ec_step& step, const ec_attention& args) {
  EC_TRY(checkShape(op, step, args));
  EC_TRY(checkStep(op, step));
  EC_TRY(checkAttentionPointers(op, step, args));
  EC_TRY(checkSequences(op, step));
  return checkPages(op, step);
}

enum Half { kKeys = 0, kValues = 1 };

// The keys, or the values, of one head in the page that holds `position`: [64][head_dim], then, for
// int8, [64] scales.
std::byte* pageOf(const ec_step& step, const ec_attention& a, int32_t seq, Half half,
                  int64_t kvHead, int64_t position) {
  const int64_t page = step.page_table[int64_t{step.slot[seq]} * step.max_pages + position / kPage];
  const int64_t rowBytes = a.kv_type == EC_F32   ? int64_t{a.head_dim} * 4
                           : a.kv_type == EC_F16 ? int64_t{a.head_dim} * 2
                                                 : int64_t{a.head_dim} + 2;
  return static_cast<std::byte*>(a.kv) +
         ((page * 2 + half) * a.kv_heads + kvHead) * kPage * rowBytes;
}

void narrowRow(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) storeHalf(to + i, load(from + i));
  const int rest = static_cast<int>(count - i);
  if (rest > 0) storeHalf(to + i, load(from + i, rest), rest);
}

// Codes and the scale of a row. What is not finite makes the row NaN, by way of its scale.
void quantizeRow(const float* from, int64_t count, int8_t* to, uint16_t* scale) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float size = std::fabs(from[i]);
    if (!(size <= largest)) largest = size;
    if (largest != largest) break;
  }
  storeHalf(scale, set(largest / 127.0f), 1);
  float wide[kWidth];
  store(wide, loadHalf(scale, 1));
  for (int64_t i = 0; i < count; ++i) {
    const float code = wide[0] > 0 ? std::nearbyint(from[i] / wide[0]) : 0.0f;
    to[i] = static_cast<int8_t>(code >= 127 ? 127 : code <= -127 ? -127 : code == code ? code : 0);
  }
}

// Writes the step's keys and values into the pages.
void append(Pool& pool, const ec_step& step, const ec_attention& args, const Layout& m) {
  pool.parallelFor(liveSeqs(step) * 2 * m.kvHeads, [&](int64_t unit, int) {
    const int32_t seq = static_cast<int32_t>(unit / (2 * m.kvHeads));
    const Half half = unit / m.kvHeads % 2 ? kValues : kKeys;
    const int64_t kvHead = unit % m.kvHeads;
    const int64_t row0 = step.start[seq], tokens = step.start[seq + 1] - row0;
    const float* from = args.qkv + row0 * m.row + (m.heads + half * m.kvHeads + kvHead) * m.dim;
    for (int64_t t = 0; t < tokens; ++t, from += m.row) {
      const int64_t position = step.past[seq] + t;
      std::byte* page = pageOf(step, args, seq, half, kvHead, position);
      const int64_t row = position % kPage;
      if (args.kv_type == EC_F32) {
        std::memcpy(page + row * m.dim * 4, from, m.dim * sizeof(float));
      } else if (args.kv_type == EC_F16) {
        narrowRow(from, m.dim, reinterpret_cast<uint16_t*>(page) + row * m.dim);
      } else {
        quantizeRow(from, m.dim, reinterpret_cast<int8_t*>(page) + row * m.dim,
                    reinterpret_cast<uint16_t*>(page + kPage * m.dim) + row);
      }
    }
  });
}

// o = o * keep + add * weight
void scaleAdd(float* o, float keep, const float* add, float weight, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    store(o + i, fma(load(o + i), set(keep), load(add + i) * set(weight)));
  }
}

// Softmax state of one row over the splits joined so far.
struct Joined {
  float max = -INFINITY;
  float sum = 0;

  void add(float m, float l, const float* o, float* joined, int64_t count) {
    const float next = max > m ? max : m;
    const float keep = exp(max - next), weight = exp(m - next);
    max = next;
    sum = sum * keep + l * weight;
    scaleAdd(joined, keep, o, weight, count);
  }
  void finish(const float* joined, int64_t count, float* y) const {
    for (int64_t i = 0; i < count; ++i) y[i] = joined[i] / sum;
  }
};

// Columns [first, first + count) of one sequence and key head: column c is token c / perKv, head c
// % perKv.
class ColumnTile {
 public:
  ColumnTile(const ec_step& step, const ec_attention& args, const Layout& m, int32_t seq,
             int64_t kvHead, int64_t tile, std::byte* scratch)
      : step_(step),
        args_(args),
        m_(m),
        seq_(seq),
        kvHead_(kvHead),
        first_(tile * kColumns),
        count_(atMost(kColumns, (step.start[seq + 1] - step.start[seq]) * m.perKv - first_)),
        width_(roundUp<int64_t>(count_, kWidth)) {
    float* next = reinterpret_cast<float*>(scratch);
    const auto take = [&](int64_t floats) {
      float* taken = next;
      next += floats;
      return taken;
    };
    query_ = take(m.dim * kColumns);
    page_ = take(kPage * m.padded);
    scores_ = take(kSplit * kColumns);
    out_ = take(kColumns * m.padded);
    joined_ = take(kColumns * m.padded);
    max_ = take(kColumns);
    sum_ = take(kColumns);
    gatherQueries();
  }

  int64_t count() const { return count_; }
  int64_t row(int64_t c) const { return step_.start[seq_] + (first_ + c) / m_.perKv; }
  int64_t head(int64_t c) const { return kvHead_ * m_.perKv + (first_ + c) % m_.perKv; }
  int64_t splits() const { return ceilDiv(position(count_ - 1) + 1, kSplit); }

  // The split's m, l and o of every column.
  void attend(int64_t split) {
    const int64_t from = split * kSplit;
    const int64_t keys = atMost(kSplit, position(count_ - 1) + 1 - from);
    for (int64_t k = 0; k < keys; k += kPage) score(from + k, atMost(kPage, keys - k), k);
    maskAhead(from, keys);
    exponentiate(keys);
    for (int64_t i = 0; i < count_ * m_.padded; ++i) out_[i] = 0.0f;
    for (int64_t k = 0; k < keys; k += kPage) mixValues(from + k, atMost(kPage, keys - k), k);
  }
  void storePartial(int64_t c, float* partial) const {
    partial[0] = max_[c];
    partial[1] = sum_[c];
    std::memcpy(partial + 16, out_ + c * m_.padded, m_.padded * sizeof(float));
  }

  // All splits in order, straight into y.
  void attendAll() {
    Joined joined[kColumns];
    for (int64_t i = 0; i < count_ * m_.padded; ++i) joined_[i] = 0.0f;
    const int64_t all = splits();
    for (int64_t split = 0; split < all; ++split) {
      attend(split);
      for (int64_t c = 0; c < count_; ++c) {
        joined[c].add(max_[c], sum_[c], out_ + c * m_.padded, joined_ + c * m_.padded, m_.padded);
      }
    }
    for (int64_t c = 0; c < count_; ++c) {
      joined[c].finish(joined_ + c * m_.padded, m_.dim,
                       args_.y + (row(c) * m_.heads + head(c)) * m_.dim);
    }
  }

 private:
  int64_t position(int64_t c) const { return step_.past[seq_] + (first_ + c) / m_.perKv; }

  // query_[d][c] = scale q; columns beyond count_ are zero.
  void gatherQueries() {
    for (int64_t c = 0; c < width_; ++c) {
      const float* q = c < count_ ? args_.qkv + row(c) * m_.row + head(c) * m_.dim : nullptr;
      for (int64_t d = 0; d < m_.dim; ++d) query_[d * width_ + c] = q ? q[d] * args_.scale : 0.0f;
    }
  }

  // `keys` rows of a page as fp32, `padded` values apart; in place where they are so already.
  const float* pageRows(Half half, int64_t position, int64_t keys) {
    const std::byte* page = pageOf(step_, args_, seq_, half, kvHead_, position);
    if (args_.kv_type == EC_I8_ROW) return widenRows(page, keys);
    if (args_.kv_type == EC_F32) {
      const float* rows = reinterpret_cast<const float*>(page);
      if (m_.dim == m_.padded) return rows;
      for (int64_t i = 0; i < keys; ++i) {
        for (int64_t d = 0; d < m_.padded; ++d) {
          page_[i * m_.padded + d] = d < m_.dim ? rows[i * m_.dim + d] : 0.0f;
        }
      }
      return page_;
    }
    const uint16_t* rows = reinterpret_cast<const uint16_t*>(page);
    for (int64_t i = 0; i < keys; ++i, rows += m_.dim) {
      float* to = page_ + i * m_.padded;
      int64_t d = 0;
      for (; d + kWidth <= m_.dim; d += kWidth) store(to + d, loadHalf(rows + d));
      if (d < m_.dim) store(to + d, loadHalf(rows + d, static_cast<int>(m_.dim - d)));
    }
    return page_;
  }

  const float* widenRows(const std::byte* page, int64_t keys) {
    const int8_t* codes = reinterpret_cast<const int8_t*>(page);
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(page + kPage * m_.dim);
    float scales[kPage];
    for (int64_t i = 0; i < kPage; i += kWidth) store(scales + i, loadHalf(halves + i));
    for (int64_t i = 0; i < keys; ++i, codes += m_.dim) {
      float* to = page_ + i * m_.padded;
      for (int64_t d = 0; d < m_.dim; ++d) to[d] = static_cast<float>(codes[d]) * scales[i];
      for (int64_t d = m_.dim; d < m_.padded; ++d) to[d] = 0.0f;
    }
    return page_;
  }

  // scores_[at + i][c] = query . key, for the keys of one page.
  void score(int64_t position, int64_t keys, int64_t at) {
    const float* k = pageRows(kKeys, position, keys);
    forTiles(keys, width_, [&](auto tile, int64_t i, int64_t c) {
      tile.clear();
      tile.multiplyAdd(k + i * m_.padded, m_.padded, 1, query_ + c, width_, m_.dim);
      tile.store(scores_ + (at + i) * width_ + c, width_);
    });
  }

  // Keys after a column's own position: its columns are the first of the tile.
  void maskAhead(int64_t from, int64_t keys) {
    for (int64_t i = keys - 1; i >= 0 && from + i > position(0); --i) {
      const int64_t before = (from + i - step_.past[seq_]) * m_.perKv - first_;
      for (int64_t c = 0; c < atMost(before, count_); ++c) scores_[i * width_ + c] = -INFINITY;
    }
  }

  // scores = exp(scores - m) in place, m and l of each column.
  void exponentiate(int64_t keys) {
    for (int64_t c = 0; c < width_; c += kWidth) {
      Vec top = set(-INFINITY);
      for (int64_t i = 0; i < keys; ++i) top = max(load(scores_ + i * width_ + c), top);
      store(max_ + c, top);
      // A column without any key in this split has m = -inf; a finite stand-in keeps its terms at
      // 0.
      top = max(set(-3e38f), top);
      Vec total = zero();
      for (int64_t i = 0; i < keys; ++i) {
        float* at = scores_ + i * width_ + c;
        const Vec term = exp(load(at) - top);
        total = total + term;
        store(at, term);
      }
      store(sum_ + c, total);
    }
  }

  // out_[c] += sum over the page's keys of p[key][c] v[key]
  void mixValues(int64_t position0, int64_t keys, int64_t at) {
    const float* v = pageRows(kValues, position0, keys);
    forTiles(count_, m_.padded, [&](auto tile, int64_t c, int64_t d) {
      constexpr int kRows = decltype(tile)::kRows;
      const auto allowed = [&](int64_t column) {
        const int64_t ahead = position(column) + 1 - position0;
        return ahead < 0 ? 0 : atMost(ahead, keys);
      };
      const int64_t common = allowed(c), last = allowed(c + kRows - 1);
      tile.load(out_ + c * m_.padded + d, m_.padded);
      tile.multiplyAdd(scores_ + at * width_ + c, 1, width_, v + d, m_.padded, common);
      // Where the tile's tokens differ, a row stops at its own key: weight 0 would keep a later
      // row's NaN.
      for (int64_t i = common; i < last; ++i) {
        for (int r = 0; r < kRows; ++r) {
          if (i < allowed(c + r)) {
            tile.addRow(r, scores_[(at + i) * width_ + c + r], v + i * m_.padded + d);
          }
        }
      }
      tile.store(out_ + c * m_.padded + d, m_.padded);
    });
  }

  const ec_step& step_;
  const ec_attention& args_;
  const Layout& m_;
  const int32_t seq_;
  const int64_t kvHead_, first_, count_, width_;
  float* query_;   // [dim][width]
  float* page_;    // [64][padded]
  float* scores_;  // [256][width]
  float* out_;     // [columns][padded] of the current split
  float* joined_;  // [columns][padded]
  float* max_;     // [columns]
  float* sum_;     // [columns]
};

int64_t tilesOf(const Layout& m, int64_t tokens) { return ceilDiv(tokens * m.perKv, kColumns); }

// Results of all splits: [n_tok][heads][splits][m, l, o].
float* takePartials(Arena& arena, const ec_step& step, const Layout& m) {
  return arena.take<float>(step.n_tok * m.heads * ceilDiv(step.max_context, kSplit) * m.partial());
}

}  // namespace

ec_status attentionDecodeWorkspace(const ec_step& step, const ec_attention& args, size_t* bytes) {
  EC_TRY(checkShape("attention_decode", step, args));
  Arena arena;
  takePartials(arena, step, Layout(args));
  *bytes = arena.bytes();
  return EC_OK;
}

ec_status attentionDecode(Pool& pool, const ec_step& step, const ec_attention& args) {
  EC_TRY(check("attention_decode", step, args));
  EC_TRY(checkOneTokenEach("attention_decode", "attention_prefill", step));
  const Layout m(args);
  Arena arena(step);
  float* partials = takePartials(arena, step, m);
  EC_TRY(arena.status("attention_decode"));
  append(pool, step, args, m);

  const int64_t live = liveSeqs(step), tiles = tilesOf(m, 1);
  const int64_t stride = ceilDiv(step.max_context, kSplit);
  const auto partial = [&](int64_t row, int64_t head, int64_t split) {
    return partials + ((row * m.heads + head) * stride + split) * m.partial();
  };
  int64_t longest = 0;
  for (int64_t s = 0; s < live; ++s) longest = step.past[s] > longest ? step.past[s] : longest;
  const int64_t splits = longest / kSplit + 1;
  pool.parallelFor(live * m.kvHeads * tiles * splits, [&](int64_t unit, int thread) {
    const int64_t split = unit % splits, tile = unit / splits % tiles;
    const int64_t kvHead = unit / splits / tiles % m.kvHeads;
    const int32_t seq = static_cast<int32_t>(unit / splits / tiles / m.kvHeads);
    if (split * kSplit > step.past[seq]) return;
    ColumnTile columns(step, args, m, seq, kvHead, tile, pool.scratch(thread));
    columns.attend(split);
    for (int64_t c = 0; c < columns.count(); ++c) {
      columns.storePartial(c, partial(columns.row(c), columns.head(c), split));
    }
  });
  pool.parallelFor(live * m.heads, [&](int64_t unit, int thread) {
    const int64_t seq = unit / m.heads, head = unit % m.heads, row = step.start[seq];
    float* o = reinterpret_cast<float*>(pool.scratch(thread));
    for (int64_t i = 0; i < m.padded; ++i) o[i] = 0.0f;
    Joined joined;
    for (int64_t split = 0; split * kSplit <= step.past[seq]; ++split) {
      const float* part = partial(row, head, split);
      joined.add(part[0], part[1], part + 16, o, m.padded);
    }
    joined.finish(o, m.dim, args.y + (row * m.heads + head) * m.dim);
  });
  return EC_OK;
}

ec_status attentionPrefillWorkspace(const ec_step& step, const ec_attention& args, size_t* bytes) {
  *bytes = 0;
  return checkShape("attention_prefill", step, args);
}

ec_status attentionPrefill(Pool& pool, const ec_step& step, const ec_attention& args) {
  EC_TRY(check("attention_prefill", step, args));
  const Layout m(args);
  append(pool, step, args, m);
  const int32_t live = liveSeqs(step);
  int64_t units = 0;
  for (int32_t s = 0; s < live; ++s) {
    units += tilesOf(m, step.start[s + 1] - step.start[s]) * m.kvHeads;
  }
  // From the last tile back: late rows read the longest context, and the long units should not come
  // last.
  pool.parallelFor(units, [&](int64_t unit, int thread) {
    int64_t index = units - 1 - unit;
    int32_t seq = 0;
    for (;; ++seq) {
      const int64_t here = tilesOf(m, step.start[seq + 1] - step.start[seq]) * m.kvHeads;
      if (index < here) break;
      index -= here;
    }
    ColumnTile(step, args, m, seq, index % m.kvHeads, index / m.kvHeads, pool.scratch(thread))
        .attendAll();
  });
  return EC_OK;
}

}  // namespace ec::EC_ISA
