// What a GPU thread does with its entries of a row: read, transform, write, and sum over the block.
// Kernels and launches are in csrc/cuda.cu.
//
// A thread block computes one chunk of CHUNK consecutive entries of one row and stores the chunk's
// sums in partials[sum, row, chunk]. A thread has four adjacent entries at a time, which are one
// load of 16 bytes if the row is aligned to it.
#pragma once

#include <cuda_runtime.h>

#include "cpu.h"
#include "divergence.h"

namespace opsd {
namespace {
constexpr int THREADS = 256, WARPS = THREADS / 32, ITEMS = 16, CHUNK = THREADS * ITEMS;
// A chunk's normaliser: MAX, REST, MOMENT, and the number of entries equal to the maximum, which
// are not in REST.
constexpr int LARGEST = 3, PARTIAL_NORMALISER = 4;
constexpr int MOST_PARTIALS = 2 * PARTIAL_NORMALISER;

inline int64_t chunks_of(int64_t v) { return (v + CHUNK - 1) / CHUNK; }

// Transforms x, the product + bias of an entry, to its logit: scale * x, or scale * tanh(inner *
// x).
struct Transform {
  float scale, inner;
  bool capped;  // whether there is a soft cap

  Transform(const opsd_transform& t)
      : scale(t.softcap > 0.f ? t.softcap / t.temperature : t.scale / t.temperature),
        inner(t.softcap > 0.f ? t.scale / t.softcap : 0.f),
        capped(t.softcap > 0.f) {}
};

// A kernel's arguments beside the tile.
struct Numbers {
  Transform student, teacher;
  float factor;  // converts the derivative by the student's logit to that by its product
  float beta, threshold;
  uint32_t chunks;  // of a row
  int64_t partial_stride;
  float* partials;
};

Numbers numbers(const opsd_tile& tile, const opsd_options& o, float* partials) {
  const uint32_t chunks = static_cast<uint32_t>(chunks_of(tile.v));
  return {o.student, o.teacher, o.student.scale / o.student.temperature, o.beta, o.clip_threshold,
          chunks, tile.n * static_cast<int64_t>(chunks), partials};
}

__device__ __forceinline__ bool aligned(const void* x) {
  return (reinterpret_cast<uintptr_t>(x) & 15) == 0;
}

// Transforms an entry except for its scale: the logit is Transform::scale times the result.
// Products are rounded, never fused with the next operation: both roles' come from the same
// roundings, and S = T gives exactly 0. SOFTCAP: whether any role has one.
template <bool SOFTCAP>
__device__ __forceinline__ float unscaled(float x, const Transform& t) {
  return SOFTCAP && t.capped ? tanh_(__fmul_rn(x, t.inner)) : x;
}

// The soft cap's slope at an unscaled entry.
template <bool SOFTCAP>
__device__ __forceinline__ float slope(float x, const Transform& t) {
  return SOFTCAP && t.capped ? 1.f - x * x : 1.f;
}

// An unscaled entry whose logit is -inf.
__device__ __forceinline__ float nothing(const Transform& t) {
  return t.scale < 0.f ? INFINITY : -INFINITY;
}

struct Normaliser {
  float max, log_sum, scale;

  __device__ Normaliser(float max, float log_sum, const Transform& t)
      : max(max), log_sum(log_sum), scale(t.scale) {}
  __device__ Normaliser(const float* state, int64_t stride, const Transform& t)
      : max(state[MAX * stride]), log_sum(log1pf(state[REST * stride])), scale(t.scale) {}

  // The log-probability of an unscaled entry. The maximum is subtracted with one rounding, since a
  // logit may be 1e4.
  __device__ __forceinline__ float log_p(float x) const { return fmaf(x, scale, -max) - log_sum; }
};

struct Normalisers {
  Normaliser student, teacher;
  float shift;  // log T - log S = (z_t - z_s) - shift
  bool same_scale;

  __device__ Normalisers(const Normaliser& student, const Normaliser& teacher)
      : student(student),
        teacher(teacher),
        shift((teacher.max - student.max) + (teacher.log_sum - student.log_sum)),
        same_scale(student.scale == teacher.scale) {}

