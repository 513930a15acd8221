// Products of a few rows with a large weight, in bf16 with sums in fp32, on processors that have an
// instruction for that (AVX512-BF16). The weight is packed in panels of 48 outputs: all their
// entries for two inputs, then for the next two. A panel stays in the L2 cache while all rows pass
// by it, 8 at a time, whose 24 vectors of sums stay in registers.
#include "product.h"

#include <immintrin.h>
#include <string.h>

#if !defined(__clang__)  // GCC's own headers, at -O3
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace opsd {
namespace {

constexpr int64_t PANEL = OPSD_PANEL, LANES = 16, PAIR = 2 * sizeof(uint16_t);
constexpr int VECTORS = PANEL / LANES;
constexpr int64_t LINE = 64;   // bytes of the cache
constexpr int64_t BLOCKS = 4;  // of rows, in which the next panel is fetched

int64_t panels(const opsd_product& p) { return (p.outputs + PANEL - 1) / PANEL; }

int64_t panel_bytes(const opsd_product& p) { return p.inputs / 2 * PANEL * PAIR; }

// Which of 16 outputs from `first` on there are.
__mmask16 among(int64_t first, int64_t outputs) {
  const int64_t count = outputs - first;
  return count <= 0 ? 0 : count >= LANES ? 0xffff : (1u << count) - 1;
}

template <int ROWS>
void run(const opsd_product& p, int64_t row, int64_t panel, const char* next) {
  const int64_t pairs = p.inputs / 2;
  const char* input = static_cast<const char*>(p.input) + row * pairs * PAIR;
  const char* weight = static_cast<const char*>(p.weight) + panel * panel_bytes(p);
  const uint16_t* bias = static_cast<const uint16_t*>(p.bias);
  uint16_t* out = static_cast<uint16_t*>(p.out) + row * p.outputs;
  __m512 sums[ROWS][VECTORS];
  __mmask16 there[VECTORS];
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t output = panel * PANEL + v * LANES;
    there[v] = among(output, p.outputs);
    __m512i first = _mm512_setzero_si512();
    if (bias && there[v])
      first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there[v], bias + output));
    for (int r = 0; r < ROWS; ++r) sums[r][v] = _mm512_castsi512_ps(_mm512_slli_epi32(first, 16));
  }
  for (int64_t i = 0; i < pairs; ++i) {
    __m512bh entries[VECTORS];
    for (int v = 0; v < VECTORS; ++v)
      entries[v] = (__m512bh)_mm512_loadu_si512(weight + (i * VECTORS + v) * LINE);
    if (next) __builtin_prefetch(next + i * (VECTORS * LINE / BLOCKS), 0, 2);
    for (int r = 0; r < ROWS; ++r) {
      int32_t pair;
      memcpy(&pair, input + (r * pairs + i) * PAIR, PAIR);
      for (int v = 0; v < VECTORS; ++v)
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)_mm512_set1_epi32(pair), entries[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v)
      if (there[v])
        _mm256_mask_storeu_epi16(out + r * p.outputs + panel * PANEL + v * LANES, there[v],
                                 (__m256i)_mm512_cvtneps_pbh(sums[r][v]));
}

void run_panel(const opsd_product& p, int64_t panel) {
  const bool fetches = panel + 1 < panels(p) && p.rows >= 8 * BLOCKS;
  const char* next = static_cast<const char*>(p.weight) + (panel + 1) * panel_bytes(p);
  int64_t row = 0;
  for (; row + 8 <= p.rows; row += 8) {
    const int64_t block = row / 8;
    const bool now = fetches && block < BLOCKS;
    run<8>(p, row, panel, now ? next + block * (panel_bytes(p) / BLOCKS) : nullptr);
  }
  if (row + 4 <= p.rows) run<4>(p, row, panel, nullptr), row += 4;
  if (row + 2 <= p.rows) run<2>(p, row, panel, nullptr), row += 2;
  if (row < p.rows) run<1>(p, row, panel, nullptr);
}

}  // namespace

void pack(const opsd_product* p) {
  const int64_t count = panels(*p), pairs = p->inputs / 2;
#pragma omp parallel for num_threads(p->threads)
  for (int64_t panel = 0; panel < count; ++panel) {
    char* out = static_cast<char*>(p->out) + panel * panel_bytes(*p);
    for (int64_t i = 0; i < pairs; ++i)
      for (int64_t output = panel * PANEL; output < (panel + 1) * PANEL; ++output, out += PAIR)
        if (output < p->outputs)
          memcpy(out, static_cast<const char*>(p->input) + (output * pairs + i) * PAIR, PAIR);
        else
          memset(out, 0, PAIR);
  }
}

void product(const opsd_product* p) {
  const int64_t count = panels(*p);
#pragma omp parallel for num_threads(p->threads)
  for (int64_t panel = 0; panel < count; ++panel) run_panel(*p, panel);
}

}  // namespace opsd
