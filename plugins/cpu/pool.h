// SPDX-License-Identifier: Apache-2.0
//
// The thread pool behind ec_stream. Runs of neighbouring units, ever shorter, are handed out by an
// atomic counter, and the caller works too: a worker that wakes late, or that the system has
// paused, delays nothing but the run it holds.
#ifndef EC_CPU_POOL_H
#define EC_CPU_POOL_H

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace ec {

class Pool {
 public:
  static constexpr size_t kScratchBytes = 512 * 1024;

  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Calls body(unit, thread) once for each unit in [0, units), thread in [0, threads()). Returns
  // when all are done. Regions of one pool run one after another, whoever asks; a region inside a
  // region runs on its caller's thread.
  template <class F>
  void parallelFor(int64_t units, F&& body) {
    using Body = std::remove_reference_t<F>;
    run(
        units,
        [](void* context, int64_t unit, int thread) {
          (*static_cast<Body*>(context))(unit, thread);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

  // Memory of one thread inside a region: kScratchBytes, 64-byte aligned, contents undefined.
  std::byte* scratch(int thread) const;

 private:
  using Call = void (*)(void* context, int64_t unit, int thread);

  void run(int64_t units, Call call, void* context);
  void work(int thread);
  void drain(uint32_t generation, int thread);
  bool waitForWork(uint32_t seen);
  void waitForOthers(int64_t units);
  void end();

  struct Sleep {
    std::mutex lock;
    std::condition_variable wake;
  };

  const int threads_;
  const int owner_;  // process id: after fork() the workers are not in the child
  std::unique_ptr<std::byte[]> scratch_;
  std::vector<std::thread> workers_;
  std::mutex region_;

  // The current region. A thread takes units by advancing (generation, next unit) in ticket_; it
  // reads call_, context_ and units_ before, and they are only valid if the generation was still
  // the same then.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  std::atomic<Call> call_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> units_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::unique_ptr<Sleep> sleep_ = std::make_unique<Sleep>();
};

// CPUs that this process may use: the affinity mask, then the cgroup's quota.
int usableCpus();
// Threads that the memory can feed: the smallest count that reaches about 95 % of the best read
// rate. Measured once.
int defaultThreads();
uint64_t readBytesPerSecond();

}  // namespace ec

#endif  // EC_CPU_POOL_H