  // The divergence's entry for unscaled entries of both.
  template <int KIND>
  __device__ __forceinline__ Entry<float> entry(float x, float x_t, float beta) const {
    const float log_s = student.log_p(x), log_t = teacher.log_p(x_t);
    const float exact = fmaf(x_t - x, student.scale, -shift);
    return opsd::entry<KIND>(log_s, log_t, same_scale ? exact : log_t - log_s, beta);
  }
};

// Adds an entry to DIVERGENCE, UNNORMALISED, and with the entry clip to CLIPPED, COUNT and
// CLIPPED_UNNORMALISED.
template <int KIND, bool CLIP>
__device__ __forceinline__ void add_entry(float (&total)[CLIP ? 5 : 2], const Entry<float>& e,
                                          float threshold) {
  total[0] += e.term;
  total[1] += e.unnormalised;
  if (CLIP) {
    total[CLIP ? 2 : 0] += clipped_term<KIND>(e, threshold);
    total[CLIP ? 3 : 0] += e.plain > threshold ? 1.f : 0.f;
    total[CLIP ? 4 : 0] += clipped_unnormalised<KIND>(e, threshold);
  }
}

// A thread's place: its row, its first entry in the row's chunk, and the number of entries from
// there on. Item i is `at(i)` entries further.
struct Place {
  int64_t row, first;
  int left;

  __device__ Place(int64_t v, const Numbers& o)
      : row(blockIdx.x / o.chunks),
        first(static_cast<int64_t>(blockIdx.x % o.chunks) * CHUNK + 4 * threadIdx.x),
        left(v - first < CHUNK ? static_cast<int>(v - first) : CHUNK) {}

  static __device__ __forceinline__ int at(int i) { return i / 4 * 4 * THREADS + i % 4; }
  __device__ __forceinline__ bool has(int i) const { return at(i) < left; }
  __device__ __forceinline__ bool has_all() const { return has(ITEMS - 1); }
};

// Loads a thread's entries of a row; `fill` beyond the row's end.
__device__ __forceinline__ void load(float (&z)[ITEMS], const float* row, float fill,
                                     const Place& place) {
  row += place.first;
  if (place.has_all() && aligned(row)) {
#pragma unroll
    for (int i = 0; i < ITEMS; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(row + Place::at(i));
      z[i] = four.x, z[i + 1] = four.y, z[i + 2] = four.z, z[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) z[i] = place.has(i) ? row[Place::at(i)] : fill;
  }
}

// Where gradients go: rows of fp32, bf16 or fp16.
enum Type : int32_t { FP32 = 0, BF16 = 1, FP16 = 2 };

struct Out {
  void* entries;
  int64_t stride;
  Type type;
};

// Packs two numbers into 16 bits each, the first in the low half, rounded to nearest.
__device__ __forceinline__ uint32_t pack(float low, float high, Type type) {
#ifdef __CUDACC__
  uint32_t both;
  if (type == BF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
#else
  const auto narrow = [type](float x) -> uint32_t {
    if (type == FP16) {
      const _Float16 half = static_cast<_Float16>(x);
      uint16_t bits;
      memcpy(&bits, &half, sizeof bits);
      return bits;
    }
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
  };
  return narrow(high) << 16 | narrow(low);
#endif
}

__device__ __forceinline__ void store(float* row, const float (&z)[ITEMS], const Place& place) {
  row += place.first;
  if (place.has_all() && aligned(row)) {
#pragma unroll
    for (int i = 0; i < ITEMS; i += 4) {
      *reinterpret_cast<float4*>(row + Place::at(i)) =
          make_float4(z[i], z[i + 1], z[i + 2], z[i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (place.has(i)) row[Place::at(i)] = z[i];
    }
  }
}

// Stores a thread's entries of a row; four of 16 bits at a time if the row is aligned to 8 bytes.
__device__ __forceinline__ void store(const Out& out, const float (&z)[ITEMS],
                                      const Place& place) {
  if (out.type == FP32) {
    store(static_cast<float*>(out.entries) + place.row * out.stride, z, place);
    return;
  }
  uint16_t* row = static_cast<uint16_t*>(out.entries) + place.row * out.stride + place.first;
  if (place.has_all() && (reinterpret_cast<uintptr_t>(row) & 7) == 0) {
#pragma unroll
    for (int i = 0; i < ITEMS; i += 4) {
      *reinterpret_cast<uint2*>(row + Place::at(i)) =
          make_uint2(pack(z[i], z[i + 1], out.type), pack(z[i + 2], z[i + 3], out.type));
    }
  } else {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (place.has(i)) row[Place::at(i)] = static_cast<uint16_t>(pack(z[i], 0.f, out.type));
    }
  }
}

// Loads a thread's entries, unscaled. Beyond the row's end they give logits of -inf, whose
// probability is 0, so that they add nothing to any sum.
template <bool SOFTCAP>
__device__ __forceinline__ void load_unscaled(float (&z)[ITEMS], const float* row,
                                              const float* bias, const Place& place,
                                              const Transform& t) {
  load(z, row, nothing(t), place);
  if (bias) {
    float b[ITEMS];
    load(b, bias, 0.f, place);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) z[i] += b[i];
  }
  if (SOFTCAP && t.capped) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) z[i] = place.has(i) ? unscaled<SOFTCAP>(z[i], t) : nothing(t);
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int k = 16; k > 0; k /= 2) x += __shfl_xor_sync(~0u, x, k);
  return x;
}

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }

// The larger of both; NaN if either is NaN.
__device__ __forceinline__ float at_least(float x, float least) {
#ifdef __CUDACC__
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(least));
  return y;
#else
  return x < least ? least : x;
#endif
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int k = 16; k > 0; k /= 2) x = larger(x, __shfl_xor_sync(~0u, x, k));
  return x;
}

