// SPDX-License-Identifier: Apache-2.0
//
// ec_cpu(): which ISAs this machine runs, and the ABI's table for each of them.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

struct ec_stream_s {
  ec::Pool pool;
};

namespace ec {

namespace portable {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512vnni {
const Kernels& kernels();
}
namespace amx {
const Kernels& kernels();
}
namespace amx_emulated {
const Kernels& kernels();
}
namespace neon {
const Kernels& kernels();
}
namespace i8mm {
const Kernels& kernels();
}

namespace {

constexpr int kMaxThreads = 256;

// Nothing may leave through the C border but a status.
template <class F>
ec_status guarded(const char* what, F&& body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fail(EC_DEVICE, "%s: out of memory", what);
  } catch (const std::exception& error) {
    return fail(EC_DEVICE, "%s: %s", what, error.what());
  }
}

struct Machine {
  bool avx2 = false, avx512vnni = false, amx = false, neon = false, i8mm = false;
};

#if defined(__x86_64__)
uint64_t enabledStates() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux hands out the AMX registers on request only.
bool requestAmx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Machine detect() {
  const auto has = [](uint32_t word, std::initializer_list<int> bits) {
    return std::all_of(bits.begin(), bits.end(), [word](int bit) { return word >> bit & 1; });
  };
  Machine machine;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, {12, 27, 28, 29}))
    return machine;  // FMA OSXSAVE AVX F16C
  const uint64_t states = enabledStates();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return machine;
  machine.avx2 = (states & 0x6) == 0x6 && has(b, {5, 8});  // AVX2 BMI2
  machine.avx512vnni = machine.avx2 && (states & 0xe6) == 0xe6 && has(b, {16, 17, 30, 31}) &&
                       has(c, {11});  // F DQ BW VL, VNNI
  machine.amx = machine.avx512vnni && (states & 0x60000) == 0x60000 && has(d, {24, 25}) &&
                requestAmx();  // TILE INT8
  return machine;
}
#elif defined(__aarch64__)
Machine detect() {
  constexpr unsigned long kDotProduct = 1ul << 20, kHalfMaths = 1ul << 10, kI8mm = 1ul << 13;
  Machine machine;
  const unsigned long caps = getauxval(AT_HWCAP);
  machine.neon = (caps & kDotProduct) && (caps & kHalfMaths);
  machine.i8mm = machine.neon && (getauxval(AT_HWCAP2) & kI8mm);
  return machine;
}
#else
Machine detect() { return {}; }
#endif

const Machine& machine() {
  static const Machine detected = detect();
  return detected;
}

std::string cpuName() {
  std::string name;
  if (FILE* file = std::fopen("/proc/cpuinfo", "r")) {
    char line[256];
    while (name.empty() && std::fgets(line, sizeof line, file)) {
      const char* colon = std::strchr(line, ':');
      if (colon && (!std::strncmp(line, "model name", 10) || !std::strncmp(line, "Model", 5))) {
        name.assign(colon + 2, std::strcspn(colon + 2, "\n"));
      }
    }
    std::fclose(file);
  }
  return name.empty() ? "unknown CPU" : name;
}

ec_status streamCreate(int32_t threads, ec_stream* out) noexcept {
  return guarded("stream_create", [&] {
    EC_TRY(checkPointer("stream_create", "out", out));
    if (threads > kMaxThreads) {
      return fail(EC_INVALID, "stream_create: threads is %d; at most %d", threads, kMaxThreads);
    }
    *out = new ec_stream_s{Pool(threads > 0 ? threads : defaultThreads())};
    return EC_OK;
  });
}

void streamDestroy(ec_stream stream) noexcept { delete stream; }

ec_status streamThreads(ec_stream stream, int32_t* out) noexcept {
  EC_TRY(checkPointer("stream_threads", "stream", stream));
  EC_TRY(checkPointer("stream_threads", "out", out));
  *out = stream->pool.threads();
  return EC_OK;
}

ec_status weightBytesOf(int32_t type, int32_t n, int32_t k, uint64_t* bytes) noexcept {
  EC_TRY(checkPointer("weight_bytes", "bytes", bytes));
  EC_TRY(checkWeight("weight_bytes", "weight", {nullptr, 0, n, k, type, 1}));
  *bytes = weightBytes(type, n, k);
  return EC_OK;
}

