// SPDX-License-Identifier: Apache-2.0
//
// What the emulator tells the detector of data races (races.cpp).
#ifndef EC_CUDA_EMULATOR_RACES_H
#define EC_CUDA_EMULATOR_RACES_H

#include <cstddef>
#include <cstdint>
#include <memory>

namespace ec::emulator::races {

struct Lanes {
  uint32_t known[32][32];  // [lane][other]: what the other did before then is ordered before it
};

// How far a block's threads have come. Its time goes on at each of its barriers.
struct Progress {
  uint32_t block;                   // a number of its own
  uint32_t now, since;              // the last barrier of the whole block
  uint32_t whole[32];               // of each warp: the last barrier of all its lanes
  std::unique_ptr<Lanes> some[32];  // and of a part of them
  const unsigned char *shared, *sharedEnd, *slots, *slotsEnd;
};

// A block begins. Until its threads come through awaitEarlier(), the launches from `overlapped` on
// may still run.
void open(Progress& block, uint32_t launch, uint32_t overlapped, uint64_t number);
// From now on, memory is accessed by this thread; by none that counts, after leave().
void enter(Progress& block, int thread, bool early, const unsigned char* stack, size_t stackBytes);
void cameThrough();
void leave();
void blockBarrier(Progress& block);
void warpBarrier(Progress& block, int warp, unsigned mask);
void copyStarted(const void* to, const void* from, const void* place);
void copyDone(const void* to, const void* from, const void* place);
// Nothing of what ran so far overlaps what runs from here on.
void forget();

}  // namespace ec::emulator::races

#endif  // EC_CUDA_EMULATOR_RACES_H
