// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "harness.h"

namespace test {
namespace {

// The definition, with a full sort.
int32_t expected(Floats scores, const ec_sampling& p, float uniform) {
  for (int32_t i = 0; i < p.n_seen; ++i) {
    float& s = scores[p.seen[i]];
    s = s > 0 ? s / p.repetition : s * p.repetition;
    if (p.count[i] > 0) s -= p.presence;
    s -= p.frequency * static_cast<float>(p.count[i]);
  }
  Ints order;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (scores[i] > -INFINITY) order.push_back(static_cast<int32_t>(i));
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  if (p.temperature == 0) return order[0];
  if (p.top_k > 0 && p.top_k < static_cast<int32_t>(order.size())) order.resize(p.top_k);
  Doubles mass;
  double sum = 0, cumulative = 0;
  for (const int32_t id : order) {
    mass.push_back(std::exp((static_cast<double>(scores[id]) - scores[order[0]]) / p.temperature));
    sum += mass.back();
  }
  size_t kept = 0;
  while (kept < mass.size()) {
    cumulative += mass[kept++];
    if (p.top_p < 1 && cumulative >= p.top_p * sum) break;
  }
  while (kept > 1 && mass[kept - 1] < p.min_p) --kept;
  sum = cumulative = 0;
  for (size_t i = 0; i < kept; ++i) sum += mass[i];
  for (size_t i = 0; i < kept; ++i) {
    cumulative += mass[i];
    if (cumulative > static_cast<double>(uniform) * sum) return order[i];
  }
  return order[kept - 1];
}

void testRows(Lib& lib, int32_t vocab, const std::vector<ec_sampling>& params) {
  Rng rng(91 + vocab);
  const int32_t rows = static_cast<int32_t>(params.size());
  Floats logits = rng.normals(static_cast<size_t>(rows) * vocab, 3.0f), uniform(rows);
  for (float& u : uniform) u = rng.uniform();
  for (int32_t r = 0; r < rows && vocab > 4; ++r) {
    logits[r * vocab + 1] = NAN;
    logits[r * vocab + 2] = -INFINITY;
    logits[r * vocab + 3] = logits[r * vocab + vocab - 1];  // a tie
  }
  Ints token(rows, -7);
  Floats logprob(rows, NAN);
  const ec_sample args{logits.data(), params.data(),  uniform.data(),
                       token.data(),  logprob.data(), vocab};
  Batch batch;
  batch.add(1, 0);
  batch.outRow.assign(rows, 0);
  lib.ok(EC_OP_SAMPLE, batch.step(), &args, "sample");
  for (int32_t r = 0; r < rows; ++r) {
    const Floats row(logits.begin() + r * vocab, logits.begin() + (r + 1) * vocab);
    const int32_t want = expected(row, params[r], uniform[r]);
    lib.check(token[r] == want, "sample: vocab %d, row %d: token %d, expected %d", vocab, r,
              token[r], want);
    double sum = 0;
    for (const float v : row) sum += std::isnan(v) ? 0 : std::exp(static_cast<double>(v));
    lib.check(std::fabs(logprob[r] - (row[want] - std::log(sum))) < 1e-5,
              "sample: vocab %d, row %d: logprob %g", vocab, r, logprob[r]);
  }
}

void testRefusals(Lib& lib) {
  Floats logits(9, -INFINITY), uniform(1, 0.5f), logprob(1);
  Ints token(1);
  ec_sampling params{nullptr, nullptr, 1, 1, 0, 1, 0, 0, 0, 0};
  const ec_sample args{logits.data(), &params, uniform.data(), token.data(), logprob.data(), 9};
  Batch batch;
  batch.add(1, 0);
  batch.outRow = {0};
  lib.refuses(EC_OP_SAMPLE, batch.step(), &args, "all 9 logits");
  logits[3] = 1;
  params.temperature = -1;
  lib.refuses(EC_OP_SAMPLE, batch.step(), &args, "temperature is -1");
  params.temperature = 1;
  uniform[0] = 1;
  lib.refuses(EC_OP_SAMPLE, batch.step(), &args, "uniform[0] is 1");
}

}  // namespace

void testSample(Lib& lib) {
  const Ints seen{0, 4, 5}, count{0, 2, 1};
  const auto with = [&](float temperature, float topP, float minP, int32_t topK) {
    return ec_sampling{nullptr, nullptr, temperature, topP, minP, 1, 0, 0, topK, 0};
  };
  ec_sampling penalised = with(0.7f, 0.9f, 0.02f, 0), greedy = with(0, 1, 0, 0);
  for (ec_sampling* p : {&penalised, &greedy}) {
    p->seen = seen.data();
    p->count = count.data();
    p->n_seen = 3;
    p->repetition = 1.3f;
    p->presence = 0.5f;
    p->frequency = 0.25f;
  }
  for (const int32_t vocab : {6, 100, 5000}) {
    testRows(lib, vocab,
             {with(0, 1, 0, 0), with(1, 1, 0, 0), with(1, 0.95f, 0, 0), with(2.5f, 0.5f, 0, 40),
              with(0.6f, 0.95f, 0.05f, 20), with(1, 1, 0.3f, 0), with(8, 1, 0, 0),
              with(1e-6f, 1, 0, 0), with(1, 1, 0, 1), penalised, greedy});
  }
  testRows(lib, 1, {with(0, 1, 0, 0), with(1, 0.5f, 0, 3)});
  testRefusals(lib);
}

}  // namespace test
