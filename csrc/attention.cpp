// Attention of the newest tokens, on the CPU. Compiled once for each instruction set, like cpu.cpp.
//
// Blocks of tokens stay in the L1 cache: first their scores, then their share of the sum of values.
// All sums are in fp32, whatever the tensors' type.
#include "attention.h"

#include <math.h>

#include "bf16.h"
#include "cpu.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#if !defined(__clang__)  // GCC's own headers, at -O3
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

OPSD_DECLARE(OPSD_ISA)

namespace opsd {
namespace OPSD_ISA {
namespace {

constexpr int64_t BLOCK = 128;  // tokens
constexpr int64_t LINE = 64;    // bytes of the cache
constexpr int64_t MOST_ROWS = 4;
constexpr int64_t MOST_WIDTH = 512;
constexpr int STRIP = LANES == 16 ? 4 : 2;  // vectors of a value whose sums fit in the registers

INLINE float total(Vector v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float x[LANES];
  store(x, v);
  for (int n = LANES / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  return x[0];
#endif
}

// Some rows of a group of a sequence.
template <class T, int ROWS>
struct Rows {
  const opsd_attention& a;
  const T *keys, *values;
  const uint8_t* allowed;
  float query[ROWS][MOST_WIDTH], out[ROWS][MOST_WIDTH], weights[ROWS][BLOCK];
  float most[ROWS], sum[ROWS], shrink[ROWS];

  Rows(const opsd_attention& all, int64_t sequence, int64_t group)
      : a(all),
        keys(first(a.keys, a.key_strides, sequence, group)),
        values(first(a.values, a.value_strides, sequence, group)),
        allowed(a.allowed ? a.allowed + sequence * a.allowed_stride : nullptr) {}

  static const T* first(const void* x, const int64_t* strides, int64_t sequence, int64_t group) {
    return static_cast<const T*>(x) + sequence * strides[0] + group * strides[1];
  }

  bool sees(int64_t token) const { return !allowed || allowed[token]; }

  void score(int64_t start, int64_t end) {
    for (int64_t t = start; t < end; ++t) {
      Vector products[ROWS] = {};
      const T *key = keys + t * a.key_strides[2], *value = values + t * a.value_strides[2];
      for (int64_t i = 0; i < a.value_width; i += LINE / sizeof(T)) __builtin_prefetch(value + i);
      for (int64_t i = 0; sees(t) && i < a.width; i += LANES) {
        const Vector entries = read(key + i);
        for (int r = 0; r < ROWS; ++r) products[r] += load(query[r] + i) * entries;
      }
      for (int r = 0; r < ROWS; ++r)
        weights[r][t - start] = sees(t) ? total(products[r]) : -INFINITY;
    }
  }

  // Converts scores to weights relative to the largest score so far.
  void weigh(int64_t count) {
    const int64_t padded = (count + LANES - 1) / LANES * LANES;
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t j = count; j < padded; ++j) weights[r][j] = -INFINITY;
      Vector largest = L::all(most[r]), added = L::all(0.f);
      for (int64_t j = 0; j < padded; j += LANES) {
        const Vector z = load(weights[r] + j);
        largest = L::select(z > largest, z, largest);
      }
      const float highest = opsd::OPSD_ISA::max(largest);
      for (int64_t j = 0; j < padded; j += LANES) {
        const Vector weight = exp_(load(weights[r] + j) - highest);
        store(weights[r] + j, weight);
        added += weight;
      }
      shrink[r] = exp_(most[r] - highest);
      sum[r] = sum[r] * shrink[r] + total(added);
      most[r] = highest;
    }
  }

  template <int N>
  void add_values(int64_t start, int64_t end, int64_t i) {
    Vector sums[ROWS][N];
    for (int r = 0; r < ROWS; ++r)
      for (int n = 0; n < N; ++n) sums[r][n] = load(out[r] + i + n * LANES) * shrink[r];
    for (int64_t t = start; t < end; ++t) {
      if (!sees(t)) continue;  // its value may be NaN
      const T* value = values + t * a.value_strides[2] + i;
      for (int n = 0; n < N; ++n) {
        const Vector entries = read(value + n * LANES);
        for (int r = 0; r < ROWS; ++r) sums[r][n] += weights[r][t - start] * entries;
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int n = 0; n < N; ++n) store(out[r] + i + n * LANES, sums[r][n]);
  }

  void run(const T* given, T* result) {
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t i = 0; i < a.width; i += LANES)
        store(query[r] + i, read(given + r * a.width + i) * a.scale);
      for (int64_t i = 0; i < a.value_width; ++i) out[r][i] = 0.f;
      most[r] = -INFINITY;
      sum[r] = 0.f;
    }
    for (int64_t start = 0; start < a.tokens; start += BLOCK) {
      const int64_t end = start + BLOCK < a.tokens ? start + BLOCK : a.tokens;
      int64_t first = start;
      while (first < end && !sees(first)) ++first;
      if (first == end) continue;
      score(first, end);
      weigh(end - first);
      int64_t i = 0;
      for (; i + STRIP * LANES <= a.value_width; i += STRIP * LANES)
        add_values<STRIP>(first, end, i);
      for (; i < a.value_width; i += LANES) add_values<1>(first, end, i);
    }
    for (int r = 0; r < ROWS; ++r) {
      const float inverse = sum[r] == 0.f ? 0.f : 1.f / sum[r];  // 0: it sees nothing
      for (int64_t i = 0; i < a.value_width; i += LANES)
        write(result + r * a.value_width + i, load(out[r] + i) * inverse);
    }
  }
};

template <class T, int ROWS>
void attend(const opsd_attention& a, int64_t sequence, int64_t group, int64_t row) {
  const int64_t before = (sequence * a.groups + group) * a.rows + row;
  Rows<T, ROWS> rows(a, sequence, group);
  rows.run(static_cast<const T*>(a.query) + before * a.width,
           static_cast<T*>(a.out) + before * a.value_width);
}

template <class T>
void attend_all(const opsd_attention& a) {
  const int64_t blocks = (a.rows + MOST_ROWS - 1) / MOST_ROWS;
  const int64_t count = a.sequences * a.groups * blocks;
#pragma omp parallel for num_threads(a.threads)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = i % blocks * MOST_ROWS, group = i / blocks % a.groups;
    const int64_t sequence = i / blocks / a.groups;
    switch (a.rows - row) {
      case 1: attend<T, 1>(a, sequence, group, row); break;
      case 2: attend<T, 2>(a, sequence, group, row); break;
      case 3: attend<T, 3>(a, sequence, group, row); break;
      default: attend<T, 4>(a, sequence, group, row);
    }
  }
}

}  // namespace

void attention(const opsd_attention* a) {
  if (a->bf16)
    attend_all<Bf16>(*a);
  else
    attend_all<float>(*a);
}

}  // namespace OPSD_ISA
}  // namespace opsd
