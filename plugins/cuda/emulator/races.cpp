// SPDX-License-Identifier: Apache-2.0
//
// Data races of the kernels. They are compiled with -fsanitize=thread, which calls a function for
// each access of memory; these functions are here, in the place of ThreadSanitizer's, since what
// orders two accesses of a kernel is not what orders those of a program's threads:
//   - of one thread: their order;
//   - of one block: a barrier of the block between them, or barriers of the warp, in whose masks
//     both threads are, or others that hand it on; no shuffle, vote or product;
//   - of two blocks of a launch: nothing, unless both are atomic;
//   - of two launches: the stream, but for what a launch does before awaitEarlier().
// In shared memory only accesses of one block count: the next one gets the same place. An
// asynchronous copy reads when it is started and when it is waited for, and writes all the while.
//
// Each word of memory has its last write and, of the reads since, what is needed to know whether a
// write is ordered after all of them: the last, and who else read. Exact but for reads between
// barriers of parts of a warp, which all count as late as the last of them.
#include "races.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"

// This library. All that kernels write in it are __shared__ variables, of which GCC puts those of
// templates into no section of their own.
extern "C" __attribute__((visibility("hidden"))) const unsigned char __ehdr_start[], _end[];

namespace ec::emulator::races {
namespace {

enum : uint16_t { kAtomic = 1, kEarly = 2, kUnderWay = 4, kOtherWarps = 8, kOtherBlocks = 16 };

struct Access {
  uint32_t block = 0, time = 0, place = 0;  // of the instruction, from the library's start on
  uint16_t thread = 0, flags = 0;

  int warp() const { return thread / 32; }
  int lane() const { return thread % 32; }
};
struct Reads : Access {  // the last
  uint32_t lanes = 0;    // of its warp, that have read
};
struct Cell {
  Access write;
  Reads reads, early;  // launches before their own read after early ones
};

// Cells are of words, until something in a page is accessed by bytes.
struct Page {
  static constexpr uintptr_t kBytes = 4096;
  uintptr_t each = 4;
  std::vector<Cell> cells = std::vector<Cell>(kBytes / 4);

  void split() {
    std::vector<Cell> bytes(kBytes);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = cells[i / each];
    cells = std::move(bytes);
    each = 1;
  }
};

struct Seen {
  uint32_t launch, overlapped;
  uint64_t number;
};

constexpr size_t kMostPages = 1024;  // 235 MB of cells, if all are of bytes
std::unordered_map<uintptr_t, Page> pages;
struct {
  uintptr_t number;
  Page* page;
} recent[1024];
std::vector<Seen> seen(1);  // blocks, by their numbers

// Other threads of the process run the host's part of the library, which is compiled alike.
__attribute__((tls_model("initial-exec"))) thread_local Progress* running;
int runningThread;
uint16_t early;
const unsigned char *stack, *stackEnd;

Page& pageOf(uintptr_t at) {
  const uintptr_t number = at / Page::kBytes;
  auto& slot = recent[number % std::size(recent)];
  if (!slot.page || slot.number != number) slot = {number, &pages[number]};
  return *slot.page;
}

std::string placeOf(uint32_t place) {
  Dl_info library = {};
  dladdr(__ehdr_start, &library);
  char command[512], line[512];
  std::snprintf(command, sizeof command, "addr2line -Cfips -e '%s' %#x 2>/dev/null",
                library.dli_fname, place - 1);  // the call, not what follows it
  std::string found;
  if (std::FILE* lines = popen(command, "r")) {
    while (std::fgets(line, sizeof line, lines)) {
      line[std::strcspn(line, "\n")] = 0;
      found += std::string("\n    ") + line;
    }
    pclose(lines);
  }
  return found;
}

const char* verbOf(const Access& access, bool write) {
  if (access.flags & kUnderWay) return "copies asynchronously to";
  if (access.flags & kAtomic) return "adds atomically to";
  return write ? "writes" : "reads";
}

[[noreturn]] void report(const Access& mine, bool write, const Access& other, bool otherWrite,
                         bool others) {
  const Seen &my = seen[mine.block], &its = seen[other.block];
  const char* where = mine.block == other.block ? "this block"
                      : my.launch == its.launch ? "another block"
                      : my.launch > its.launch  ? "a launch that may not have ended"
                                                : "a launch that may begin early";
  die("a data race: thread %d of block %ju %s%s\n  what thread %d%s of %s (%ju) %s%s\n ",
      mine.thread, uintmax_t{my.number}, verbOf(mine, write), placeOf(mine.place).c_str(),
      other.thread, others ? ", among others," : "", where, uintmax_t{its.number},
      verbOf(other, otherWrite), placeOf(other.place).c_str());
}
[[noreturn]] void report(const Access& mine, const Reads& reads) {
  const bool others = reads.flags & (kOtherWarps | kOtherBlocks) || reads.lanes & (reads.lanes - 1);
  report(mine, true, reads, false, others);
}

// One of the thread that runs, in its block.
struct Now {
  Access me;
  const Progress& block;
  bool shared;  // the memory is the block's own

