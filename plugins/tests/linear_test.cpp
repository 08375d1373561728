// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

namespace test {
namespace {

constexpr int32_t kTypes[] = {EC_F32, EC_F16, EC_U4_64, EC_I8_64};

bool isBlock(int32_t type) { return type == EC_U4_64 || type == EC_I8_64; }

// Block products are exact but for the fp32 sum over groups. After a norm, a value that lies
// between two int8 codes may fall to either side: one code in 127 of one column.
double bound(int32_t type, bool withNorm) { return isBlock(type) && withNorm ? 4e-3 : 2e-6; }

struct Shape {
  int32_t n, k, tokens, groups;  // groups 0: no norm
  int32_t act;
  bool residual;
};

void testShape(Lib& lib, int32_t type, const Shape& shape) {
  Rng rng(7 + shape.n + shape.k);
  const Weight w = makeWeight(lib, rng, type, shape.n, shape.k);
  const Floats x = rng.normals(static_cast<size_t>(shape.tokens) * shape.k);
  const Floats gamma = rng.normals(shape.k);
  const ec_norm norm{shape.groups ? gamma.data() : nullptr, 1e-5f, shape.groups};
  Floats y = rng.normals(static_cast<size_t>(shape.tokens) * shape.n, 10.0f);
  const Floats residual = y;

  Doubles want =
      product(rounded(normed(x, norm, shape.k), shape.k, type), w.dense.data(), shape.n, shape.k);
  for (size_t i = 0; i < want.size(); ++i) {
    if (shape.act == EC_RELU2) want[i] = want[i] > 0 ? want[i] * want[i] : 0;
    if (shape.residual) want[i] += residual[i];
  }
  Batch batch;
  batch.add(shape.tokens, 0);
  const ec_linear args{x.data(), norm,     w.view, shape.residual ? y.data() : nullptr,
                       y.data(), shape.act};
  const std::string what = std::string("linear ") + typeName(type) + " [" +
                           std::to_string(shape.n) + "][" + std::to_string(shape.k) + "] x " +
                           std::to_string(shape.tokens);
  lib.ok(EC_OP_LINEAR, batch.step(), &args, what);
  lib.near(relativeError(y, want), bound(type, shape.groups > 0), what);

  // Each row alone gives the same bits.
  for (const int32_t t : {0, shape.tokens - 1}) {
    Floats alone(residual.begin() + t * shape.n, residual.begin() + (t + 1) * shape.n);
    ec_linear one = args;
    one.x = x.data() + t * shape.k;
    one.y = alone.data();
    if (shape.residual) one.residual = alone.data();
    Batch single;
    single.add(1, 0);
    lib.ok(EC_OP_LINEAR, single.step(), &one, what);
    lib.check(std::memcmp(alone.data(), y.data() + t * shape.n, alone.size() * 4) == 0,
              "%s: row %d alone has other bits", what.c_str(), t);
  }
}

// The range that relu^2 makes: one huge column must not drown the others' groups, nothing
// overflows.
void testHuge(Lib& lib, int32_t type) {
  Rng rng(5);
  const int32_t n = 40, k = 192;
  const Weight w = makeWeight(lib, rng, type, n, k);
  Floats x = rng.normals(k);
  for (int32_t i = 64; i < 128; ++i) x[i] *= 1e9f;
  Floats y(n);
  Batch batch;
  batch.add(1, 0);
  const ec_linear args{x.data(), {}, w.view, nullptr, y.data(), EC_IDENTITY};
  lib.ok(EC_OP_LINEAR, batch.step(), &args, "linear, huge");
  const Doubles want = product(rounded(Doubles(x.begin(), x.end()), k, type), w.dense.data(), n, k);
  lib.near(relativeError(y, want), 2e-6, std::string("linear, huge values, ") + typeName(type));
}

}  // namespace

void testLinear(Lib& lib) {
  for (const int32_t type : kTypes) {
    testShape(lib, type, {1, 1, 1, 0, EC_IDENTITY, false});
    testShape(lib, type, {33, 65, 3, 0, EC_RELU2, true});
    testShape(lib, type, {64, 128, 8, 1, EC_IDENTITY, true});
    testShape(lib, type, {100, 72, 9, 2, EC_IDENTITY, false});
    testShape(lib, type, {31, 200, 129, 0, EC_IDENTITY, true});
    testHuge(lib, type);
  }
  Floats x(64), y(32);
  Rng rng(3);
  const Weight w = makeWeight(lib, rng, EC_F32, 32, 64);
  ec_linear args{x.data(), {}, w.view, nullptr, y.data(), EC_IDENTITY};
  Batch batch;
  batch.add(1, 0);
  args.w.k = 0;
  lib.refuses(EC_OP_LINEAR, batch.step(), &args, "linear");
  args.w.k = 64;
  args.x = nullptr;
  lib.refuses(EC_OP_LINEAR, batch.step(), &args, "x");
}

void testHead(Lib& lib) {
  Rng rng(11);
  const int32_t vocab = 77, d = 72;
  for (const int32_t type : kTypes) {
    const Weight w = makeWeight(lib, rng, type, vocab, d);
    Batch batch;
    batch.add(4, 0);
    batch.outRow = {3, 0};
    const Floats x = rng.normals(4 * d), gamma = rng.normals(d);
    const ec_norm norm{gamma.data(), 1e-5f, 1};
    std::vector<uint32_t> mask(2 * 3, ~0u);
    mask[3 + 1] = ~(1u << 5);  // row 1 may not answer 37
    Floats logits(2 * vocab);
    const ec_head args{x.data(), norm, w.view, mask.data(), logits.data()};
    lib.ok(EC_OP_HEAD, batch.step(), &args, "head");
    Floats picked(x.begin() + 3 * d, x.end());
    picked.insert(picked.end(), x.begin(), x.begin() + d);
    Doubles want = product(rounded(normed(picked, norm, d), d, type), w.dense.data(), vocab, d);
    lib.check(logits[vocab + 37] == -INFINITY, "head: a masked token keeps its logit");
    want[vocab + 37] = logits[vocab + 37] = 0;
    lib.near(relativeError(logits, want), bound(type, true), std::string("head ") + typeName(type));
    batch.outRow[1] = 4;
    lib.refuses(EC_OP_HEAD, batch.step(), &args, "out_row");
  }
}

uint64_t hashLinear(Lib& lib) {
  uint64_t hash = fnv(nullptr, 0);
  for (const int32_t type : {EC_U4_64, EC_I8_64}) {
    for (const int32_t tokens : {1, 5, 8, 33}) {
      Rng rng(100 + tokens);
      const Weight w = makeWeight(lib, rng, type, 96, 328);
      const Floats x = rng.normals(static_cast<size_t>(tokens) * 328);
      Floats y(static_cast<size_t>(tokens) * 96);
      Batch batch;
      batch.add(tokens, 0);
      const ec_linear args{x.data(), {}, w.view, nullptr, y.data(), EC_IDENTITY};
      lib.ok(EC_OP_LINEAR, batch.step(), &args, "linear");
      hash = fnv(y, fnv(w.dense, hash));
    }
  }
  return hash;
}

}  // namespace test
