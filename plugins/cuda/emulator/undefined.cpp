// SPDX-License-Identifier: Apache-2.0
//
// What -fsanitize=... calls in a kernel that does what C++ leaves undefined: a load that is not
// aligned to its type, which is a fault on a GPU, an index outside of its array, a sum of ints that
// overflows. Compilers bring a library of theirs for it; this one knows the block, and needs no
// flag of the linker.
#include "emulator.h"

namespace {

using namespace ec::emulator;

// What every report begins with.
struct Place {
  const char* file;
  uint32_t line, column;
};
struct Mismatch {
  Place place;
  const void* type;
  unsigned char logAlignment, kind;
};

[[noreturn]] void die(const Place* at, const char* what) {
  ec::emulator::die("%s at %s:%u", what, at->file, at->line);
}

}  // namespace

#define EC_REPORT(name, what)                                          \
  extern "C" [[noreturn]] void __ubsan_handle_##name(const Place* at); \
  void __ubsan_handle_##name(const Place* at) { die(at, what); }

EC_REPORT(add_overflow_abort, "a sum that its type cannot hold")
EC_REPORT(sub_overflow_abort, "a difference that its type cannot hold")
EC_REPORT(mul_overflow_abort, "a product that its type cannot hold")
EC_REPORT(negate_overflow_abort, "a negative that its type cannot hold")
EC_REPORT(divrem_overflow_abort, "a division by zero")
EC_REPORT(shift_out_of_bounds_abort, "a shift by more bits than there are")
EC_REPORT(out_of_bounds_abort, "an index outside of its array")
EC_REPORT(float_cast_overflow_abort, "a float that the integer cannot hold")
EC_REPORT(load_invalid_value_abort, "a bool that is neither 0 nor 1")
EC_REPORT(pointer_overflow_abort, "a pointer that wraps around")
EC_REPORT(builtin_unreachable, "the end of what cannot be reached")
EC_REPORT(missing_return, "the end of a function without its value")

extern "C" [[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(const Mismatch* how,
                                                                   uintptr_t at);
void __ubsan_handle_type_mismatch_v1_abort(const Mismatch* how, uintptr_t at) {
  if (!at) die(&how->place, "a null pointer");
  ec::emulator::die("address %#jx is not aligned to %u bytes at %s:%u", uintmax_t{at},
                    1u << how->logAlignment, how->place.file, how->place.line);
}