  // Until when what a thread of this block did is ordered before now.
  uint32_t known(int warp, int lane) const {
    if (warp != me.warp()) return block.since;
    const uint32_t whole = std::max(block.since, block.whole[warp]);
    const Lanes* some = block.some[warp].get();
    return some ? std::max(whole, some->known[me.lane()][lane]) : whole;
  }

  bool follows(const Access& other) const {
    if (other.block == 0) return true;
    if (other.block == me.block) {
      if (other.flags & kUnderWay) return false;
      return other.thread == me.thread || other.time < known(other.warp(), other.lane());
    }
    if (shared) return true;
    const Seen &my = seen[me.block], &its = seen[other.block];
    if (my.launch == its.launch) return false;
    if (my.launch > its.launch) return !(me.flags & kEarly) || its.launch < my.overlapped;
    return !(other.flags & kEarly) || my.launch < its.overlapped;
  }

  // A write, all reads.
  bool follows(const Reads& reads) const {
    if (reads.block != me.block) return follows(static_cast<const Access&>(reads));
    if (reads.flags & kOtherBlocks) return false;
    if (reads.time < block.since) return true;
    if (reads.flags & kOtherWarps) return false;
    if (reads.warp() != me.warp()) return false;
    for (uint32_t lanes = reads.lanes & ~(1u << me.lane()); lanes; lanes &= lanes - 1) {
      if (reads.time >= known(me.warp(), __builtin_ctz(lanes))) return false;
    }
    return true;
  }

  void addTo(Reads& reads) const {
    uint16_t others = 0;
    uint32_t lanes = 0;
    if (reads.block == me.block) {
      others = reads.flags & kOtherBlocks;
      if (reads.time >= block.since) {
        others |= reads.flags & kOtherWarps;
        if (reads.warp() != me.warp()) others |= kOtherWarps;
        for (uint32_t left = reads.lanes; left; left &= left - 1) {
          const int lane = __builtin_ctz(left);
          if (reads.time >= known(me.warp(), lane)) lanes |= 1u << lane;
        }
      }
    } else if (reads.block && !shared && seen[reads.block].launch == seen[me.block].launch) {
      others = kOtherBlocks;
    }
    static_cast<Access&>(reads) = me;
    reads.flags |= others;
    reads.lanes = lanes | 1u << me.lane();
  }
};

enum class Kind { kRead, kWrite, kAtomic, kCopy, kCopied };

void touch(Cell& cell, const Now& now, Kind kind) {
  const Access& me = now.me;
  if (kind == Kind::kCopied) {  // it is still the copy's, or somebody would have been told
    cell.write.time = me.time;
    cell.write.flags = me.flags;
    return;
  }
  const bool write = kind != Kind::kRead;
  if (!now.follows(cell.write) && !(cell.write.flags & me.flags & kAtomic)) {
    report(me, write, cell.write, true, false);
  }
  if (!write) {
    Reads& reads = me.flags & kEarly ? cell.early : cell.reads;
    const bool known =
        reads.block == me.block && reads.time == me.time && reads.thread == me.thread;
    if (!known) now.addTo(reads);
    return;
  }
  if (!now.follows(cell.reads)) report(me, cell.reads);
  if (!now.follows(cell.early)) report(me, cell.early);
  cell.write = me;
  cell.reads = {};
}

void access(const void* address, uintptr_t bytes, Kind kind, const void* from) {
  const auto* start = static_cast<const unsigned char*>(address);
  if (!running || (start >= stack && start < stackEnd)) return;
  if (start >= running->slots && start < running->slotsEnd) return;
  const bool shared = (start >= running->shared && start < running->sharedEnd) ||
                      (start >= __ehdr_start && start < _end);
  const uint16_t flags =
      early | (kind == Kind::kAtomic ? kAtomic : 0) | (kind == Kind::kCopy ? kUnderWay : 0);
  const auto place = static_cast<uint32_t>(static_cast<const unsigned char*>(from) - __ehdr_start);
  const Now now = {
      {running->block, running->now, place, static_cast<uint16_t>(runningThread), flags},
      *running,
      shared};
  auto at = reinterpret_cast<uintptr_t>(address);
  for (const uintptr_t end = at + bytes; at < end;) {
    Page& page = pageOf(at);
    if (page.each > 1 && (at | end) % page.each) page.split();
    const uintptr_t pageEnd = std::min(end, at / Page::kBytes * Page::kBytes + Page::kBytes);
    for (; at < pageEnd; at += page.each) {
      touch(page.cells[at % Page::kBytes / page.each], now, kind);
    }
  }
}

}  // namespace

void open(Progress& block, uint32_t launch, uint32_t overlapped, uint64_t number) {
  block.block = static_cast<uint32_t>(seen.size());
  seen.push_back({launch, overlapped, number});
  block.now = block.since = 1;
  for (uint32_t& whole : block.whole) whole = 0;
  for (std::unique_ptr<Lanes>& some : block.some) some.reset();
}

void enter(Progress& block, int thread, bool isEarly, const unsigned char* itsStack,
           size_t stackBytes) {
  running = &block;
  runningThread = thread;
  early = isEarly ? kEarly : 0;
  stack = itsStack;
  stackEnd = itsStack + stackBytes;
}

void cameThrough() { early = 0; }
void leave() { running = nullptr; }

void blockBarrier(Progress& block) { block.since = ++block.now; }

void warpBarrier(Progress& block, int warp, unsigned mask) {
  const uint32_t time = ++block.now;
  if (mask == ~0u) {
    block.whole[warp] = time;
    return;
  }
  std::unique_ptr<Lanes>& some = block.some[warp];
  if (!some) some = std::make_unique<Lanes>();
  uint32_t joined[32] = {};
  for (int other = 0; other < 32; ++other) {
    for (int lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) joined[other] = std::max(joined[other], some->known[lane][other]);
    }
    if (mask >> other & 1) joined[other] = time;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) std::copy(joined, joined + 32, some->known[lane]);
  }
}

