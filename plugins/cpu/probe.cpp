// SPDX-License-Identifier: Apache-2.0
//
// How many CPUs the process may use, and how many of them are worth using.
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "pool.h"

namespace ec {

namespace {

constexpr size_t kProbeBytes = size_t{96} << 20;  // beyond the last-level cache of an embedded CPU
constexpr size_t kSliceBytes = size_t{1} << 20;
constexpr auto kProbeTime = std::chrono::milliseconds(20);
constexpr double kGoodEnough = 0.95;
// Prefill is bound by arithmetic: so few threads are worth having even where fewer feed the memory.
constexpr int kLeastThreads = 4;

int affinityCpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

// First line of a small file; empty when it cannot be read.
std::string firstLine(const std::string& path) {
  char line[256] = "";
  if (FILE* file = std::fopen(path.c_str(), "r")) {
    if (!std::fgets(line, sizeof line, file)) line[0] = 0;
    std::fclose(file);
  }
  return line;
}

// CPUs of the cgroup's quota, rounded up; `fallback` without one.
int quotaCpus(int fallback) {
  double quota = 0, period = 0;
  const std::string limit = firstLine("/sys/fs/cgroup/cpu.max");
  if (!limit.empty()) {
    if (std::sscanf(limit.c_str(), "%lf %lf", &quota, &period) != 2) return fallback;
  } else {
    quota = std::atof(firstLine("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").c_str());
    period = std::atof(firstLine("/sys/fs/cgroup/cpu/cpu.cfs_period_us").c_str());
  }
  if (quota <= 0 || period <= 0) return fallback;
  return std::max(1, static_cast<int>(std::ceil(quota / period)));
}

uint64_t readSlice(const uint64_t* slice) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i < kSliceBytes / 8; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] ^= slice[i + j];
  }
  return sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
}

// Bytes per second that `threads` threads read together, each its own stretch from end to end.
double readRate(const uint64_t* data, int threads) {
  const size_t slices = kProbeBytes / kSliceBytes / threads;  // of one thread
  std::atomic<size_t> total{0};
  std::atomic<uint64_t> sink{0};
  const auto start = std::chrono::steady_clock::now();
  const auto read = [&](int thread) {
    const uint64_t* own = data + thread * slices * (kSliceBytes / 8);
    uint64_t sum = 0;
    size_t done = 0;
    for (; std::chrono::steady_clock::now() - start < kProbeTime; ++done) {
      sum ^= readSlice(own + done % slices * (kSliceBytes / 8));
    }
    total.fetch_add(done);
    sink.fetch_xor(sum);
  };
  {
    struct Joined : std::vector<std::thread> {
      ~Joined() {
        for (std::thread& each : *this) each.join();
      }
    } others;
    for (int i = 1; i < threads; ++i) others.emplace_back(read, i);
    read(0);
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return static_cast<double>(total.load() * kSliceBytes) / elapsed.count();
}

struct Probe {
  int threads;
  double rate;
};

Probe probe() {
  const int cpus = std::min<int>(usableCpus(), kProbeBytes / kSliceBytes);  // a slice for each
  void* data =
      mmap(nullptr, kProbeBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return {cpus, 0};
  madvise(data, kProbeBytes, MADV_HUGEPAGE);
  std::memset(data, 1, kProbeBytes);  // untouched pages would all be the one page of zeros
  std::vector<Probe> tried;
  for (int threads = 1; threads <= cpus; threads += std::max(1, threads / 2)) {
    tried.push_back({threads, readRate(static_cast<const uint64_t*>(data), threads)});
  }
  if (tried.back().threads != cpus) {
    tried.push_back({cpus, readRate(static_cast<const uint64_t*>(data), cpus)});
  }
  munmap(data, kProbeBytes);
  double best = 0;
  for (const Probe& p : tried) best = std::max(best, p.rate);
  for (const Probe& p : tried) {
    if (p.rate >= kGoodEnough * best) {
      return {std::max(p.threads, std::min(cpus, kLeastThreads)), best};
    }
  }
  return {cpus, best};
}

const Probe& cachedProbe() {
  static const Probe result = probe();
  return result;
}

}  // namespace

int usableCpus() {
  const int cpus = affinityCpus();
  return std::min(cpus, quotaCpus(cpus));
}

int defaultThreads() { return cachedProbe().threads; }

uint64_t readBytesPerSecond() { return static_cast<uint64_t>(cachedProbe().rate); }

}  // namespace ec