// Adds entries to a thread's sums of a normaliser, from the maximum `most` of the block: the sum
// without the entries equal to it, the moment, and the number of those. LARGEST: whether there may
// be one among the thread's.
template <bool LARGEST, int COUNT>
__device__ __forceinline__ void add_exponentials(float (&sums)[3], const float (&z)[COUNT],
                                                 float scale, float most) {
  // If all are -inf, any finite offset works: exp(-inf) = 0.
  const float offset = most == -INFINITY ? 0.f : most;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    // exp(-120) is 0 in fp32, so this bound changes nothing and avoids 0 * inf.
    const float below = at_least(fmaf(z[i], scale, -offset), -120.f), p = exp_(below);
    const bool is_largest = LARGEST && __fmul_rn(z[i], scale) == most;
    // For the maximum `below` is its rounding: exp(below) - 1.
    sums[0] += is_largest ? below : p;
    sums[1] = fmaf(-p, below, sums[1]);
    if (is_largest) sums[2] += 1.f;
  }
}

// Converts a normaliser's sums from the maximum `from`, with `largest` entries equal to it and
// `rest` the sum of the others, to the larger maximum `to`. If nothing or only -inf was seen, all
// are 0.
__device__ __forceinline__ void refer(float from, float to, float& rest, float& moment,
                                      float& largest) {
  const float sum = from == -INFINITY ? rest = moment = largest = 0.f : largest + rest;
  if (from == to || sum == 0.f) return;
  const float shift = to - from, factor = expf(-shift);
  moment = (moment + sum * shift) * factor;
  rest = sum * factor;
  largest = 0.f;
}

// Stores each of the block's `COUNT` sums at partial[k * stride]; `warps` is shared memory.
template <int COUNT>
__device__ __forceinline__ void store_sums(const float (&sums)[COUNT], float (*warps)[WARPS],
                                           float* partial, int64_t stride) {
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const float total = warp_sum(sums[k]);
    if (threadIdx.x % 32 == 0) warps[k][threadIdx.x / 32] = total;
  }
  __syncthreads();
  if (threadIdx.x < COUNT) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += warps[threadIdx.x][w];
    partial[threadIdx.x * stride] = total;
  }
}

template <int COUNT>
__device__ __forceinline__ void store_sums(const float (&sums)[COUNT], float* partial,
                                           int64_t stride) {
  __shared__ float warps[COUNT][WARPS];
  store_sums(sums, warps, partial, stride);
}

}  // namespace
}  // namespace opsd