void copyStarted(const void* to, const void* from, const void* place) {
  access(from, 16, Kind::kRead, place);
  access(to, 16, Kind::kCopy, place);
}
void copyDone(const void* to, const void* from, const void* place) {
  access(from, 16, Kind::kRead, place);
  access(to, 16, Kind::kCopied, place);
}

void forget() {
  if (pages.size() < kMostPages) return;
  pages.clear();
  std::fill(std::begin(recent), std::end(recent), std::decay_t<decltype(recent[0])>{});
}

}  // namespace ec::emulator::races

// What the compiler calls, by the names that it gives them.
using ec::emulator::races::access;
using ec::emulator::races::Kind;
#define EC_ACCESS(name, bytes, kind) \
  extern "C" void name(void* at) { access(at, bytes, Kind::kind, __builtin_return_address(0)); }
EC_ACCESS(__tsan_read1, 1, kRead)
EC_ACCESS(__tsan_read2, 2, kRead)
EC_ACCESS(__tsan_read4, 4, kRead)
EC_ACCESS(__tsan_read8, 8, kRead)
EC_ACCESS(__tsan_read16, 16, kRead)
EC_ACCESS(__tsan_write1, 1, kWrite)
EC_ACCESS(__tsan_write2, 2, kWrite)
EC_ACCESS(__tsan_write4, 4, kWrite)
EC_ACCESS(__tsan_write8, 8, kWrite)
EC_ACCESS(__tsan_write16, 16, kWrite)
EC_ACCESS(__tsan_unaligned_read2, 2, kRead)
EC_ACCESS(__tsan_unaligned_read4, 4, kRead)
EC_ACCESS(__tsan_unaligned_read8, 8, kRead)
EC_ACCESS(__tsan_unaligned_read16, 16, kRead)
EC_ACCESS(__tsan_unaligned_write2, 2, kWrite)
EC_ACCESS(__tsan_unaligned_write4, 4, kWrite)
EC_ACCESS(__tsan_unaligned_write8, 8, kWrite)
EC_ACCESS(__tsan_unaligned_write16, 16, kWrite)
extern "C" void __tsan_read_range(void* at, size_t bytes) {
  access(at, bytes, Kind::kRead, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* at, size_t bytes) {
  access(at, bytes, Kind::kWrite, __builtin_return_address(0));
}
extern "C" uint32_t __tsan_atomic32_fetch_add(uint32_t* at, uint32_t value, int) {
  access(at, sizeof value, Kind::kAtomic, __builtin_return_address(0));
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
// The host's part of the library.
extern "C" uint8_t __tsan_atomic8_load(const uint8_t* at, int) {
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