// fp16 and blocks to float32. Exact, and only for checks: no ISA variants.
ec_status unpack(const ec_weight* w, int32_t expert, float* dst) noexcept {
  EC_TRY(checkPointer("unpack", "w", w));
  EC_TRY(checkPointer("unpack", "w.data", w->data));
  EC_TRY(checkPointer("unpack", "dst", dst));
  EC_TRY(checkWeight("unpack", "w", *w));
  if (expert < 0 || expert >= std::max(1, w->experts)) {
    return fail(EC_INVALID, "unpack: expert is %d, outside 0..%d", expert,
                std::max(1, w->experts) - 1);
  }
  const uint8_t* data =
      static_cast<const uint8_t*>(w->data) + w->expert_stride * static_cast<uint64_t>(expert);
  const int64_t n = w->n, k = w->k, groups = (k + kGroup - 1) / kGroup;
  const auto half = [](const uint8_t* at) {
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    return EC_ISA::h2f(bits);
  };
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t column = 0; column < k; ++column) {
      float& value = dst[row * k + column];
      const int64_t block = row / kBlockRows * groups + column / kGroup, r = row % kBlockRows,
                    i = column % kGroup;
      if (w->type == EC_F32) {
        std::memcpy(&value, data + (row * k + column) * 4, 4);
      } else if (w->type == EC_F16) {
        value = half(data + (row * k + column) * 2);
      } else if (w->type == EC_I8_64) {
        const uint8_t* at = data + block * kI8BlockBytes;
        value = static_cast<float>(static_cast<int8_t>(at[(i / 4 * kBlockRows + r) * 4 + i % 4])) *
                half(at + 2048 + 2 * r);
      } else {
        const uint8_t* at = data + block * kU4BlockBytes;
        const int pair = at[(i / 8 * kBlockRows + r) * 4 + i % 4];
        const int code = i % 8 < 4 ? pair & 15 : pair >> 4;
        value = static_cast<float>(code - 8) * half(at + 1024 + 2 * r);
      }
    }
  }
  return EC_OK;
}

// The ABI of one ISA.
template <const Kernels& (*kernels)()>
struct Backend {
  template <class Args>
  static ec_status runOp(Op<Args> Kernels::*op, ec_stream stream, const ec_step* step,
                         const void* args) noexcept {
    return guarded("op", [&] {
      EC_TRY(checkPointer("op", "stream", stream));
      EC_TRY(checkPointer("op", "step", step));
      EC_TRY(checkPointer("op", "args", args));
      return (kernels().*op).run(stream->pool, *step, *static_cast<const Args*>(args));
    });
  }

  template <auto op>
  static ec_status run1(ec_stream stream, const ec_step* step, const void* args) noexcept {
    return runOp(op, stream, step, args);
  }

  template <class Args>
  static ec_status measure(Op<Args> Kernels::*op, const ec_step& step, const void* args,
                           size_t* bytes) {
    return (kernels().*op).workspace(step, *static_cast<const Args*>(args), bytes);
  }

  static ec_status measureCall(const ec_step& step, const ec_call& call, size_t* bytes) {
    switch (call.op) {
      case EC_OP_EMBED:
        return measure(&Kernels::embed, step, call.args, bytes);
      case EC_OP_LINEAR:
        return measure(&Kernels::linear, step, call.args, bytes);
      case EC_OP_MAMBA_STEP:
        return measure(&Kernels::mambaStep, step, call.args, bytes);
      case EC_OP_MAMBA_PREFILL:
        return measure(&Kernels::mambaPrefill, step, call.args, bytes);
      case EC_OP_ATTENTION_DECODE:
        return measure(&Kernels::attentionDecode, step, call.args, bytes);
      case EC_OP_ATTENTION_PREFILL:
        return measure(&Kernels::attentionPrefill, step, call.args, bytes);
      case EC_OP_MOE:
        return measure(&Kernels::moe, step, call.args, bytes);
      case EC_OP_HEAD:
        return measure(&Kernels::head, step, call.args, bytes);
      case EC_OP_SAMPLE:
        return measure(&Kernels::sample, step, call.args, bytes);
      default:
        return fail(EC_INVALID, "call.op is %d, outside 0..%d", call.op, EC_OP_COUNT - 1);
    }
  }

  static ec_status workspaceSize(const ec_step* step, const ec_call* calls, int32_t n,
                                 size_t* bytes) noexcept {
    return guarded("workspace_size", [&] {
      EC_TRY(checkPointer("workspace_size", "step", step));
      EC_TRY(checkPointer("workspace_size", "calls", calls));
      EC_TRY(checkPointer("workspace_size", "bytes", bytes));
      size_t most = 0;
      for (int32_t i = 0; i < n; ++i) {
        EC_TRY(checkPointer("workspace_size", "call.args", calls[i].args));
        size_t needed = 0;
        EC_TRY(measureCall(*step, calls[i], &needed));
        most = std::max(most, needed);
      }
      *bytes = most;
      return EC_OK;
    });
  }

