// All that is computed of a row, in one visit to its logits.
//
// A cluster of thread blocks copies a row of both roles into its shared memory, a part for each
// block, and computes normalisers, sums and gradient from there: the device's memory is read once.
// The blocks add up each other's sums, always in the same order. This needs compute capability 9.0
// and a row that fits.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include <type_traits>

#include "cuda_chunk.h"

namespace opsd {
namespace {
constexpr int MOST_BLOCKS = 16;  // of a cluster
constexpr int STEP = 4 * THREADS;  // entries that a block reads at a time
#ifndef OPSD_ROW_BYTES  // of shared memory; a multiprocessor has room for two such blocks
#define OPSD_ROW_BYTES (98 << 10)
#endif

// A block's sums and the row's, in shared memory.
struct alignas(16) Board {
  float normalisers[2][PARTIAL_NORMALISER], sums[5], dot;
  float row_normalisers[2][3], log_sums[2], row_sums[5];
  float highest[2][WARPS], warps[6][WARPS];
};

// How a row is divided: the blocks of its cluster, the entries of a block, its shared memory.
struct Parts {
  int64_t blocks, entries, bytes;

  explicit Parts(int64_t v) {  // each thread has four entries or more
    for (blocks = 1;; blocks *= 2) {
      entries = (v + 4 * blocks - 1) / (4 * blocks) * 4;
      if (entries < STEP) entries = STEP;
      bytes = sizeof(Board) + 2 * sizeof(float) * entries;
      if (bytes <= OPSD_ROW_BYTES || blocks == MOST_BLOCKS) return;
    }
  }
};

__device__ __forceinline__ void load(float (&z)[4], const float* x) {
  const float4 four = *reinterpret_cast<const float4*>(x);
  z[0] = four.x, z[1] = four.y, z[2] = four.z, z[3] = four.w;
}

__device__ __forceinline__ void store(float* x, const float (&z)[4]) {
  *reinterpret_cast<float4*>(x) = make_float4(z[0], z[1], z[2], z[3]);
}

// Stores `count` of four entries from `place` on.
__device__ __forceinline__ void store(const Out& out, int64_t place, const float (&z)[4],
                                      int count) {
  if (out.type == FP32) {
    float* to = static_cast<float*>(out.entries) + place;
    if (count >= 4 && aligned(to)) {
      store(to, z);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < count) to[i] = z[i];
      }
    }
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out.entries) + place;
  const uint32_t low = pack(z[0], z[1], out.type), high = pack(z[2], z[3], out.type);
  if (count >= 4 && (reinterpret_cast<uintptr_t>(to) & 7) == 0) {
    *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = static_cast<uint16_t>((i < 2 ? low : high) >> 16 * (i % 2));
    }
  }
}

// Visits the thread's entries of a block, four at a time.
template <class Visit>
__device__ __forceinline__ void each(int entries, const Visit& visit) {
  int j = 4 * threadIdx.x;
#pragma unroll 1
  do {
    visit(j);
    j += STEP;
  } while (j < entries);
}

// Starts to copy `count` entries of a row to shared memory, and fills it up to `entries`.
__device__ __forceinline__ void fetch(float* z, const float* x, int count, int entries,
                                      float fill) {
  const int wide = aligned(x) ? count & ~3 : 0;
#pragma unroll 1
  for (int j = 4 * threadIdx.x; j < wide; j += STEP) __pipeline_memcpy_async(z + j, x + j, 16);
  for (int j = wide + threadIdx.x; j < count; j += THREADS) {
    __pipeline_memcpy_async(z + j, x + j, 4);
  }
  for (int j = count + threadIdx.x; j < entries; j += THREADS) z[j] = fill;
}

// Adds the bias to entries and applies the soft cap.
template <bool SOFTCAP>
__device__ __forceinline__ void transform(float* z, const float* bias, int count,
                                          const Transform& t) {
  if (!bias && !(SOFTCAP && t.capped)) return;
  for (int j = threadIdx.x; j < count; j += THREADS) {
    z[j] = unscaled<SOFTCAP>(bias ? z[j] + bias[j] : z[j], t);
  }
}

