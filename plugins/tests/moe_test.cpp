// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "harness.h"

namespace test {
namespace {

struct Shape {
  int32_t d, ff, sharedFf, experts, topK, nGroup, topkGroup, tokens, type;
};

struct Model {
  Model(Lib& lib, Rng& rng, const Shape& m)
      : router(rng.normals(static_cast<size_t>(m.experts) * m.d, 0.5f)),
        bias(rng.normals(m.experts, 0.3f)),
        gamma(rng.normals(m.d)),
        up(makeWeight(lib, rng, m.type, m.ff, m.d, m.experts, 0.2f)),
        down(makeWeight(lib, rng, m.type, m.d, m.ff, m.experts, 0.2f)),
        sharedUp(makeWeight(lib, rng, m.type, std::max(m.sharedFf, 1), m.d, 1, 0.2f)),
        sharedDown(makeWeight(lib, rng, m.type, m.d, std::max(m.sharedFf, 1), 1, 0.2f)) {
    bias[0] = -100.0f;  // nobody asks expert 0
  }
  Floats router, bias, gamma;
  Weight up, down, sharedUp, sharedDown;
};

struct Choice {
  Ints ids;
  Doubles weights;
};

Choice route(const Shape& m, const Model& model, const double* h, float scale) {
  Doubles score(m.experts), choice(m.experts);
  for (int32_t e = 0; e < m.experts; ++e) {
    double sum = 0;
    for (int32_t i = 0; i < m.d; ++i) sum += model.router[e * m.d + i] * h[i];
    score[e] = 1 / (1 + std::exp(-sum));
    choice[e] = score[e] + model.bias[e];
  }
  const int32_t size = m.experts / m.nGroup;
  Doubles strength(m.nGroup);
  Ints groups(m.nGroup);
  for (int32_t g = 0; g < m.nGroup; ++g) {
    Doubles part(choice.begin() + g * size, choice.begin() + (g + 1) * size);
    std::sort(part.rbegin(), part.rend());
    strength[g] = part[0] + (size > 1 ? part[1] : 0);
    groups[g] = g;
  }
  std::stable_sort(groups.begin(), groups.end(),
                   [&](int32_t a, int32_t b) { return strength[a] > strength[b]; });
  Ints ids;
  for (int32_t e = 0; e < m.experts; ++e) {
    if (std::find(groups.begin(), groups.begin() + m.topkGroup, e / size) !=
        groups.begin() + m.topkGroup) {
      ids.push_back(e);
    }
  }
  std::stable_sort(ids.begin(), ids.end(),
                   [&](int32_t a, int32_t b) { return choice[a] > choice[b]; });
  ids.resize(m.topK);
  std::sort(ids.begin(), ids.end());
  Choice chosen{ids, {}};
  double sum = 1e-20;
  for (const int32_t e : ids) sum += score[e];
  for (const int32_t e : ids) chosen.weights.push_back(score[e] / sum * scale);
  return chosen;
}

Doubles feedForward(const Shape& m, const Doubles& h, const float* up, const float* down,
                    int32_t ff) {
  Doubles inner = product(rounded(h, m.d, m.type), up, ff, m.d);
  for (double& v : inner) v = v > 0 ? v * v : 0;
  return product(rounded(inner, ff, m.type), down, m.d, ff);
}

void testShape(Lib& lib, const Shape& m) {
  Rng rng(61 + m.tokens);
  const Model model(lib, rng, m);
  const Floats x = rng.normals(static_cast<size_t>(m.tokens) * m.d);
  const ec_norm norm{model.gamma.data(), 1e-5f, 1};
  constexpr float kScale = 2.5f;
  const Doubles h = normed(x, norm, m.d);
  Doubles want(x.begin(), x.end());
  Ints ids;
  for (int32_t t = 0; t < m.tokens; ++t) {
    const Doubles row(h.begin() + t * m.d, h.begin() + (t + 1) * m.d);
    const Choice chosen = route(m, model, row.data(), kScale);
    ids.insert(ids.end(), chosen.ids.begin(), chosen.ids.end());
    const auto join = [&](const Doubles& y, double weight) {
      for (int32_t i = 0; i < m.d; ++i) want[t * m.d + i] += weight * y[i];
    };
    for (int32_t k = 0; k < m.topK; ++k) {
      const size_t at = static_cast<size_t>(chosen.ids[k]) * m.ff * m.d;
      join(feedForward(m, row, model.up.dense.data() + at, model.down.dense.data() + at, m.ff),
           chosen.weights[k]);
    }
    if (m.sharedFf) {
      join(feedForward(m, row, model.sharedUp.dense.data(), model.sharedDown.dense.data(),
                       m.sharedFf),
           1);
    }
  }
  Floats y(x.size(), NAN), weights(static_cast<size_t>(m.tokens) * m.topK);
  Ints gotIds(weights.size(), -1);
  ec_moe args{};
  args.x = x.data();
  args.norm = norm;
  args.router = model.router.data();
  args.bias = model.bias.data();
  args.up = model.up.view;
  args.down = model.down.view;
  if (m.sharedFf) {
    args.shared_up = model.sharedUp.view;
    args.shared_down = model.sharedDown.view;
  }
  args.ids = gotIds.data();
  args.weights = weights.data();
  args.y = y.data();
  args.top_k = m.topK;
  args.n_group = m.nGroup;
  args.topk_group = m.topkGroup;
  args.normalize = 1;
  args.scale = kScale;
  Batch batch;
  batch.add(m.tokens, 0);
  const std::string what = std::string("moe ") + typeName(m.type) + ", " +
                           std::to_string(m.tokens) + " tokens, " + std::to_string(m.experts) +
                           " experts";
  lib.ok(EC_OP_MOE, batch.step(), &args, what);
  lib.check(gotIds == ids, "%s: chosen experts", what.c_str());
  // Two roundings to int8, of values whose float and double sums may fall to either side of a code.
  const bool blocks = m.type == EC_U4_64 || m.type == EC_I8_64;
  lib.near(relativeError(y, want), blocks ? 8e-3 : 3e-6, what);

  Floats alone(x.begin() + (m.tokens - 1) * m.d, x.end());
  const Floats expected(y.end() - m.d, y.end());
  args.x = alone.data();
  args.y = alone.data();  // in place
  Batch single;
  single.add(1, 0);
  lib.ok(EC_OP_MOE, single.step(), &args, what);
  lib.check(alone == expected, "%s: the last row alone has other bits", what.c_str());
}

}  // namespace

void testMoe(Lib& lib) {
  for (const int32_t type : {EC_F32, EC_F16, EC_U4_64, EC_I8_64}) {
    testShape(lib, {72, 40, 56, 8, 3, 1, 1, 1, type});
    testShape(lib, {64, 64, 0, 8, 2, 2, 1, 9, type});
  }
  testShape(lib, {40, 24, 72, 12, 4, 4, 2, 129, EC_U4_64});
  testShape(lib, {40, 24, 72, 6, 2, 6, 3, 5, EC_F32});  // groups of one expert
}

}  // namespace test
