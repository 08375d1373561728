// SPDX-License-Identifier: Apache-2.0
//
// Memory that ends where closed pages begin, or, by turns, starts where they end: who touches what
// lies beyond ends the process with a sentence.
#ifndef EC_CUDA_EMULATOR_BOUNDS_H
#define EC_CUDA_EMULATOR_BOUNDS_H

#include <csignal>
#include <cstddef>

namespace ec::emulator {

// Pages are whole, so some bytes at its other end are open. They are all ones, which is NaN and no
// index, and check() finds what was written there.
class Fenced {
 public:
  Fenced(const char* name, size_t most);
  ~Fenced();
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;

  // From now on it has so many bytes, all ones, and starts at a multiple of `alignment`.
  unsigned char* open(size_t bytes, size_t alignment);
  void check() const;
  unsigned char* data() const { return data_; }
  size_t size() const { return bytes_; }
  // Where an address lies that is in the fences or between them.
  bool describe(const void* at, char* text, size_t size) const;

 private:
  char name_[64];
  unsigned char *mapping_, *end_, *opened_, *data_;
  size_t most_, bytes_ = 0;
};

// While it lives, a fault has a sentence. Then it is whose it was.
class FaultWatch {
 public:
  FaultWatch();
  ~FaultWatch();

 private:
  struct sigaction before_;
};

}  // namespace ec::emulator

#endif  // EC_CUDA_EMULATOR_BOUNDS_H