__device__ __forceinline__ Board& shared_board() {
#ifdef __CUDACC__
  extern __shared__ float4 shared[];
  return *reinterpret_cast<Board*>(shared);
#else
  return *static_cast<Board*>(emulated::shared());
#endif
}

// Grid: (rows * blocks of a cluster). `out` may be the student's products. most_divergence: above
// it a token's gradient is scaled down to it.
template <int KIND, bool CLIP, bool SOFTCAP>
__global__ void __launch_bounds__(THREADS, 2)
    rows(opsd_tile tile, Out out, const float* row_weight, float most_divergence, int entries,
         Numbers o) {
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = __clusterIdx().x, first = static_cast<int64_t>(rank) * entries;
  const int64_t left = tile.v - first;
  const int count = left < 0 ? 0 : left < entries ? static_cast<int>(left) : entries;
  Board& board = shared_board();
  float* shared = reinterpret_cast<float*>(&board + 1);
  float *student = shared, *teacher = shared + entries;
  const Board* other = cluster.map_shared_rank(&board, lane < blocks ? lane : 0);
  float* state = tile.state + row;

  fetch(student, tile.student + row * tile.student_stride + first, count, entries,
        nothing(o.student));
  fetch(teacher, tile.teacher + row * tile.teacher_stride + first, count, entries,
        nothing(o.teacher));
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  transform<SOFTCAP>(student, tile.bias ? tile.bias + first : nullptr, count, o.student);
  transform<SOFTCAP>(teacher, tile.teacher_bias ? tile.teacher_bias + first : nullptr, count,
                     o.teacher);
  __syncthreads();

  // 1. The normalisers: each role's largest logit of the thread, of the block, then sums.
  const Transform transforms[2] = {o.student, o.teacher};
  float own[2] = {-INFINITY, -INFINITY}, most[2], exponentials[2][3] = {};
  each(entries, [&](int j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x[4];
      load(x, shared + r * entries + j);
#pragma unroll
      for (int i = 0; i < 4; ++i) own[r] = larger(own[r], __fmul_rn(x[i], transforms[r].scale));
    }
  });
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    most[r] = warp_max(own[r]);
    if (lane == 0) board.highest[r][warp] = most[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int w = 0; w < WARPS; ++w) most[r] = larger(most[r], board.highest[r][w]);
  }
  const auto add = [&](auto has_largest) {
    each(entries, [&](int j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x[4];
        load(x, shared + r * entries + j);
        add_exponentials<decltype(has_largest)::value>(exponentials[r], x, transforms[r].scale,
                                                       most[r]);
      }
    });
  };
  if (own[0] == most[0] || own[1] == most[1]) {
    add(std::true_type());
  } else {
    add(std::false_type());
  }
  if (threadIdx.x < 2) board.normalisers[threadIdx.x][MAX] = threadIdx.x ? most[1] : most[0];
  store_sums(exponentials[0], board.warps, board.normalisers[0] + REST, 1);
  store_sums(exponentials[1], board.warps + 3, board.normalisers[1] + REST, 1);
  cluster.sync();
  if (warp < 2) {
    const float* partial = other->normalisers[warp];
    const bool counts = lane < blocks;
    const float from = counts ? partial[MAX] : -INFINITY, highest = warp_max(from);
    float rest = partial[REST], moment = partial[MOMENT], largest = partial[LARGEST];
    refer(from, highest, rest, moment, largest);
    rest = warp_sum(rest), moment = warp_sum(moment), largest = warp_sum(largest);
    if (lane == 0) {
      float* normaliser = board.row_normalisers[warp];
      normaliser[MAX] = highest;
      normaliser[REST] = (largest - 1.f) + rest;
      normaliser[MOMENT] = moment;
      board.log_sums[warp] = log1pf(normaliser[REST]);
    }
  }
  __syncthreads();
  const Normalisers by(
      Normaliser(board.row_normalisers[0][MAX], board.log_sums[0], o.student),
      Normaliser(board.row_normalisers[1][MAX], board.log_sums[1], o.teacher));
  if (rank == 0 && threadIdx.x < 6) {
    state[threadIdx.x * tile.state_stride] = board.row_normalisers[threadIdx.x / 3][threadIdx.x % 3];
  }

  // 2. The sums. Without the entry clip the gradient's terms replace the logits: `first` in the
  // student's place, and S in the teacher's unless the kind is forward_kl.
  const float target_weight = state[TARGET_WEIGHT * tile.state_stride];
  float total[CLIP ? 5 : 2] = {};
  each(entries, [&](int j) {
    float x[4], x_t[4];
    load(x, student + j);
    load(x_t, teacher + j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Entry<float> e = by.template entry<KIND>(x[i], x_t[i], o.beta);
      add_entry<KIND, CLIP>(total, e, o.threshold);
      const float sloped = slope<SOFTCAP>(x[i], o.student);
      x[i] = sloped * (KIND == FORWARD_KL ? (e.unnormalised + e.s) - e.s * target_weight
                                          : e.unnormalised);
      x_t[i] = sloped * e.s;
    }
    if (!CLIP) {
      store(student + j, x);
      if (KIND != FORWARD_KL) store(teacher + j, x_t);
    }
  });
  store_sums(total, board.warps, board.sums, 1);
  cluster.sync();
  if (warp == 0) {
#pragma unroll
    for (int k = 0; k < (CLIP ? 5 : 2); ++k) {
      const float sum = warp_sum(lane < blocks ? other->sums[k] : 0.f);
      if (lane == 0) board.row_sums[k] = sum;
    }
  }
  __syncthreads();
  if (rank == 0 && threadIdx.x < (CLIP ? 5 : 2)) {
    state[(DIVERGENCE + threadIdx.x) * tile.state_stride] = board.row_sums[threadIdx.x];
  }

  // 3. The gradient.
  const float divergence = board.row_sums[0], sum = board.row_sums[UNNORMALISED - DIVERGENCE];
  float weight = row_weight ? row_weight[row] * o.factor : 0.f;
  if (divergence > most_divergence) weight *= most_divergence / divergence;
  const int64_t place = row * out.stride + first;
  if (!CLIP && row_weight) {
    each(entries, [&](int j) {
      float g[4], s[4];
      load(g, student + j);
      if (KIND != FORWARD_KL) load(s, teacher + j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        g[i] = weight * (KIND == FORWARD_KL ? g[i] : g[i] - s[i] * (sum + target_weight));
      }
      store(out, place + j, g, count - j);
    });
  }
  if (CLIP) {
    const float sum_clipped = board.row_sums[CLIP ? CLIPPED_UNNORMALISED - DIVERGENCE : 0];
    float dot[1] = {};
    each(entries, [&](int j) {
      float x[4], x_t[4];
      load(x, student + j);
      load(x_t, teacher + j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Entry<float> e = by.template entry<KIND>(x[i], x_t[i], o.beta);
        const float g = KIND == FORWARD_KL ? e.unnormalised + e.s : e.unnormalised - e.s * sum;
        const float clipped = clipped_unnormalised<KIND>(e, o.threshold) - e.s * sum_clipped;
        dot[0] += clipped * g;
        x[i] = weight * slope<SOFTCAP>(x[i], o.student) * (clipped - e.s * target_weight);
      }
      if (row_weight) store(out, place + j, x, count - j);
    });
    store_sums(dot, board.warps, &board.dot, 1);
    cluster.sync();
    if (rank == 0 && warp == 0) {
      const float all = warp_sum(lane < blocks ? other->dot : 0.f);
      if (lane == 0) state[DOT * tile.state_stride] = all;
    }
  }
  cluster.sync();  // others may still read this block's sums
#endif
}

}  // namespace
}  // namespace opsd
