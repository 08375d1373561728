// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

namespace test {
namespace {

struct Shape {
  int32_t heads, dim, groups, state, kernel, chunk;
  int32_t inner() const { return heads * dim; }
  int32_t channels() const { return inner() + 2 * groups * state; }
  int32_t row() const { return inner() + channels() + heads; }
};

struct Model {
  Shape m;
  Floats weight, bias, a, d, dtBias;
  Model(Rng& rng, const Shape& shape)
      : m(shape),
        weight(rng.normals(static_cast<size_t>(shape.kernel) * shape.channels(), 0.4f)),
        bias(rng.normals(shape.channels(), 0.2f)),
        a(shape.heads),
        d(rng.normals(shape.heads)),
        dtBias(rng.normals(shape.heads, 2.0f)) {
    for (float& v : a) v = -(0.1f + 8.0f * rng.uniform());
  }
  ec_mamba args(const Floats& in, Floats& conv, Floats& ssm, Floats& y) const {
    return {in.data(),     weight.data(), bias.data(), a.data(), d.data(),
            dtBias.data(), conv.data(),   ssm.data(),  y.data(), m.heads,
            m.dim,         m.groups,      m.state,     m.kernel, m.chunk};
  }
};

double silu(double x) { return x / (1 + std::exp(-x)); }

// One token of one slot, in double: the definition, token after token.
class Reference {
 public:
  Reference(const Model& model, const Floats& conv, const Floats& ssm)
      : model_(model), conv_(conv.begin(), conv.end()), ssm_(ssm.begin(), ssm.end()) {}

  void token(int32_t slot, int32_t position, const float* in, double* y) {
    const Shape& m = model_.m;
    double* ring = conv_.data() + static_cast<size_t>(slot) * m.kernel * m.channels();
    const auto at = [&](int32_t p) { return ring + (p + m.kernel) % m.kernel * m.channels(); };
    for (int32_t c = 0; c < m.channels(); ++c) at(position)[c] = in[m.inner() + c];
    Doubles xbc(model_.bias.begin(), model_.bias.end());
    for (int32_t c = 0; c < m.channels(); ++c) {
      for (int32_t j = 0; j < m.kernel; ++j) {
        xbc[c] += model_.weight[j * m.channels() + c] * at(position - m.kernel + 1 + j)[c];
      }
      xbc[c] = silu(xbc[c]);
    }
    for (int32_t h = 0; h < m.heads; ++h) head(slot, h, in, xbc, y + h * m.dim);
  }
  const Doubles& ssm() const { return ssm_; }
  const Doubles& conv() const { return conv_; }

 private:
  void head(int32_t slot, int32_t h, const float* in, const Doubles& xbc, double* y) {
    const Shape& m = model_.m;
    const double* b = xbc.data() + m.inner() + h / (m.heads / m.groups) * m.state;
    const double* c = b + m.groups * m.state;
    const double raw = static_cast<double>(in[m.row() - m.heads + h]) + model_.dtBias[h];
    const double dt = raw > 30 ? raw : std::log1p(std::exp(raw)),
                 decay = std::exp(dt * model_.a[h]);
    double* s = ssm_.data() + (static_cast<size_t>(slot) * m.heads + h) * m.dim * m.state;
    for (int32_t p = 0; p < m.dim; ++p) {
      const double x = xbc[h * m.dim + p];
      double sum = 0;
      for (int32_t n = 0; n < m.state; ++n, ++s) {
        *s = decay * *s + dt * x * b[n];
        sum += *s * c[n];
      }
      y[p] = (sum + model_.d[h] * x) * silu(in[h * m.dim + p]);
    }
  }

