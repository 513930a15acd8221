// The tile passes on the CPU. Compiled once an instruction set, with OPSD_ISA naming it; see
// setup.py and cpu_dispatch.cpp.
//
// A row's passes follow one another while both of its tiles (256 KB at V = 32768) lie in the L2
// cache: the logits are read from memory once and the gradient is written once.
//
// Sums run in fp32 over blocks of 512 entries, one partial sum a lane, and in double over the
// blocks: with V = 150 000 a single fp32 sum would lose three digits.
#include "cpu.h"

#include <math.h>

#include "vector.h"

OPSD_DECLARE(OPSD_ISA)

namespace opsd {
namespace OPSD_ISA {
namespace {

#define INLINE __attribute__((always_inline))

constexpr int64_t BLOCK = 512;

inline int64_t end_of_block(int64_t start, int64_t v) {
  return start + BLOCK < v ? start + BLOCK : v;
}

// The vectors of a row: whole ones, and the last, partial one as a whole one padded with logits of
// -inf, whose probability is 0, so that they add nothing to any sum.
struct Whole {
  Vector logits(const float* x) const { return load(x); }
  Vector values(const float* x) const { return load(x); }
  void put(float* x, Vector v) const { store(x, v); }
};

struct Partial {
  int64_t count;
  Vector logits(const float* x) const { return load_some(x, count, -INFINITY); }
  Vector values(const float* x) const { return load_some(x, count, 0.f); }
  void put(float* x, Vector v) const { store_some(x, v, count); }
};

template <class Body>
inline INLINE void each(int64_t start, int64_t end, const Body& body) {
  int64_t j = start;
  for (; j + LANES <= end; j += LANES) body(j, Whole());
  if (j < end) body(j, Partial{end - j});
}

struct Normaliser {
  float max, log_sum;  // log p = (z - max) - log_sum: exact subtraction first, since z may be 1e4

