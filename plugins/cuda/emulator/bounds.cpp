// SPDX-License-Identifier: Apache-2.0
#include "bounds.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "emulator.h"

namespace ec::emulator {

namespace {

constexpr size_t kFence = 1 << 20;  // a row or two beyond is still in it

constexpr unsigned kTurns = 4;  // in one of which the start is exact, and not the end

size_t pageSize() {
  static const auto size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}
size_t roundUp(size_t size, size_t to) { return (size + to - 1) / to * to; }

std::mutex mutex;
// Not destroyed: memory that is static is freed after it would be.
std::set<const Fenced*>& all() {
  static auto& known = *new std::set<const Fenced*>;
  return known;
}

const struct sigaction* before = nullptr;

void onFault(int, siginfo_t* info, void*) {
  char where[160] = "where none of this launch's memory is";
  for (const Fenced* memory : all()) {
    if (memory->describe(info->si_addr, where, sizeof where)) break;
  }
  say("a thread touches address %p, %s", info->si_addr, where);
  sigaction(SIGSEGV, before, nullptr);  // whose turn it is when the instruction is tried again
}

}  // namespace

Fenced::Fenced(const char* name, size_t most) : most_(roundUp(most, pageSize())) {
  std::snprintf(name_, sizeof name_, "%s", name);
  void* at = mmap(nullptr, most_ + 2 * kFence, PROT_NONE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) die("there is no memory for %zu bytes of %s", most, name);
  mapping_ = static_cast<unsigned char*>(at);
  end_ = opened_ = data_ = mapping_ + kFence + most_;
  const std::lock_guard<std::mutex> lock(mutex);
  all().insert(this);
}

Fenced::~Fenced() {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    all().erase(this);
  }
  munmap(mapping_, most_ + 2 * kFence);
}

unsigned char* Fenced::open(size_t bytes, size_t alignment) {
  if (roundUp(bytes, alignment) > most_) die("%s has at most %zu bytes", name_, most_);
  static std::atomic<unsigned> turn{0};
  unsigned char* const first = end_ - roundUp(roundUp(bytes, alignment), pageSize());
  bytes_ = bytes;
  data_ = ++turn % kTurns ? end_ - roundUp(bytes, alignment) : first;
  if (first < opened_) mprotect(first, opened_ - first, PROT_READ | PROT_WRITE);
  if (first > opened_) mprotect(opened_, first - opened_, PROT_NONE);
  opened_ = first;
  std::fill(opened_, end_, 0xff);
  return data_;
}

void Fenced::check() const {
  const auto written = [](unsigned char byte) { return byte != 0xff; };
  const unsigned char* at = std::find_if(opened_, data_, written);
  if (at == data_) at = std::find_if(data_ + bytes_, end_, written);
  char where[160];
  if (at != end_ && describe(at, where, sizeof where)) die("a thread wrote to %s", where);
}

bool Fenced::describe(const void* address, char* text, size_t size) const {
  const auto* at = static_cast<const unsigned char*>(address);
  if (at < mapping_ || at >= end_ + kFence) return false;
  const bool ahead = at < data_;
  const ptrdiff_t by = ahead ? data_ - at : at - (data_ + bytes_);
  std::snprintf(text, size, "%td bytes %s %s, which has %zu", by,
                ahead ? "before the start of" : "behind the end of", name_, bytes_);
  return true;
}

FaultWatch::FaultWatch() {
  struct sigaction ours = {};
  ours.sa_sigaction = onFault;
  ours.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &ours, &before_);
  before = &before_;
}
FaultWatch::~FaultWatch() { sigaction(SIGSEGV, &before_, nullptr); }

namespace {

std::map<void*, std::unique_ptr<Fenced>>& arrays() {
  static std::map<void*, std::unique_ptr<Fenced>> known;
  return known;
}

}  // namespace

}  // namespace ec::emulator

// For tests: arrays as strict as the emulator's own memory. They start where their last byte lets
// them: a size that is a multiple of 16 bytes starts at one.
extern "C" __attribute__((visibility("default"))) void* ec_emulated_alloc(uint64_t bytes,
                                                                          const char* name) {
  using namespace ec::emulator;
  auto memory = std::make_unique<Fenced>(name, bytes);
  void* const at = memory->open(bytes, 1);
  const std::lock_guard<std::mutex> lock(mutex);
  arrays()[at] = std::move(memory);
  return at;
}
extern "C" __attribute__((visibility("default"))) void ec_emulated_free(void* at) {
  using namespace ec::emulator;
  std::unique_ptr<Fenced> memory;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    memory = std::move(arrays().at(at));
    arrays().erase(at);
  }
  memory->check();
}
