// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

namespace test {
namespace {

struct Shape {
  int32_t heads, kvHeads, dim, type;
  int32_t row() const { return (heads + 2 * kvHeads) * dim; }
};

constexpr int32_t kPage = EC_PAGE_TOKENS;

// Pages in an order that is not the slots', all NaN until written: what no token wrote must not be
// read.
struct Cache {
  Cache(const Shape& shape, int32_t slots, int32_t maxPages)
      : m(shape), table(static_cast<size_t>(slots) * maxPages), pagesPerSlot(maxPages) {
    const int32_t pages = slots * maxPages;
    for (int32_t i = 0; i < pages; ++i) table[i] = (i * 7 + 3) % pages;
    const size_t values = static_cast<size_t>(pages) * 2 * m.kvHeads * kPage * m.dim;
    data.assign(values * (m.type == EC_F32 ? 4 : 2), 0xff);
  }
  float read(int32_t slot, int32_t position, int32_t half, int32_t head, int32_t i) const {
    const size_t page = table[slot * pagesPerSlot + position / kPage];
    const size_t at =
        (((page * 2 + half) * m.kvHeads + head) * kPage + position % kPage) * m.dim + i;
    if (m.type == EC_F32) {
      float value;
      std::memcpy(&value, data.data() + at * 4, 4);
      return value;
    }
    uint16_t value;
    std::memcpy(&value, data.data() + at * 2, 2);
    return halfToFloat(value);
  }

  Shape m;
  Ints table;
  int32_t pagesPerSlot;
  Bytes data;
};

// One row in double, from the keys and values that the pages hold.
Doubles attend(const Cache& cache, int32_t slot, int32_t position, const float* qkv, float scale) {
  const Shape& m = cache.m;
  Doubles y(m.heads * m.dim);
  for (int32_t h = 0; h < m.heads; ++h) {
    const int32_t g = h / (m.heads / m.kvHeads);
    Doubles score(position + 1);
    double top = -INFINITY, sum = 0;
    for (int32_t p = 0; p <= position; ++p) {
      for (int32_t i = 0; i < m.dim; ++i) {
        score[p] += static_cast<double>(qkv[h * m.dim + i]) * cache.read(slot, p, 0, g, i);
      }
      score[p] *= scale;
      top = std::fmax(top, score[p]);
    }
    for (double& s : score) sum += s = std::exp(s - top);
    for (int32_t p = 0; p <= position; ++p) {
      for (int32_t i = 0; i < m.dim; ++i) {
        y[h * m.dim + i] += score[p] / sum * cache.read(slot, p, 1, g, i);
      }
    }
  }
  return y;
}

std::string name(const Shape& m, const char* what) {
  return std::string("attention ") + std::to_string(m.heads) + "/" + std::to_string(m.kvHeads) +
         " heads of " + std::to_string(m.dim) + ", " + typeName(m.type) + ", " + what;
}

class Sequences {
 public:
  Sequences(Lib& lib, const Shape& m, int32_t slots, int32_t tokens, int32_t maxPages)
      : lib_(lib), m_(m), cache(m, slots, maxPages) {
    Rng rng(41 + m.dim);
    for (int32_t s = 0; s < slots; ++s) {
      qkv_.push_back(rng.normals(static_cast<size_t>(tokens) * m.row(), 1.2f));
    }
  }

  // Tokens [from, from + count) of each slot in one step; their y, slot by slot.
  Floats run(ec_op op, const Ints& slots, int32_t from, int32_t count) {
    Batch batch;
    Floats in;
    for (const int32_t s : slots) {
      batch.add(count, s, from);
      in.insert(in.end(), qkv_[s].begin() + from * m_.row(),
                qkv_[s].begin() + (from + count) * m_.row());
    }
    batch.pages = cache.table;
    batch.maxPages = cache.pagesPerSlot;
    Floats y(static_cast<size_t>(batch.tokens()) * m_.heads * m_.dim, NAN);
    const ec_attention args{in.data(), cache.data.data(), y.data(), m_.type,
                            m_.heads,  m_.kvHeads,        m_.dim,   kScale};
    lib_.ok(op, batch.step(), &args, name(m_, "run"));
    return y;
  }
  Doubles want(int32_t slot, int32_t from, int32_t count) const {
    Doubles all;
    for (int32_t t = from; t < from + count; ++t) {
      const Doubles row = attend(cache, slot, t, qkv_[slot].data() + t * m_.row(), kScale);
      all.insert(all.end(), row.begin(), row.end());
    }
    return all;
  }

 private:
  static constexpr float kScale = 0.3f;
  Lib& lib_;
  Shape m_;
  std::vector<Floats> qkv_;

 public:
  Cache cache;
};

void testShape(Lib& lib, const Shape& m, int32_t first, int32_t second) {
  const int32_t all = first + second, pages = (all + kPage) / kPage;
  const size_t width = static_cast<size_t>(m.heads) * m.dim;
  Sequences whole(lib, m, 3, all, pages), pieces(lib, m, 3, all, pages);

  const Floats once = whole.run(EC_OP_ATTENTION_PREFILL, {2, 0}, 0, all);
  Doubles want = whole.want(2, 0, all);
  const Doubles other = whole.want(0, 0, all);
  want.insert(want.end(), other.begin(), other.end());
  lib.near(relativeError(once, want), 3e-6, name(m, "prefill"));

  const Floats head = pieces.run(EC_OP_ATTENTION_PREFILL, {2}, 0, first);
  Floats tail = pieces.run(EC_OP_ATTENTION_PREFILL, {2}, first, second);
  lib.check(std::equal(head.begin(), head.end(), once.begin()) &&
                std::equal(tail.begin(), tail.end(), once.begin() + first * width),
            "%s", name(m, "two pieces differ from one").c_str());

  const Floats last = whole.run(EC_OP_ATTENTION_DECODE, {0, 2}, all - 1, 1);
  lib.check(std::equal(last.begin(), last.begin() + width, once.end() - width) &&
                std::equal(last.begin() + width, last.end(), once.begin() + (all - 1) * width),
            "%s", name(m, "decode differs from prefill").c_str());
}

void testRefusals(Lib& lib) {
  const Shape m{2, 1, 8, EC_F32};
  Cache cache(m, 1, 2);
  Floats in(m.row()), y(m.heads * m.dim);
  ec_attention args{in.data(), cache.data.data(), y.data(), m.type,
                    m.heads,   m.kvHeads,         m.dim,    1.0f};
  Batch batch;
  batch.add(1, 0, 128);
  batch.pages = cache.table;
  batch.maxPages = 2;
  lib.refuses(EC_OP_ATTENTION_DECODE, batch.step(), &args, "129 tokens");
  batch.past[0] = 70;
  batch.pages[1] = -5;
  lib.refuses(EC_OP_ATTENTION_DECODE, batch.step(), &args, "is -5");
  batch.past[0] = 3;
  args.kv_heads = 3;
  lib.refuses(EC_OP_ATTENTION_PREFILL, batch.step(), &args, "kv_heads 3");
  args.kv_heads = 1;
  args.kv_type = EC_U4_64;
  lib.refuses(EC_OP_ATTENTION_PREFILL, batch.step(), &args, "kv_type");
}

}  // namespace

void testAttention(Lib& lib) {
  for (const int32_t type : {EC_F32, EC_F16}) {
    testShape(lib, {4, 2, 16, type}, 37, 1);
    testShape(lib, {3, 1, 5, type}, 1, 2);
    testShape(lib, {5, 5, 24, type}, 66, 63);
    testShape(lib, {8, 1, 32, type}, 250, 20);
  }
  testRefusals(lib);
}

}  // namespace test
