// SPDX-License-Identifier: Apache-2.0
//
// Fibers, their order, barriers, asynchronous copies, and launches that begin early. One launch at
// a time: the lock is held from its first block to its last.
#include "emulator.h"

#include <dlfcn.h>
#include <ucontext.h>
#include <unistd.h>

#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <vector>

#include "bounds.h"
#include "races.h"

// Where the linker puts __shared__ variables; both are NULL where a library has none.
extern unsigned char __start_ec_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_ec_shared[] __attribute__((weak, visibility("hidden")));

namespace ec::emulator {

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kMaxThreads = 1024;
constexpr unsigned kMaxGrid = 65535;  // but for x
constexpr size_t kMaxShared = 227 << 10;

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kAtEarlier, kDone };

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  const void* place;  // that started it
  bool read;
  unsigned char bytes[16];
};

struct Fiber {
  Thread thread;
  State state = State::kDone;
  bool started = false, cameThrough = false;
  std::deque<std::vector<Copy>> groups;  // of copies under way; the last one is open
  jmp_buf at;
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
};

struct Warp {
  uint32_t slots[32][8];
  unsigned alive, waiting;  // lanes
  unsigned masks[32];       // with which they wait
};

struct Work;

// One block on its way.
struct Block {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  std::vector<Warp> warps = std::vector<Warp>(kMaxThreads / 32);
  Fenced shared{"the dynamic shared memory", kMaxShared};
  std::vector<unsigned char> variables;  // __shared__ ones of a block that others have overtaken
  std::vector<int> order;
  const Work* work;
  dim3 at, grid;
  uint64_t number, openedAt;
  int count, atBlockBarrier;
  bool earlierEnded;
  races::Progress progress;
};

struct Work {
  dim3 grid, size;
  size_t sharedBytes;
  bool early;
  std::function<void()> kernel;
  Work* next = nullptr;                 // in the same call of the library
  uint32_t launch = 0, overlapped = 0;  // their numbers: its own, and the first that may still run
  std::unique_ptr<Block> begun;

  uint64_t total() const { return uint64_t{grid.x} * grid.y * grid.z; }
};

std::mutex launching;
std::vector<std::unique_ptr<Block>> spare;
jmp_buf scheduler;
Block* running;
Fiber* current;
uint64_t performed;  // launches
uint32_t numbered;   // and those of which a block has begun
std::set<uintptr_t> prefetched;
int sentences = STDERR_FILENO;  // where they go
std::minstd_rand random(1);

void leave() {
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

void fiberMain() {
  for (;;) {
    running->work->kernel();
    if (running->work->early && !current->cameThrough) {
      die("a thread of a launch that may begin early has ended without awaitEarlier()");
    }
    current->state = State::kDone;
    running->warps[current->thread.warp].alive &= ~(1u << current->thread.lane);
    leave();
  }
}

void enter(Fiber& fiber) {
  current = &fiber;
  if (!fiber.stack) fiber.stack.reset(new unsigned char[kStackBytes]);
  races::enter(running->progress, static_cast<int>(&fiber - running->fibers.data()),
               running->work->early && !fiber.cameThrough, fiber.stack.get(), kStackBytes);
  if (_setjmp(scheduler)) return races::leave();
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiberMain, 0);
  setcontext(&fiber.context);
}

// All threads that have not ended are there: a thread that ended does not count.
void releaseBlock(Block& b) {
  int left = 0;
  for (int i = 0; i < b.count; ++i) left += b.fibers[i].state != State::kDone;
  if (b.atBlockBarrier == 0 || b.atBlockBarrier < left) return;
  b.atBlockBarrier = 0;
  races::blockBarrier(b.progress);
  for (int i = 0; i < b.count; ++i) {
    if (b.fibers[i].state == State::kAtBlockBarrier) b.fibers[i].state = State::kReady;
  }
}

