// SPDX-License-Identifier: Apache-2.0
//
// Runs the op tests on every ISA this CPU offers. The last line counts them; the exit status is 0
// only if all passed.
#include <sstream>

#include "harness.h"

namespace test {

const char* typeName(int32_t type) {
  switch (type) {
    case EC_F32:
      return "f32";
    case EC_F16:
      return "f16";
    case EC_U4_64:
      return "u4";
    default:
      return "i8";
  }
}

Weight makeWeight(Lib& lib, Rng& rng, int32_t type, int32_t n, int32_t k, int32_t experts,
                  float scale) {
  Weight w;
  const size_t values = static_cast<size_t>(n) * k;
  uint64_t bytes = 0;
  lib.check(lib.api->weight_bytes(type, n, k, &bytes) == EC_OK, "weight_bytes %s %d %d",
            typeName(type), n, k);
  const uint64_t stride = (bytes + 63) / 64 * 64;
  w.data.resize(stride * experts + 64);
  uint8_t* base = w.data.data() + (64 - reinterpret_cast<uintptr_t>(w.data.data()) % 64) % 64;
  w.view = {base, stride, n, k, type, experts};
  w.dense.resize(values * experts);
  for (int32_t e = 0; e < experts; ++e) {
    uint8_t* to = base + e * stride;
    float* dense = w.dense.data() + e * values;
    if (type == EC_F16) {
      const std::vector<uint16_t> halves = randomHalves(rng, values);
      std::memcpy(to, halves.data(), values * 2);
      for (size_t i = 0; i < values; ++i) dense[i] = halfToFloat(halves[i]);
    } else {
      const Floats source = rng.normals(values, scale);
      if (type == EC_F32) {
        std::memcpy(to, source.data(), values * 4);
        std::memcpy(dense, source.data(), values * 4);
        continue;
      }
      const ec_status packed = lib.pack({source.data(), to, bytes, EC_F32, type, n, k});
      lib.check(packed == EC_OK, "pack %s [%d][%d]: %s", typeName(type), n, k,
                packed == EC_OK ? "" : lib.api->last_error());
      lib.check(lib.api->unpack(&w.view, e, dense) == EC_OK, "unpack %s", typeName(type));
    }
  }
  return w;
}

Doubles normed(const Floats& x, const ec_norm& norm, int32_t k) {
  Doubles y(x.begin(), x.end());
  if (!norm.gamma) return y;
  const int32_t part = k / norm.groups;
  for (size_t from = 0; from < y.size(); from += part) {
    double squares = 0;
    for (int32_t i = 0; i < part; ++i) squares += y[from + i] * y[from + i];
    const double scale = 1 / std::sqrt(squares / part + norm.eps);
    for (int32_t i = 0; i < part; ++i) y[from + i] *= scale * norm.gamma[(from + i) % k];
  }
  return y;
}

Doubles rounded(const Doubles& x, int32_t k, int32_t type) {
  if (type != EC_U4_64 && type != EC_I8_64) return x;
  Doubles y(x);
  for (size_t row = 0; row < y.size(); row += k) {
    for (int32_t from = 0; from < k; from += 64) {
      const int32_t end = from + 64 < k ? from + 64 : k;
      float peak = 0;
      for (int32_t i = from; i < end; ++i) {
        peak = std::fmax(peak, std::fabs(static_cast<float>(x[row + i])));
      }
      if (peak == 0) continue;
      const float inverse = 127.0f / peak, scale = peak / 127.0f;
      for (int32_t i = from; i < end; ++i) {
        y[row + i] =
            std::nearbyintf(static_cast<float>(x[row + i]) * inverse) * static_cast<double>(scale);
      }
    }
  }
  return y;
}

Doubles product(const Doubles& x, const float* w, int32_t n, int32_t k) {
  const size_t tokens = x.size() / k;
  Doubles y(tokens * n);
  for (size_t t = 0; t < tokens; ++t) {
    for (int32_t r = 0; r < n; ++r) {
      double sum = 0;
      for (int32_t i = 0; i < k; ++i) {
        sum += x[t * k + i] * static_cast<double>(w[static_cast<size_t>(r) * k + i]);
      }
      y[t * n + r] = sum;
    }
  }
  return y;
}

namespace {

struct Total {
  int passed = 0, failed = 0;
  uint64_t hash = 0;
};

void runIsa(const char* isa, Total& total) {
  const ec_api* api = ec_cpu(isa);
  if (!api) {
    std::printf("FAIL %s: listed by ec_cpu_isas(), but ec_cpu() returns NULL\n", isa);
    ++total.failed;
    return;
  }
  Lib lib(api, 3);
  for (auto* run :
       {testEmbed, testLinear, testHead, testMamba, testAttention, testMoe, testSample}) {
    run(lib);
  }
  const uint64_t hash = hashLinear(lib);
  if (total.hash == 0) total.hash = hash;
  lib.check(hash == total.hash, "linear's bits differ from the first ISA's");
  std::printf("%s: %d passed, %d failed, linear %016llx\n", isa, lib.passed, lib.failed,
              static_cast<unsigned long long>(hash));
  total.passed += lib.passed;
  total.failed += lib.failed;
}

}  // namespace
}  // namespace test

int main() {
  test::Total total;
  std::istringstream isas(ec_cpu_isas());
  for (std::string isa; isas >> isa;) test::runIsa(isa.c_str(), total);
  // Not listed: it is no way to run a model. It exists so that AMX's tile code is tested on
  // machines without it.
  if (ec_cpu("amx-emulated")) test::runIsa("amx-emulated", total);
  std::printf("%d passed, %d failed\n", total.passed, total.failed);
  return total.failed == 0 && total.passed > 0 ? 0 : 1;
}
