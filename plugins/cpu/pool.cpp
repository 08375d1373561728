// SPDX-License-Identifier: Apache-2.0
#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "flush.h"

namespace ec {

namespace {

// Between two ops of a step a worker waits a few microseconds, between two tokens a few hundred;
// beyond that the caller is idle and the core belongs to others.
constexpr auto kSpin = std::chrono::microseconds(200);
// A worker that waits gives way every few microseconds, to the thread that reads a new token and to
// other programs: the system then takes the core from it while it waits and not while it works
// (docs/speed.md).
constexpr int kPausesPerClockRead = 64;
// A thread takes a run of neighbouring units, so that it reads memory in one stream: this share of
// what is left for each thread, so that the last runs are single units and all end together.
constexpr int kRunsLeft = 2;
constexpr size_t kAlign = 64;

// The pool whose region this thread is in, and its number there.
thread_local const Pool* regionOwner = nullptr;
thread_local int regionThread = 0;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // "yield" takes no time on most cores
#endif
}

}  // namespace

Pool::Pool(int threads)
    : threads_(threads),
      owner_(getpid()),
      scratch_(new std::byte[threads * kScratchBytes + kAlign]) {
  workers_.reserve(threads_ - 1);
  try {
    for (int i = 1; i < threads_; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {  // no more threads may be had, and those that run must not outlive this
    end();
    throw;
  }
}

Pool::~Pool() {
  if (getpid() == owner_) {
    end();
    return;
  }
  for (std::thread& worker : workers_) worker.detach();
  // A condition waits at its end for those who sleep on it, and they are not in this process.
  sleep_.release();
}

void Pool::end() {
  stop_.store(true);
  {
    std::lock_guard<std::mutex> lock(sleep_->lock);
    sleep_->wake.notify_all();
  }
  for (std::thread& worker : workers_) worker.join();
}

std::byte* Pool::scratch(int thread) const {
  const uintptr_t base = reinterpret_cast<uintptr_t>(scratch_.get());
  const size_t skip = (kAlign - base % kAlign) % kAlign;
  return scratch_.get() + skip + static_cast<size_t>(thread) * kScratchBytes;
}

void Pool::run(int64_t units, Call call, void* context) {
  if (units <= 0) return;
  if (regionOwner == this) {
    for (int64_t unit = 0; unit < units; ++unit) call(context, unit, regionThread);
    return;
  }
  std::lock_guard<std::mutex> region(region_);
  const FlushSubnormals flush;
  const Pool* outerOwner = regionOwner;
  const int outerThread = regionThread;
  regionOwner = this;
  regionThread = 0;
  if (units == 1 || threads_ == 1) {
    for (int64_t unit = 0; unit < units; ++unit) call(context, unit, 0);
  } else {
    const uint32_t generation = static_cast<uint32_t>(ticket_.load() >> 32) + 1;
    // Closes the old region before its description changes: no thread can take a unit of a
    // half-written one.
    ticket_.store(static_cast<uint64_t>(generation) << 32 | UINT32_MAX);
    call_.store(call);
    context_.store(context);
    units_.store(units);
    done_.store(0);
    ticket_.store(static_cast<uint64_t>(generation + 1) << 32);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_->lock);
      sleep_->wake.notify_all();
    }
    drain(generation + 1, 0);
    waitForOthers(units);
  }
  regionOwner = outerOwner;
  regionThread = outerThread;
}

void Pool::drain(uint32_t generation, int thread) {
  int64_t finished = 0;
  const Call call = call_.load();
  void* context = context_.load();
  const int64_t units = units_.load();
  uint64_t ticket = ticket_.load();
  while (static_cast<uint32_t>(ticket >> 32) == generation) {
    const int64_t first = static_cast<uint32_t>(ticket);
    if (first >= units) break;
    const int64_t count = std::max<int64_t>(1, (units - first) / (kRunsLeft * threads_));
    if (!ticket_.compare_exchange_weak(ticket, ticket + count)) continue;
    for (int64_t unit = first; unit < first + count; ++unit) call(context, unit, thread);
    finished += count;
    ticket = ticket_.load();
  }
  if (finished > 0) done_.fetch_add(finished);
}

void Pool::waitForOthers(int64_t units) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 1; done_.load() != units; ++i) {
    pause();
    if (i % kPausesPerClockRead == 0 && std::chrono::steady_clock::now() - start > kSpin) {
      // The worker that holds the last unit may be waiting for this very core.
      std::this_thread::yield();
    }
  }
}

void Pool::work(int thread) {
  regionOwner = this;
  regionThread = thread;
  const FlushSubnormals flush;
  uint32_t seen = 0;
  while (waitForWork(seen)) {
    seen = static_cast<uint32_t>(ticket_.load() >> 32);
    drain(seen, thread);
  }
}

// Returns when the generation is no longer `seen`; false when the pool stops.
bool Pool::waitForWork(uint32_t seen) {
  const auto changed = [&] {
    return stop_.load() || static_cast<uint32_t>(ticket_.load() >> 32) != seen;
  };
  const auto start = std::chrono::steady_clock::now();
  for (int i = 1; !changed(); ++i) {
    pause();
    if (i % kPausesPerClockRead != 0) continue;
    std::this_thread::yield();
    if (std::chrono::steady_clock::now() - start < kSpin) continue;
    std::unique_lock<std::mutex> lock(sleep_->lock);
    sleepers_.fetch_add(1);
    sleep_->wake.wait(lock, changed);
    sleepers_.fetch_sub(1);
    break;
  }
  return !stop_.load();
}

}  // namespace ec
