// Vectors of floats for the current instruction set, with the compiler's vector types.
#pragma once

#include "divergence.h"

namespace opsd {
namespace OPSD_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t IntVector __attribute__((vector_size(LANES * sizeof(int32_t))));

}  // namespace OPSD_ISA

template <>
struct Lanes<OPSD_ISA::Vector> {
  typedef OPSD_ISA::Vector F;
  typedef OPSD_ISA::IntVector Int;
  OPSD_ENTRY F all(float x) { return F{} + x; }
  OPSD_ENTRY F select(Int condition, F a, F b) { return condition ? a : b; }
  OPSD_ENTRY F convert(Int i) { return __builtin_convertvector(i, F); }
  OPSD_ENTRY Int as_int(F x) { return reinterpret_cast<Int>(x); }
  OPSD_ENTRY F as_float(Int bits) { return reinterpret_cast<F>(bits); }
  OPSD_ENTRY Int shift_left(Int i, int n) { return i << n; }
};

namespace OPSD_ISA {
namespace {

typedef Lanes<Vector> L;

inline __attribute__((always_inline)) Vector load(const float* x) {
  Vector v;
  memcpy(&v, x, sizeof v);
  return v;
}

inline __attribute__((always_inline)) void store(float* x, Vector v) { memcpy(x, &v, sizeof v); }

// Loads `count` < LANES entries; the other lanes become 0.
inline Vector load_some(const float* x, int64_t count) {
  float lanes[LANES];
  for (int i = 0; i < LANES; ++i) lanes[i] = i < count ? x[i] : 0.f;
  return load(lanes);
}

// Sets the lanes from `count` on to `fill`.
inline Vector keep(Vector v, int64_t count, float fill) {
  for (int i = 0; i < LANES; ++i) v[i] = i < count ? v[i] : fill;
  return v;
}

inline void store_some(float* x, Vector v, int64_t count) {
  float lanes[LANES];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) x[i] = lanes[i];
}

// Returns v, and prevents the compiler from fusing the product that gave v into the next operation.
// If it did so for one role only, equal logits would differ.
inline __attribute__((always_inline)) Vector rounded(Vector v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  __asm__("" : "+m"(v));
#endif
  return v;
}

inline double sum(Vector v) {
  double total = 0.0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

inline float max(Vector v) {
  float most = v[0];
  for (int i = 1; i < LANES; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

}  // namespace
}  // namespace OPSD_ISA
}  // namespace opsd