  static ec_status runCalls(ec_stream stream, const ec_step* step, const ec_call* calls, int32_t n,
                            int32_t* failed) noexcept {
    EC_TRY(checkPointer("run", "calls", calls));
    for (int32_t i = 0; i < n; ++i) {
      const int32_t op = calls[i].op;
      const ec_status status =
          op < 0 || op >= EC_OP_COUNT
              ? fail(EC_INVALID, "call.op is %d, outside 0..%d", op, EC_OP_COUNT - 1)
              : api().op[op](stream, step, calls[i].args);
      if (status != EC_OK) {
        if (failed) *failed = i;
        return status;
      }
    }
    return EC_OK;
  }

  static ec_status query(ec_device* out) noexcept {
    return guarded("query", [&] {
      EC_TRY(checkPointer("query", "out", out));
      *out = {};
      std::snprintf(out->name, sizeof out->name, "%s", cpuName().c_str());
      std::snprintf(out->isa, sizeof out->isa, "%s", kernels().isa);
      out->threads = defaultThreads();
      const long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
      out->l2_bytes = l2 > 0 ? static_cast<int32_t>(l2) : 0;
      out->memory_bytes = static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) *
                          static_cast<uint64_t>(sysconf(_SC_PAGE_SIZE));
      out->read_bytes_per_s = readBytesPerSecond();
      return EC_OK;
    });
  }

  static ec_status packWeights(ec_stream stream, const ec_pack* args) noexcept {
    return guarded("pack", [&] {
      EC_TRY(checkPointer("pack", "stream", stream));
      EC_TRY(checkPointer("pack", "args", args));
      return kernels().pack(stream->pool, *args);
    });
  }

  static const ec_api& api() {
    static const ec_api table = {
        EC_ABI_VERSION,
        0,
        "cpu",
        kernels().isa,
        lastError,
        query,
        streamCreate,
        streamDestroy,
        streamThreads,
        {run1<&Kernels::embed>, run1<&Kernels::linear>, run1<&Kernels::mambaStep>,
         run1<&Kernels::mambaPrefill>, run1<&Kernels::attentionDecode>,
         run1<&Kernels::attentionPrefill>, run1<&Kernels::moe>, run1<&Kernels::head>,
         run1<&Kernels::sample>},
        runCalls,
        workspaceSize,
        weightBytesOf,
        packWeights,
        unpack,
    };
    return table;
  }
};

struct Entry {
  const char* isa;
  bool runs;
  bool listed;
  const ec_api& (*api)();
};

// Slowest first.
const Entry* entries(int* count) {
  static const Entry table[] = {
    {"portable", true, true, Backend<portable::kernels>::api},
#if EC_HAVE_AVX2
    {"avx2", machine().avx2, true, Backend<avx2::kernels>::api},
#endif
#if EC_HAVE_AVX512VNNI
    {"avx512vnni", machine().avx512vnni, true, Backend<avx512vnni::kernels>::api},
#endif
#if EC_HAVE_AMX_EMULATED
    // The AMX kernels over tiles in plain C++, so that machines without AMX can test them.
    {"amx-emulated", machine().avx512vnni, false, Backend<amx_emulated::kernels>::api},
#endif
#if EC_HAVE_AMX
    {"amx", machine().amx, true, Backend<amx::kernels>::api},
#endif
#if EC_HAVE_NEON
    {"neon", machine().neon, true, Backend<neon::kernels>::api},
#endif
#if EC_HAVE_I8MM
    {"i8mm", machine().i8mm, true, Backend<i8mm::kernels>::api},
#endif
  };
  *count = sizeof table / sizeof *table;
  return table;
}

}  // namespace
}  // namespace ec

extern "C" __attribute__((visibility("default"))) const ec_api* ec_cpu(const char* isa) {
  int count = 0;
  const ec::Entry* table = ec::entries(&count);
  const bool any = !isa || !*isa;
  for (int i = count - 1; i >= 0; --i) {
    const ec::Entry& entry = table[i];
    if (entry.runs && (any ? entry.listed : !std::strcmp(isa, entry.isa))) return &entry.api();
  }
  return nullptr;
}

extern "C" __attribute__((visibility("default"))) const char* ec_cpu_isas(void) {
  static const std::string names = [] {
    std::string joined;
    int count = 0;
    const ec::Entry* table = ec::entries(&count);
    for (int i = 0; i < count; ++i) {
      if (!table[i].runs || !table[i].listed) continue;
      if (!joined.empty()) joined += ' ';
      joined += table[i].isa;
    }
    return joined;
  }();
  return names.c_str();
}