std::unique_ptr<Block> open(const Work& work, uint64_t number) {
  if (spare.empty()) spare.push_back(std::make_unique<Block>());
  std::unique_ptr<Block> b = std::move(spare.back());
  spare.pop_back();
  b->work = &work;
  b->number = number;
  b->openedAt = performed;
  b->count = static_cast<int>(work.size.x * work.size.y * work.size.z);
  if (b->count < 1 || b->count > kMaxThreads) die("a block has 1 to 1024 threads");
  b->shared.open(work.sharedBytes, 16);  // as much as dynamicShared() promises
  b->variables.assign(__stop_ec_shared - __start_ec_shared, 0xff);
  b->order.resize(b->count);
  for (Warp& warp : b->warps) warp.alive = warp.waiting = 0;
  for (int i = 0; i < b->count; ++i) {
    Fiber& fiber = b->fibers[i];
    const unsigned n = static_cast<unsigned>(i);
    b->warps[i / 32].alive |= 1u << i % 32;
    const dim3 size = work.size;
    fiber.thread.index = dim3(n % size.x, n / size.x % size.y, n / (size.x * size.y));
    fiber.thread.lane = i % 32;
    fiber.thread.warp = i / 32;
    fiber.started = fiber.started && fiber.state == State::kDone;  // else it was given up
    fiber.state = State::kReady;
    fiber.cameThrough = false;
    fiber.groups.clear();
    fiber.groups.emplace_back();
    b->order[i] = i;
  }
  b->atBlockBarrier = 0;
  b->earlierEnded = false;
  b->progress.shared = b->shared.data();
  b->progress.sharedEnd = b->shared.data() + b->shared.size();
  b->progress.slots = reinterpret_cast<const unsigned char*>(b->warps.data());
  b->progress.slotsEnd = reinterpret_cast<const unsigned char*>(b->warps.data() + b->warps.size());
  races::open(b->progress, work.launch, work.overlapped, number);
  return b;
}

// Runs it to its end, or before the launch before it has ended, as far as it comes.
void run(Block& b) {
  running = &b;
  std::copy(b.variables.begin(), b.variables.end(), __start_ec_shared);
  const dim3 grid = b.grid = b.work->grid;
  b.at = dim3(static_cast<unsigned>(b.number % grid.x),
              static_cast<unsigned>(b.number / grid.x % grid.y),
              static_cast<unsigned>(b.number / (uint64_t{grid.x} * grid.y)));
  for (int i = 0; b.earlierEnded && i < b.count; ++i) {
    if (b.fibers[i].state == State::kAtEarlier) b.fibers[i].state = State::kReady;
  }
  for (;;) {
    std::shuffle(b.order.begin(), b.order.end(), random);
    bool ran = false, over = true;
    for (const int i : b.order) {
      if (b.fibers[i].state == State::kReady) {
        enter(b.fibers[i]);
        ran = true;
      }
      over &= b.fibers[i].state == State::kDone;
    }
    if (over) return b.shared.check();
    releaseBlock(b);
    if (ran) continue;
    for (int i = 0; i < b.count; ++i) ran |= b.fibers[i].state == State::kReady;
    if (ran) continue;
    if (!b.earlierEnded) {
      b.variables.assign(__start_ec_shared, __stop_ec_shared);
      return;
    }
    die("threads wait at a barrier that others never reach");
  }
}

void print(const char* format, va_list values) {
  char what[4096];
  std::vsnprintf(what, sizeof what, format, values);
  const dim3 at = running ? running->at : dim3(), of = running ? running->grid : dim3();
  dprintf(sentences, "emulator: %s (block %u,%u,%u of %u,%u,%u)\n", what, at.x, at.y, at.z, of.x,
          of.y, of.z);
}

}  // namespace

void say(const char* format, ...) {
  va_list values;
  va_start(values, format);
  print(format, values);
  va_end(values);
}
void die(const char* format, ...) {
  va_list values;
  va_start(values, format);
  print(format, values);
  va_end(values);
  std::abort();
}

Thread thread() { return current->thread; }
dim3 block() { return running->at; }
dim3 blocks() { return running->grid; }
dim3 threads() { return running->work->size; }
unsigned char* sharedMemory() { return running->shared.data(); }
uint32_t (*warpSlots())[8] { return running->warps[current->thread.warp].slots; }

void blockBarrier() {
  current->state = State::kAtBlockBarrier;
  ++running->atBlockBarrier;
  leave();
}

void awaitEarlier() {
  current->cameThrough = true;
  if (running->earlierEnded) return races::cameThrough();
  current->state = State::kAtEarlier;
  leave();
}

void copyAsync(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) {
    die("an asynchronous copy is not aligned to 16 bytes");
  }
  Copy copy = {static_cast<unsigned char*>(to),
               static_cast<const unsigned char*>(from),
               __builtin_return_address(0),
               random() % 2 == 0,
               {}};
  races::copyStarted(to, from, copy.place);
  if (copy.read) std::memcpy(copy.bytes, from, sizeof copy.bytes);
  std::memset(to, 0xff, sizeof copy.bytes);
  current->groups.back().push_back(copy);
}
void commitAsync() { current->groups.emplace_back(); }
void waitAsync(int pending) {
  std::deque<std::vector<Copy>>& groups = current->groups;
  for (; static_cast<int>(groups.size()) - 1 > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      races::copyDone(copy.to, copy.from, copy.place);
      std::memcpy(copy.to, copy.read ? copy.bytes : copy.from, sizeof copy.bytes);
    }
  }
}

