// SPDX-License-Identifier: Apache-2.0
//
// What the op tests share: random numbers that are equal on every machine, checks that are counted,
// and calls of the C ABI with exactly the workspace it asked for.
#ifndef EC_TESTS_HARNESS_H
#define EC_TESTS_HARNESS_H

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "edgecascade.h"

namespace test {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Ints = std::vector<int32_t>;
using Bytes = std::vector<uint8_t>;

// Integer arithmetic and exact conversions only: the same numbers under qemu.
class Rng {
 public:
  explicit Rng(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33) ^ static_cast<uint32_t>(state_ >> 51);
  }
  int32_t below(int32_t n) { return static_cast<int32_t>(next() % static_cast<uint32_t>(n)); }
  float uniform() { return static_cast<float>(next() >> 7 & 0xffffff) * (1.0f / 16777216.0f); }
  // Nearly normal: the sum of four uniforms, variance 1.
  float normal() { return (uniform() + uniform() + uniform() + uniform() - 2.0f) * 1.7320508f; }
  Floats normals(size_t count, float scale = 1.0f) {
    Floats values(count);
    for (float& v : values) v = normal() * scale;
    return values;
  }

 private:
  uint64_t state_;
};

inline float halfToFloat(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const double value =
      exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return static_cast<float>(h & 0x8000 ? -value : value);
}

// fp16 values between 2^-6 and 2 in size, either sign.
inline std::vector<uint16_t> randomHalves(Rng& rng, size_t count) {
  std::vector<uint16_t> values(count);
  for (uint16_t& v : values) {
    v = static_cast<uint16_t>((rng.next() & 0x83ff) | static_cast<uint32_t>(9 + rng.below(7))
                                                          << 10);
  }
  return values;
}

// |got - want| / |want| over all elements; infinite when anything that should be finite is not.
template <class Want>
double relativeError(const Floats& got, const std::vector<Want>& want) {
  if (got.size() != want.size()) return INFINITY;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double d = static_cast<double>(got[i]) - static_cast<double>(want[i]);
    difference += d * d;
    norm += static_cast<double>(want[i]) * static_cast<double>(want[i]);
  }
  if (!std::isfinite(difference)) return INFINITY;
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

inline uint64_t fnv(const void* data, size_t bytes, uint64_t hash = 0xcbf29ce484222325u) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ p[i]) * 0x100000001b3u;
  return hash;
}
inline uint64_t fnv(const Floats& values, uint64_t hash = 0xcbf29ce484222325u) {
  return fnv(values.data(), values.size() * sizeof(float), hash);
}

// One ISA's table and a stream on it, and the count of what was checked.
class Lib {
 public:
  Lib(const ec_api* table, int threads) : api(table) {
    if (api->stream_create(threads, &stream_) != EC_OK) {
      std::printf("FAIL %s: stream_create: %s\n", api->isa, api->last_error());
      ++failed;
    }
  }
  ~Lib() { api->stream_destroy(stream_); }
  Lib(const Lib&) = delete;
  Lib& operator=(const Lib&) = delete;

  void check(bool good, const char* format, ...) __attribute__((format(printf, 3, 4))) {
    ++(good ? passed : failed);
    if (good) return;
    std::printf("FAIL %s: ", api->isa);
    va_list values;
    va_start(values, format);
    std::vprintf(format, values);
    va_end(values);
    std::printf("\n");
  }
  void near(double error, double bound, const std::string& what) {
    check(error <= bound, "%s: relative error %.3g, allowed %.3g", what.c_str(), error, bound);
  }

  // Runs an op with a workspace of exactly workspace_size() bytes, and checks that it stays inside.
  ec_status run(ec_op op, ec_step step, const void* args) {
    const ec_call call{args, op, 0};
    size_t bytes = 0;
    const ec_status sized = api->workspace_size(&step, &call, 1, &bytes);
    if (sized != EC_OK) return sized;
    Bytes memory(bytes + 256 + kGuard, 0xa5);
    const size_t skip = (256 - reinterpret_cast<uintptr_t>(memory.data()) % 256) % 256;
    step.workspace = memory.data() + skip;
    step.workspace_bytes = bytes;
    const ec_status status = api->op[op](stream_, &step, args);
    for (size_t i = skip + bytes; i < memory.size(); ++i) {
      if (memory[i] != 0xa5) {
        check(false, "op %d wrote beyond its workspace of %zu bytes", op, bytes);
        break;
      }
    }
    return status;
  }
  void ok(ec_op op, const ec_step& step, const void* args, const std::string& what) {
    const ec_status status = run(op, step, args);
    check(status == EC_OK, "%s: status %d: %s", what.c_str(), status,
          status == EC_OK ? "" : api->last_error());
  }
  // The op refuses, and its sentence names `word`.
  void refuses(ec_op op, const ec_step& step, const void* args, const char* word) {
    const ec_status status = run(op, step, args);
    const char* sentence = status == EC_OK ? "it ran" : api->last_error();
    check(status != EC_OK && std::strstr(sentence, word), "op %d should name '%s': %s", op, word,
          sentence);
  }
  ec_status pack(const ec_pack& args) { return api->pack(stream_, &args); }

  const ec_api* const api;
  int passed = 0;
  int failed = 0;

 private:
  static constexpr size_t kGuard = 4096;
  ec_stream stream_ = nullptr;
};

// The arrays behind an ec_step.
struct Batch {
  Ints start{0}, slot, past, pages, outRow;
  int32_t maxPages = 0, maxContext = 0;

  void add(int32_t tokens, int32_t inSlot, int32_t tokensBefore = 0) {
    start.push_back(start.back() + tokens);
    slot.push_back(inSlot);
    past.push_back(tokensBefore);
    if (tokens + tokensBefore > maxContext) maxContext = tokens + tokensBefore;
  }
  int32_t tokens() const { return start.back(); }
  ec_step step() const {
    ec_step s{};
    s.start = start.data();
    s.slot = slot.data();
    s.past = past.data();
    s.page_table = pages.data();
    s.out_row = outRow.data();
    s.n_tok = tokens();
    s.n_seq = static_cast<int32_t>(slot.size());
    s.n_out = static_cast<int32_t>(outRow.size());
    s.max_pages = maxPages;
    s.max_context = maxContext;
    return s;
  }
};

// A matrix (or several) in storage order and as the floats it stands for.
struct Weight {
  Bytes data;
  Floats dense;  // [experts][n][k]
  ec_weight view{};
};
Weight makeWeight(Lib& lib, Rng& rng, int32_t type, int32_t n, int32_t k, int32_t experts = 1,
                  float scale = 1.0f);
const char* typeName(int32_t type);

// y = gamma x / sqrt(mean(x^2) + eps) over each of the norm's groups
Doubles normed(const Floats& x, const ec_norm& norm, int32_t k);
// Activations as a matrix of `type` sees them: block types round 64 columns to int8.
Doubles rounded(const Doubles& x, int32_t k, int32_t type);
Doubles product(const Doubles& x, const float* w, int32_t n, int32_t k);

void testEmbed(Lib& lib);
void testLinear(Lib& lib);
void testHead(Lib& lib);
void testMamba(Lib& lib);
void testAttention(Lib& lib);
void testMoe(Lib& lib);
void testSample(Lib& lib);
// A hash of linear's results for fixed inputs: equal on every ISA of every machine.
uint64_t hashLinear(Lib& lib);

}  // namespace test

#endif  // EC_TESTS_HARNESS_H