  template <class F>
  F log_p(F z) const {
    return (z - max) - log_sum;
  }
};

// The product becomes the logit, in place, and its log-normaliser is found in the same sweep: a
// block's maximum and then its sum of exponentials while the block is in the L1 cache.
template <bool SOFTCAP>
Normaliser normalise(float* x, const float* bias, int64_t v, const opsd_options& o) {
  const float inner = SOFTCAP ? o.scale / o.softcap : o.scale / o.temperature;
  const float outer = o.softcap / o.temperature;
  float most = -INFINITY;
  double total = 0.0;
  for (int64_t start = 0; start < v; start += BLOCK) {
    const int64_t end = end_of_block(start, v);
    Vector block_max = L::all(-INFINITY), block_sum = L::all(0.f);
    each(start, end, [&](int64_t j, auto part) INLINE {
      Vector z = part.logits(x + j);
      if (bias) z += part.values(bias + j);
      z *= inner;
      if (SOFTCAP) z = outer * tanh_(z);
      part.put(x + j, z);
      z = part.logits(x + j);  // the padding again: a negative scale would have turned it to +inf
      block_max = L::select(z > block_max, z, block_max);
    });
    const float highest = max(block_max);
    if (highest > most) {
      total *= exp(static_cast<double>(most) - highest);  // first block: 0 * exp(-inf) = 0
      most = highest;
    }
    // All -inf so far: any finite offset will do, exp(-inf) = 0. The row's own log-normaliser is
    // then -inf.
    const float offset = most == -INFINITY ? 0.f : most;
    each(start, end,
         [&](int64_t j, auto part) INLINE { block_sum += exp_(part.logits(x + j) - offset); });
    total += sum(block_sum);
  }
  return {most, static_cast<float>(log(total))};
}

Normaliser normalise(float* x, const float* bias, int64_t v, const opsd_options& o) {
  return o.softcap > 0.f ? normalise<true>(x, bias, v, o) : normalise<false>(x, bias, v, o);
}

// From the derivative by the logit z to that by the soft cap's argument: times 1 - tanh^2.
template <bool SOFTCAP>
inline INLINE Vector through_softcap(Vector g, Vector z, float inverse) {
  if (!SOFTCAP) return g;
  const Vector t = z * inverse;
  return g * (1.f - t * t);
}

struct Row {
  double divergence = 0, clipped = 0, entropy_s = 0, entropy_t = 0, count = 0;
  double mean_q = 0;          // sum S q, of the unclipped gradient
  double mean_clipped_q = 0;  // the same of the clipped one; for forward_kl the sum of its q
};

// All sums over a row. Of the gradient it leaves what it can: forward_kl's is written at once, the
// others' q goes where the teacher's logits were.
template <int KIND, bool CLIP, bool GRADIENT, bool SOFTCAP>
Row sums(float* zs, float* zt, Normaliser ns, Normaliser nt, int64_t v, float factor,
         const opsd_options& o) {
  Row row;
  const float beta = o.beta, threshold = o.clip_threshold,
              inverse = SOFTCAP ? o.temperature / o.softcap : 0.f;
  const Vector zero = L::all(0.f), one = L::all(1.f);
  for (int64_t start = 0; start < v; start += BLOCK) {
    Vector divergence = zero, clipped = zero, entropy_s = zero, entropy_t = zero, count = zero,
           mean_q = zero, mean_clipped_q = zero;
    each(start, end_of_block(start, v), [&](int64_t j, auto part) INLINE {
      const Vector z = part.logits(zs + j);
      const Vector log_s = ns.log_p(z), log_t = nt.log_p(part.logits(zt + j));
      const Entry<Vector> e = entry<KIND>(log_s, log_t, beta);
      divergence += e.term;
      entropy_s -= product(e.s, log_s);
      entropy_t -= product(e.t, log_t);
      if (KIND != FORWARD_KL) mean_q += e.s * e.q;
      if (CLIP) {
        const Vector q = clipped_q<KIND>(e, threshold);
        clipped += L::select(e.term > threshold, L::all(threshold), e.term);
        count += L::select(e.term > threshold, one, zero);
        mean_clipped_q += KIND == FORWARD_KL ? q : e.s * q;
      } else if (GRADIENT) {
        if (KIND == FORWARD_KL) {
          part.put(zs + j, through_softcap<SOFTCAP>(factor * (e.s - e.q), z, inverse));
        } else {
          part.put(zt + j, e.q);
        }
      }
    });
    row.divergence += sum(divergence);
    row.entropy_s += sum(entropy_s);
    row.entropy_t += sum(entropy_t);
    row.mean_q += sum(mean_q);
    if (CLIP) {
      row.clipped += sum(clipped);
      row.count += sum(count);
      row.mean_clipped_q += sum(mean_clipped_q);
    }
  }
  return row;
}

// S (q - sum S q) from the q that `sums` left.
template <bool SOFTCAP>
void gradient(float* zs, const float* q, Normaliser ns, int64_t v, float factor, float mean_q,
              const opsd_options& o) {
  const float inverse = SOFTCAP ? o.temperature / o.softcap : 0.f;
  each(0, v, [&](int64_t j, auto part) INLINE {
    const Vector z = part.logits(zs + j);
    const Vector g = factor * exp_(ns.log_p(z)) * (part.values(q + j) - mean_q);
    part.put(zs + j, through_softcap<SOFTCAP>(g, z, inverse));
  });
}

// The entry clip's gradient, and its dot product with the unclipped one.
template <int KIND, bool GRADIENT, bool SOFTCAP>
double clipped_gradient(float* zs, const float* zt, Normaliser ns, Normaliser nt, int64_t v,
                        float factor, const Row& row, const opsd_options& o) {
  const float beta = o.beta, threshold = o.clip_threshold,
              inverse = SOFTCAP ? o.temperature / o.softcap : 0.f;
  const float mean_q = static_cast<float>(row.mean_q),
              mean_clipped_q = static_cast<float>(row.mean_clipped_q);
  double dot = 0.0;
  for (int64_t start = 0; start < v; start += BLOCK) {
    Vector block_dot = L::all(0.f);
    each(start, end_of_block(start, v), [&](int64_t j, auto part) INLINE {
      const Vector z = part.logits(zs + j);
      const Entry<Vector> e = entry<KIND>(ns.log_p(z), nt.log_p(part.logits(zt + j)), beta);
      const Vector q = clipped_q<KIND>(e, threshold);
      const Vector unclipped = KIND == FORWARD_KL ? e.s - e.q : e.s * (e.q - mean_q);
      const Vector clipped =
          KIND == FORWARD_KL ? e.s * mean_clipped_q - q : e.s * (q - mean_clipped_q);
      block_dot += clipped * unclipped;
      if (GRADIENT) part.put(zs + j, through_softcap<SOFTCAP>(factor * clipped, z, inverse));
    });
    dot += sum(block_dot);
  }
  return dot;
}

template <int KIND, bool GRADIENT, bool SOFTCAP>
void divergence_row(float* zs, float* zt, const float* bias, const float* teacher_bias,
                    float weight, float* stats, int64_t stats_stride, float* opposed, int64_t v,
                    const opsd_options& o) {
  const Normaliser ns = normalise(zs, bias, v, o), nt = normalise(zt, teacher_bias, v, o);
  float factor = weight * o.scale / o.temperature;
  Row row;
  float loss, count = 0.f;
  if (o.clip == CLIP_ENTRY) {
    row = sums<KIND, true, false, SOFTCAP>(zs, zt, ns, nt, v, factor, o);
    const double dot = clipped_gradient<KIND, GRADIENT, SOFTCAP>(zs, zt, ns, nt, v, factor, row, o);
    loss = static_cast<float>(row.clipped);
    count = static_cast<float>(row.count);
    *opposed = count > 0.f && dot < 0.0 ? 1.f : 0.f;
  } else {
    row = sums<KIND, false, GRADIENT, SOFTCAP>(zs, zt, ns, nt, v, factor, o);
    loss = static_cast<float>(row.divergence);
    if (o.clip == CLIP_TOKEN && loss > o.clip_threshold) {
      const float shrink = o.clip_threshold / loss;
      factor *= shrink;
      loss = o.clip_threshold;
      count = 1.f;
      if (GRADIENT && KIND == FORWARD_KL) {
        for (int64_t j = 0; j < v; ++j) zs[j] *= shrink;
      }
    }
    if (GRADIENT && KIND != FORWARD_KL) {
      gradient<SOFTCAP>(zs, zt, ns, v, factor, static_cast<float>(row.mean_q), o);
    }
  }
  stats[0 * stats_stride] = loss;
  stats[1 * stats_stride] = static_cast<float>(row.divergence);
  stats[2 * stats_stride] = static_cast<float>(row.entropy_s);
  stats[3 * stats_stride] = static_cast<float>(row.entropy_t);
  stats[4 * stats_stride] = count;
}

typedef void divergence_row_t(float*, float*, const float*, const float*, float, float*, int64_t,
                              float*, int64_t, const opsd_options&);

template <int KIND>
divergence_row_t* choose_row(bool with_gradient, bool softcap) {
  if (with_gradient)
    return softcap ? divergence_row<KIND, true, true> : divergence_row<KIND, true, false>;
  return softcap ? divergence_row<KIND, false, true> : divergence_row<KIND, false, false>;
}

template <bool GRADIENT, bool SOFTCAP>
void log_prob_row(float* z, const float* bias, int64_t target, float weight, float* stats,
                  int64_t stats_stride, int64_t v, const opsd_options& o) {
  const Normaliser n = normalise(z, bias, v, o);
  const float factor = weight * o.scale / o.temperature,
              inverse = SOFTCAP ? o.temperature / o.softcap : 0.f;
  const float target_logit = z[target];
  double entropy = 0.0;
  for (int64_t start = 0; start < v; start += BLOCK) {
    Vector block_entropy = L::all(0.f);
    each(start, end_of_block(start, v), [&](int64_t j, auto part) INLINE {
      const Vector logit = part.logits(z + j);
      const Vector log_p = n.log_p(logit), p = exp_(log_p);
      block_entropy -= product(p, log_p);
      if (GRADIENT) part.put(z + j, through_softcap<SOFTCAP>(-factor * p, logit, inverse));
    });
    entropy += sum(block_entropy);
  }
  if (GRADIENT) {
    const float t = target_logit * inverse;
    z[target] += factor * (1.f - t * t);
  }
  stats[0 * stats_stride] = n.log_p(target_logit);
  stats[1 * stats_stride] = static_cast<float>(entropy);
}

}  // namespace

void divergence_rows(float* student, float* teacher, const float* bias, const float* teacher_bias,
                     const float* row_weight, float* stats, float* opposed, int64_t n, int64_t v,
                     int64_t student_stride, int64_t teacher_stride, int64_t stats_stride,
                     const opsd_options* options) {
  const opsd_options o = *options;
  const bool with_gradient = row_weight != nullptr, softcap = o.softcap > 0.f;
  divergence_row_t* row =
      o.divergence == FORWARD_KL   ? choose_row<FORWARD_KL>(with_gradient, softcap)
      : o.divergence == REVERSE_KL ? choose_row<REVERSE_KL>(with_gradient, softcap)
                                   : choose_row<JSD>(with_gradient, softcap);
#pragma omp parallel for num_threads(o.threads) schedule(static) if (o.threads > 1 && n > 1)
  for (int64_t i = 0; i < n; ++i) {
    row(student + i * student_stride, teacher + i * teacher_stride, bias, teacher_bias,
        row_weight ? row_weight[i] : 0.f, stats + i, stats_stride, opposed + i, v, o);
  }
}

void log_prob_rows(float* logits, const float* bias, const int64_t* targets,
                   const float* row_weight, float* stats, int64_t n, int64_t v, int64_t stride,
                   int64_t stats_stride, const opsd_options* options) {
  const opsd_options o = *options;
  const bool softcap = o.softcap > 0.f;
  auto* row = row_weight ? (softcap ? log_prob_row<true, true> : log_prob_row<true, false>)
                         : (softcap ? log_prob_row<false, true> : log_prob_row<false, false>);
#pragma omp parallel for num_threads(o.threads) schedule(static) if (o.threads > 1 && n > 1)
  for (int64_t i = 0; i < n; ++i) {
    row(logits + i * stride, bias, targets[i], row_weight ? row_weight[i] : 0.f, stats + i,
        stats_stride, v, o);
  }
}

}  // namespace OPSD_ISA
}  // namespace opsd