void prefetch(const void* at) { prefetched.insert(reinterpret_cast<uintptr_t>(at)); }

void warpBarrier(unsigned mask, bool orders) {
  const int lane = current->thread.lane, number = current->thread.warp;
  Warp& warp = running->warps[number];
  if (!(mask >> lane & 1)) die("a lane outside the mask of its warp operation");
  if (mask & ~warp.alive) die("a lane of a warp operation's mask has ended");
  warp.waiting |= 1u << lane;
  warp.masks[lane] = mask;
  current->state = State::kAtWarpBarrier;
  bool all = (warp.waiting & mask) == mask;
  for (unsigned left = mask; all && left; left &= left - 1) {
    all = warp.masks[__builtin_ctz(left)] == mask;
  }
  if (!all) return leave();
  warp.waiting &= ~mask;
  for (unsigned left = mask; left; left &= left - 1) {
    running->fibers[number * 32 + __builtin_ctz(left)].state = State::kReady;
  }
  if (orders) races::warpBarrier(running->progress, number, mask);
}

namespace {

// A graph of which launches are switched off may have left a block that it began.
void forgetOld(Work& work) {
  if (work.begun && performed - work.begun->openedAt > 2) spare.push_back(std::move(work.begun));
}

// One block of it runs as far as it comes without what is launched before it.
void begin(Work& work, const Work& before) {
  forgetOld(work);
  if (work.begun) return;
  work.launch = ++numbered;
  work.overlapped = before.overlapped;
  if (work.total() == 0) return;
  work.begun = open(work, random() % work.total());
  run(*work.begun);
}

void perform(void* data) {
  Work& work = *static_cast<Work*>(data);
  const std::lock_guard<std::mutex> lock(launching);
  const FaultWatch watch;
  ++performed;
  forgetOld(work);
  if (!work.begun) {
    races::forget();
    work.launch = work.overlapped = ++numbered;
  }
  const Work* before = &work;
  for (Work* later = work.next; later && later->early; later = later->next) {
    begin(*later, *before);
    if (later != work.next) break;  // the one after next
    before = later;
  }
  const uint64_t total = work.total(), first = total ? random() % total : 0;
  for (uint64_t n = 0; n < total; ++n) {
    const uint64_t at = (first + n) % total;
    const bool begun = work.begun && work.begun->number == at;
    std::unique_ptr<Block> b = begun ? std::move(work.begun) : open(work, at);
    b->earlierEnded = true;
    run(*b);
    spare.push_back(std::move(b));
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

thread_local Work* last;
thread_local std::vector<std::unique_ptr<Work>> launched;  // on ownStream()
thread_local int calls;

void finish() {
  for (const std::unique_ptr<Work>& work : launched) perform(work.get());
  launched.clear();
  last = nullptr;
}

}  // namespace

void* ownStream() {
  static int only;
  return &only;
}

void launch(dim3 grid, dim3 size, size_t sharedBytes, void* stream, bool early,
            std::function<void()> kernel) {
  if (!grid.x || !grid.y || !grid.z || grid.y > kMaxGrid || grid.z > kMaxGrid) {
    die("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  }
  auto work = std::make_unique<Work>();
  work->grid = grid;
  work->size = size;
  work->sharedBytes = sharedBytes;
  work->early = early;
  work->kernel = std::move(kernel);
  if (last) last->next = work.get();
  last = calls ? work.get() : nullptr;
  if (stream == ownStream() || !driver()) {
    launched.push_back(std::move(work));
    if (!calls) finish();
    return;
  }
  // A graph may launch it again, so it is kept for good.
  if (driver()(stream, perform, work.release())) die("the driver's stand-in refused a launch");
}

Together::Together() { ++calls; }
Together::~Together() {
  if (--calls == 0) finish();
}

}  // namespace ec::emulator

// For tests whose file 2 nobody sees: where sentences go.
extern "C" __attribute__((visibility("default"))) void ec_emulated_say_to(int file) {
  ec::emulator::sentences = file;
}

// For tests: how many places of a range were prefetched since it was last asked about.
extern "C" __attribute__((visibility("default"))) uint64_t ec_emulated_prefetches(uint64_t from,
                                                                                  uint64_t bytes) {
  using ec::emulator::prefetched;
  const auto first = prefetched.lower_bound(from), last = prefetched.lower_bound(from + bytes);
  const auto count = static_cast<uint64_t>(std::distance(first, last));
  prefetched.erase(first, last);
  return count;
}

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
