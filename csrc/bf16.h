// Vectors of floats from and to memory in fp32 or bf16.
#pragma once

#include "vector.h"

#define INLINE inline __attribute__((always_inline))

namespace opsd {
namespace OPSD_ISA {
namespace {

struct Bf16 {
  uint16_t bits;
};
typedef uint16_t HalfVector __attribute__((vector_size(LANES * sizeof(uint16_t))));
typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(uint32_t))));

INLINE Vector read(const float* x) { return load(x); }

INLINE Vector read(const Bf16* x) {
  HalfVector halves;
  memcpy(&halves, x, sizeof halves);
  return reinterpret_cast<Vector>(__builtin_convertvector(halves, Bits) << 16);
}

INLINE void write(float* x, Vector v) { store(x, v); }

// Rounds to the nearest, ties to even.
INLINE void write(Bf16* x, Vector v) {
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Bits nan = Bits{} + 0x7fc0;
  const HalfVector halves = __builtin_convertvector(v == v ? rounded : nan, HalfVector);
  memcpy(x, &halves, sizeof halves);
}

}  // namespace
}  // namespace OPSD_ISA
}  // namespace opsd
