// SPDX-License-Identifier: Apache-2.0
//
// Fibers, their order, and barriers. One launch at a time: the lock is held from its first block to
// its last.
#include "emulator.h"

#include <dlfcn.h>
#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

namespace ec::emulator {

dim3 block, blocks, threads;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kMaxThreads = 1024;

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Fiber {
  Thread thread;
  State state = State::kDone;
  bool started = false;
  jmp_buf at;
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
};

struct Warp {
  uint32_t slots[32][8];
  int arrived = 0;
};

std::mutex launching;
std::vector<Fiber> fibers(kMaxThreads);
std::vector<Warp> warps(kMaxThreads / 32);
std::vector<unsigned char> shared;
const std::function<void()>* body;
jmp_buf scheduler;
Fiber* current;
int count, atBlockBarrier;
std::minstd_rand random(1);

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u,%u,%u of %u,%u,%u)\n", what, block.x, block.y,
               block.z, blocks.x, blocks.y, blocks.z);
  std::abort();
}

void leave() {
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

void fiberMain() {
  for (;;) {
    (*body)();
    current->state = State::kDone;
    leave();
  }
}

void enter(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  fiber.stack = std::make_unique<unsigned char[]>(kStackBytes);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiberMain, 0);
  setcontext(&fiber.context);
}

// All threads that have not ended are there: a thread that ended does not count.
void releaseBlock() {
  int running = 0;
  for (int i = 0; i < count; ++i) running += fibers[i].state != State::kDone;
  if (atBlockBarrier == 0 || atBlockBarrier < running) return;
  atBlockBarrier = 0;
  for (int i = 0; i < count; ++i) {
    if (fibers[i].state == State::kAtBlockBarrier) fibers[i].state = State::kReady;
  }
}

void runBlock(size_t sharedBytes) {
  shared.assign(sharedBytes + 1024, 0xff);
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    const unsigned n = static_cast<unsigned>(i);
    fiber.thread.index =
        dim3(n % threads.x, n / threads.x % threads.y, n / (threads.x * threads.y));
    fiber.thread.lane = i % 32;
    fiber.thread.warp = i / 32;
    fiber.state = State::kReady;
    order[i] = i;
  }
  for (Warp& warp : warps) warp.arrived = 0;
  atBlockBarrier = 0;
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    bool ran = false, over = true;
    for (const int i : order) {
      if (fibers[i].state == State::kReady) {
        enter(fibers[i]);
        ran = true;
      }
      over &= fibers[i].state == State::kDone;
    }
    if (over) return;
    releaseBlock();
    if (ran) continue;
    for (int i = 0; i < count; ++i) ran |= fibers[i].state == State::kReady;
    if (!ran) die("threads wait at a barrier that others never reach");
  }
}

}  // namespace

const Thread& thread() { return current->thread; }
unsigned char* sharedMemory() {
  const uintptr_t at = reinterpret_cast<uintptr_t>(shared.data());
  return shared.data() + (1024 - at % 1024) % 1024;
}
uint32_t (*warpSlots())[8] { return warps[current->thread.warp].slots; }

void blockBarrier() {
  current->state = State::kAtBlockBarrier;
  ++atBlockBarrier;
  leave();
}

void warpBarrier(unsigned mask) {
  const int first = current->thread.warp * 32;
  if (!(mask >> current->thread.lane & 1)) die("a lane outside the mask of its warp operation");
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= count || fibers[first + lane].state == State::kDone) {
      die("a lane of a warp operation's mask has ended");
    }
  }
  Warp& warp = warps[current->thread.warp];
  if (++warp.arrived < __builtin_popcount(mask)) {
    current->state = State::kAtWarpBarrier;
    leave();
    return;
  }
  warp.arrived = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1 && fibers[first + lane].state == State::kAtWarpBarrier) {
      fibers[first + lane].state = State::kReady;
    }
  }
}

namespace {

struct Work {
  dim3 grid, size;
  size_t sharedBytes;
  std::function<void()> kernel;
};

void perform(void* data) {
  const Work& work = *static_cast<Work*>(data);
  const std::lock_guard<std::mutex> lock(launching);
  count = static_cast<int>(work.size.x * work.size.y * work.size.z);
  if (count < 1 || count > kMaxThreads) die("a block has 1 to 1024 threads");
  const dim3 grid = blocks = work.grid;
  threads = work.size;
  body = &work.kernel;
  const uint64_t total = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t first = total ? random() % total : 0;
  for (uint64_t n = 0; n < total; ++n) {
    const uint64_t at = (first + n) % total;
    block = dim3(static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                 static_cast<unsigned>(at / (uint64_t{grid.x} * grid.y)));
    runBlock(work.sharedBytes);
  }
}

using HostFunction = int (*)(void* stream, void (*call)(void*), void* data);

// cuLaunchHostFunc of the driver that this process has loaded.
HostFunction driver() {
  static const HostFunction found = [] {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<HostFunction>(dlsym(library, "cuLaunchHostFunc")) : nullptr;
  }();
  return found;
}

}  // namespace

void* ownStream() {
  static int only;
  return &only;
}

void launch(dim3 grid, dim3 size, size_t sharedBytes, void* stream, std::function<void()> kernel) {
  auto work = std::make_unique<Work>(Work{grid, size, sharedBytes, std::move(kernel)});
  if (stream == ownStream() || !driver()) return perform(work.get());
  // A graph may launch it again, so it is kept for good.
  if (driver()(stream, perform, work.release())) die("the driver's stand-in refused a launch");
}

}  // namespace ec::emulator

float __half2float(__half h) {
  const uint32_t sign = uint32_t{h.bits} >> 15 << 31, exponent = h.bits >> 10 & 31,
                 mantissa = h.bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  const float value = exponent ? std::ldexp(float(mantissa | 0x400), int(exponent) - 25)
                               : std::ldexp(float(mantissa), -24);
  return sign ? -value : value;
}

__half __float2half_rn(float f) {
  const uint32_t bits = __float_as_uint(f);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const float size = std::fabs(f);
  if (std::isnan(f)) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (size < 6.103515625e-05f) {  // subnormal, or rounds up to the smallest normal
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(size * 16777216.f)))};
  }
  int exponent;
  const float part = std::frexp(size, &exponent);                              // in [0.5, 1)
  const auto mantissa = static_cast<uint32_t>(std::nearbyint(part * 2048.f));  // 1024 to 2048
  return {static_cast<uint16_t>(sign + ((exponent + 13) << 10) + mantissa)};
}
