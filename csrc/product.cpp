// Products of some rows with a large weight, with sums in fp32. Compiled once for each instruction
// set, like cpu.cpp.
//
// The weight is packed in panels of 48 outputs: all their entries for an input, then for the next.
// A panel stays in the L2 cache while all rows pass by it, some at a time, whose sums stay in
// registers. A weight in bf16 is packed by pairs of inputs and widened when it is read: Intel's
// instruction for products in bf16 takes nearly twice the time of those in fp32.
#include "product.h"

#include "bf16.h"
#include "cpu.h"

OPSD_DECLARE(OPSD_ISA)

namespace opsd {
namespace OPSD_ISA {
namespace {

constexpr int64_t PANEL = OPSD_PANEL;
constexpr int VECTORS = 3;                 // of outputs that run at once
constexpr int ROWS = LANES == 16 ? 8 : 4;  // that run at once: ROWS * VECTORS registers
constexpr int64_t STRIP = VECTORS * LANES;
constexpr int64_t BLOCKS = 4;  // of ROWS, in which the next panel is fetched

// How many inputs' entries are packed in 32 bits.
template <class T>
constexpr int TOGETHER = sizeof(uint32_t) / sizeof(T);

INLINE Vector widened(float, Bits bits, int) { return reinterpret_cast<Vector>(bits); }

INLINE Vector widened(Bf16, Bits bits, int second) {
  return reinterpret_cast<Vector>(second ? bits & 0xffff0000 : bits << 16);
}

int64_t panels(const opsd_product& p) { return (p.outputs + PANEL - 1) / PANEL; }

template <class T>
int64_t panel_size(const opsd_product& p) {
  return p.inputs / TOGETHER<T> * PANEL;
}

// The products of COUNT rows with a strip of a packed weight. next: null, or what to fetch.
template <class T, int COUNT>
void multiply(const opsd_product& p, int64_t row, int64_t output, const uint32_t* weight,
              const uint32_t* next) {
  const float* input = p.input + row * p.inputs;
  const int64_t left = p.outputs - output, count = left < STRIP ? left : STRIP;
  T lanes[STRIP] = {};
  if (p.bias) memcpy(lanes, static_cast<const T*>(p.bias) + output, count * sizeof(T));
  Vector sums[COUNT][VECTORS];
  for (int r = 0; r < COUNT; ++r)
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = read(lanes + v * LANES);
  for (int64_t i = 0; i < p.inputs; i += TOGETHER<T>, weight += PANEL) {
    Bits bits[VECTORS];
    for (int v = 0; v < VECTORS; ++v) memcpy(&bits[v], weight + v * LANES, sizeof bits[v]);
    if (next) __builtin_prefetch(next, 0, 2), next += STRIP / BLOCKS;
    for (int n = 0; n < TOGETHER<T>; ++n) {
      Vector entries[VECTORS];
      for (int v = 0; v < VECTORS; ++v) entries[v] = widened(T{}, bits[v], n);
      for (int r = 0; r < COUNT; ++r)
        for (int v = 0; v < VECTORS; ++v) sums[r][v] += input[r * p.inputs + i + n] * entries[v];
    }
  }
  T* out = static_cast<T*>(p.out) + row * p.outputs + output;
  for (int r = 0; r < COUNT; ++r) {
    T* to = count == STRIP ? out + r * p.outputs : lanes;
    for (int v = 0; v < VECTORS; ++v) write(to + v * LANES, sums[r][v]);
    if (to == lanes) memcpy(out + r * p.outputs, lanes, count * sizeof(T));
  }
}

template <class T>
void run_panel(const opsd_product& p, int64_t panel) {
  const int64_t size = panel_size<T>(p);
  const uint32_t* weight = static_cast<const uint32_t*>(p.weight) + panel * size;
  const uint32_t* next = weight + size;
  const bool fetches = panel + 1 < panels(p) && p.rows >= ROWS * BLOCKS;
  for (int64_t strip = 0; strip < PANEL; strip += STRIP, weight += STRIP) {
    const int64_t output = panel * PANEL + strip;
    if (output >= p.outputs) break;
    int64_t row = 0;
    for (; row + ROWS <= p.rows; row += ROWS) {
      const bool now = fetches && row < ROWS * BLOCKS;
      multiply<T, ROWS>(p, row, output, weight, now ? next : nullptr);
      if (now) next += size * STRIP / PANEL / BLOCKS;
    }
    if (row + 4 <= p.rows) multiply<T, 4>(p, row, output, weight, nullptr), row += 4;
    if (row + 2 <= p.rows) multiply<T, 2>(p, row, output, weight, nullptr), row += 2;
    if (row < p.rows) multiply<T, 1>(p, row, output, weight, nullptr);
  }
}

template <class T>
void pack_panel(const opsd_product& p, int64_t panel) {
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + panel * PANEL * p.inputs;
  for (int64_t i = 0; i < p.inputs; i += TOGETHER<T>)
    for (int64_t output = panel * PANEL; output < (panel + 1) * PANEL; ++output)
      for (int n = 0; n < TOGETHER<T>; ++n)
        *out++ = output < p.outputs ? weight[output * p.inputs + i + n] : T{};
}

}  // namespace

void pack_weight(const opsd_product* p) {
  const int64_t count = panels(*p);
#pragma omp parallel for num_threads(p->threads)
  for (int64_t panel = 0; panel < count; ++panel)
    p->bf16 ? pack_panel<Bf16>(*p, panel) : pack_panel<float>(*p, panel);
}

void packed_product(const opsd_product* p) {
  const int64_t count = panels(*p);
#pragma omp parallel for num_threads(p->threads)
  for (int64_t panel = 0; panel < count; ++panel)
    p->bf16 ? run_panel<Bf16>(*p, panel) : run_panel<float>(*p, panel);
}

}  // namespace OPSD_ISA
}  // namespace opsd