  const Model& model_;
  Doubles conv_, ssm_;
};

std::string name(const Shape& m, const char* op, int32_t tokens) {
  return std::string(op) + " heads " + std::to_string(m.heads) + " dim " + std::to_string(m.dim) +
         " groups " + std::to_string(m.groups) + " state " + std::to_string(m.state) + " kernel " +
         std::to_string(m.kernel) + " chunk " + std::to_string(m.chunk) + ", " +
         std::to_string(tokens) + " tokens";
}

// Sequences of the given lengths, in slots 1, 3, 5 ..: y and states against the definition. Slots
// between stay as they were.
void testBatch(Lib& lib, const Shape& m, ec_op op, const Ints& lengths) {
  Rng rng(31 + m.state);
  const Model model(rng, m);
  const int32_t slots = 2 * static_cast<int32_t>(lengths.size()) + 1;
  Floats conv = rng.normals(static_cast<size_t>(slots) * m.kernel * m.channels());
  Floats ssm = rng.normals(static_cast<size_t>(slots) * m.inner() * m.state, 0.3f);
  Batch batch;
  for (size_t s = 0; s < lengths.size(); ++s) {
    batch.add(lengths[s], 2 * static_cast<int32_t>(s) + 1, static_cast<int32_t>(5 * s + 3));
  }
  const Floats in = rng.normals(static_cast<size_t>(batch.tokens()) * m.row());
  Reference reference(model, conv, ssm);
  Doubles want(static_cast<size_t>(batch.tokens()) * m.inner());
  for (size_t s = 0; s < lengths.size(); ++s) {
    for (int32_t t = 0; t < lengths[s]; ++t) {
      const size_t row = batch.start[s] + t;
      reference.token(batch.slot[s], batch.past[s] + t, in.data() + row * m.row(),
                      want.data() + row * m.inner());
    }
  }
  Floats y(want.size(), NAN);
  const ec_mamba args = model.args(in, conv, ssm, y);
  const std::string what = name(m, op == EC_OP_MAMBA_STEP ? "step" : "prefill", batch.tokens());
  lib.ok(op, batch.step(), &args, what);
  lib.near(relativeError(y, want), 1e-5, what + ", y");
  lib.near(relativeError(ssm, reference.ssm()), 1e-5, what + ", state");
  lib.check(Doubles(conv.begin(), conv.end()) == reference.conv(), "%s: conv ring", what.c_str());
}

// A long decay and a dt of 3e4: exponents far below what exp can hold.
void testExtremes(Lib& lib) {
  const Shape m{2, 8, 1, 16, 4, 16};
  Rng rng(77);
  Model model(rng, m);
  Floats conv(m.kernel * m.channels()), ssm(m.inner() * m.state), y(20 * m.inner(), NAN);
  Floats in = rng.normals(20 * m.row());
  for (int32_t t = 0; t < 20; ++t) {
    in[t * m.row() + m.row() - 2] = t % 3 ? -40.0f : 3e4f;
    in[t * m.row() + m.row() - 1] = 60.0f;
  }
  Batch batch;
  batch.add(20, 0);
  Reference reference(model, conv, ssm);
  Doubles want(y.size());
  for (int32_t t = 0; t < 20; ++t) {
    reference.token(0, t, in.data() + t * m.row(), want.data() + t * m.inner());
  }
  const ec_mamba args = model.args(in, conv, ssm, y);
  lib.ok(EC_OP_MAMBA_PREFILL, batch.step(), &args, "prefill, huge dt");
  lib.near(relativeError(y, want), 1e-5, "prefill, huge dt, y");
  lib.near(relativeError(ssm, reference.ssm()), 1e-5, "prefill, huge dt, state");
}

void testRefusals(Lib& lib) {
  const Shape m{2, 4, 2, 8, 4, 16};
  Rng rng(5);
  const Model model(rng, m);
  Floats in(2 * m.row()), conv(2 * m.kernel * m.channels()), ssm(2 * m.inner() * m.state),
      y(2 * m.inner());
  Batch batch;
  batch.add(2, 0);
  const ec_mamba good = model.args(in, conv, ssm, y);
  lib.refuses(EC_OP_MAMBA_STEP, batch.step(), &good, "2 tokens");
  ec_mamba bad = good;
  bad.kernel = 9;
  lib.refuses(EC_OP_MAMBA_PREFILL, batch.step(), &bad, "kernel is 9");
  bad = good;
  bad.groups = 3;
  lib.refuses(EC_OP_MAMBA_PREFILL, batch.step(), &bad, "groups 3");
  batch.slot[0] = -2;
  lib.refuses(EC_OP_MAMBA_PREFILL, batch.step(), &good, "slot[0] is -2");
}

}  // namespace

void testMamba(Lib& lib) {
  for (const Shape& m : {Shape{4, 16, 2, 16, 4, 8}, Shape{3, 5, 1, 24, 2, 7},
                         Shape{2, 80, 2, 1, 8, 128}, Shape{1, 1, 1, 80, 3, 1}}) {
    testBatch(lib, m, EC_OP_MAMBA_STEP, {1, 1, 1});
    testBatch(lib, m, EC_OP_MAMBA_PREFILL, {1, 3, 37});
  }
  testBatch(lib, {2, 64, 1, 128, 4, 128}, EC_OP_MAMBA_PREFILL, {129});
  testBatch(lib, {2, 64, 1, 128, 4, 128}, EC_OP_MAMBA_STEP, {1});
  testExtremes(lib);
  testRefusals(lib);
}

}  // namespace test
