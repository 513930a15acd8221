// The tile functions on the CPU. Compiled once for each instruction set, whose name is OPSD_ISA;
// see setup.py and cpu_dispatch.cpp.
//
// Sums are in fp32 within blocks of 512 entries, one partial sum in each lane, and in double over
// the blocks: with V = 150 000 a single fp32 sum would lose three digits.
#include "cpu.h"

#include <math.h>

#include "vector.h"

#if defined(__x86_64__) && defined(__GLIBC__)
// Link the oldest versions of these functions: the newest need glibc 2.29, and a wheel would not
// run on all systems of torch's own wheels (manylinux_2_28).
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
#endif

OPSD_DECLARE(OPSD_ISA)

namespace opsd {
namespace OPSD_ISA {
namespace {

#define INLINE __attribute__((always_inline))

constexpr int64_t BLOCK = 512;

inline int64_t end_of_block(int64_t start, int64_t v) {
  return start + BLOCK < v ? start + BLOCK : v;
}

// The vectors of a row. A partial vector at the end is padded with logits of -inf, whose
// probability is 0, so that they add nothing to any sum.
struct Whole {
  Vector get(const float* x) const { return load(x); }
  Vector padded(Vector z) const { return z; }
  void put(float* x, Vector v) const { store(x, v); }
};

struct Partial {
  int64_t count;
  Vector get(const float* x) const { return load_some(x, count); }
  Vector padded(Vector z) const { return keep(z, count, -INFINITY); }
  void put(float* x, Vector v) const { store_some(x, v, count); }
};

template <class Body>
inline INLINE void each(int64_t start, int64_t end, const Body& body) {
  int64_t j = start;
  for (; j + LANES <= end; j += LANES) body(j, Whole());
  if (j < end) body(j, Partial{end - j});
}

// One role's products for one token; converts them to logits and log-probabilities.
template <bool SOFTCAP>
struct Role {
  float* x;
  const float* bias;
  bool capped;  // SOFTCAP: whether any role is capped
  float inner, outer, inverse;  // logit = outer tanh(inner (product + bias)), or inner (...)
  float max = 0.f, log_sum = 0.f;
  double log_normaliser = 0.0;  // both

  Role(float* products, const float* role_bias, const opsd_transform& o)
      : x(products),
        bias(role_bias),
        capped(SOFTCAP && o.softcap > 0.f),
        inner(capped ? o.scale / o.softcap : o.scale / o.temperature),
        outer(o.softcap / o.temperature),
        inverse(capped ? o.temperature / o.softcap : 0.f) {}

  void normalise_by(const float* state, int64_t stride) {
    max = state[MAX * stride];
    const double log_of_sum = log1p(static_cast<double>(state[REST * stride]));
    log_sum = static_cast<float>(log_of_sum);
    log_normaliser = max + log_of_sum;
  }

  template <class Part>
  INLINE Vector logit(int64_t j, Part part) const {
    Vector z = part.get(x + j);
    if (bias) z += part.get(bias + j);
    z *= inner;
    if (SOFTCAP && capped) z = outer * tanh_(z);
    return part.padded(rounded(z));
  }

  // Subtract the maximum first, exactly, since z may be 1e4.
  INLINE Vector log_p(Vector z) const { return (z - max) - log_sum; }

  // Convert the derivative by the logit z to that by the soft cap's argument: times 1 - tanh^2.
  INLINE Vector through_softcap(Vector g, Vector z) const {
    if (!SOFTCAP) return g;
    const Vector t = z * inverse;
    return g * (1.f - t * t);
  }
};

// Adds a row to its normaliser: for each block its maximum, then its sums while it is in the L1
// cache.
template <bool SOFTCAP>
void normalise(const Role<SOFTCAP>& role, int64_t v, float* state, int64_t stride) {
  float most = state[MAX * stride];
  double rest = state[REST * stride], moment = state[MOMENT * stride];
  float logits[BLOCK + LANES];
  for (int64_t start = 0; start < v; start += BLOCK) {
    const int64_t end = end_of_block(start, v);
    Vector block_max = L::all(-INFINITY), block_rest = L::all(0.f), block_moment = L::all(0.f);
    each(start, end, [&](int64_t j, auto part) INLINE {
      const Vector z = role.logit(j, part);
      store(logits + (j - start), z);
      block_max = L::select(z > block_max, z, block_max);
    });
    const float highest = opsd::OPSD_ISA::max(block_max);
    if (highest > most) {
      const double shift = static_cast<double>(highest) - most, total = 1.0 + rest;
      moment = total == 0.0 ? 0.0 : exp(-shift) * (moment + shift * total);
      rest = total == 0.0 ? -1.0 : exp(-shift) * total - 1.0;
      most = highest;
    }
    // If all are -inf so far, any finite offset works: exp(-inf) = 0.
    const float offset = most == -INFINITY ? 0.f : most;
    IntVector largest = {};  // entries equal to the maximum, counted separately
    for (int64_t j = 0; j < end - start; j += LANES) {
      const Vector below = load(logits + j) - offset, p = exp_(below);
      largest -= below == 0.f;
      block_rest += L::select(below == 0.f, L::all(0.f), p);
      block_moment -= product(p, below);
    }
    rest += sum(L::convert(largest)) + sum(block_rest);
    moment += sum(block_moment);
  }
  state[MAX * stride] = most;
  state[REST * stride] = static_cast<float>(rest);
  state[MOMENT * stride] = static_cast<float>(moment);
}

// The difference of the normalisers' logarithms: log T - log S = (z_t - z_s) - shift.
template <bool SOFTCAP>
float shift_of(const Role<SOFTCAP>& student, const Role<SOFTCAP>& teacher) {
  return static_cast<float>(teacher.log_normaliser - student.log_normaliser);
}

template <int KIND, bool SOFTCAP>
inline INLINE Entry<Vector> at(const Role<SOFTCAP>& student, const Role<SOFTCAP>& teacher, Vector z,
                               Vector z_t, float shift, float beta) {
  return entry<KIND>(student.log_p(z), teacher.log_p(z_t), (z_t - z) - shift, beta);
}

// What the first sweep after the normalisers writes into the tiles.
enum Leave {
  NOTHING,
  GRADIENT,  // of forward_kl, which needs no sum
  FOR_LATER,  // the unnormalised gradient in the teacher's products, for `gradient_of_unnormalised`
  TWO_TERMS,  // row_weight * unnormalised gradient in the student's products, row_weight * S in the
              // teacher's
};

struct Sums {
  double divergence = 0, unnormalised = 0, clipped = 0, count = 0, clipped_unnormalised = 0;
};

template <int KIND, bool CLIP, int LEAVE, bool SOFTCAP>
Sums sums_of(const Role<SOFTCAP>& student, const Role<SOFTCAP>& teacher, int64_t v, float factor,
             float target_weight, const opsd_options& o) {
  Sums total;
  const float beta = o.beta, threshold = o.clip_threshold, shift = shift_of(student, teacher);
  const Vector zero = L::all(0.f), one = L::all(1.f);
  for (int64_t start = 0; start < v; start += BLOCK) {
    Vector divergence = zero, unnormalised = zero, clipped = zero, count = zero, clipped_sum = zero;
    each(start, end_of_block(start, v), [&](int64_t j, auto part) INLINE {
      const Vector z = student.logit(j, part);
      const Entry<Vector> e = at<KIND>(student, teacher, z, teacher.logit(j, part), shift, beta);
      divergence += e.term;
      unnormalised += e.unnormalised;
      if (CLIP) {
        clipped += clipped_term<KIND>(e, threshold);
        count += L::select(e.plain > threshold, one, zero);
        clipped_sum += clipped_unnormalised<KIND>(e, threshold);
      }
      if (LEAVE == GRADIENT) {
        const Vector g = e.s * (1.f - target_weight) + e.unnormalised;
        part.put(student.x + j, student.through_softcap(factor * g, z));
      } else if (LEAVE == FOR_LATER) {
        part.put(teacher.x + j, e.unnormalised);
      } else if (LEAVE == TWO_TERMS) {
        part.put(student.x + j, student.through_softcap(factor * e.unnormalised, z));
        part.put(teacher.x + j, student.through_softcap(factor * e.s, z));
      }
    });
    total.divergence += sum(divergence);
    total.unnormalised += sum(unnormalised);
    if (CLIP) {
      total.clipped += sum(clipped);
      total.count += sum(count);
      total.clipped_unnormalised += sum(clipped_sum);
    }
  }
  return total;
}

void add(const Sums& sums, bool clip, float* state, int64_t stride) {
  state[DIVERGENCE * stride] += static_cast<float>(sums.divergence);
  state[UNNORMALISED * stride] += static_cast<float>(sums.unnormalised);
  if (clip) {
    state[CLIPPED * stride] += static_cast<float>(sums.clipped);
    state[COUNT * stride] += static_cast<float>(sums.count);
    state[CLIPPED_UNNORMALISED * stride] += static_cast<float>(sums.clipped_unnormalised);
  }
}

// Computes p - S sum p from the unnormalised gradient p; with the entry clip also the dot product
// of the clipped and the unclipped gradient.
template <int KIND, bool CLIP, bool WRITE, bool SOFTCAP>
double gradient_of(const Role<SOFTCAP>& student, const Role<SOFTCAP>& teacher, int64_t v,
                   float factor, float sum_unnormalised, float sum_clipped, float target_weight,
                   const opsd_options& o) {
  const float beta = o.beta, threshold = o.clip_threshold, shift = shift_of(student, teacher);
  double dot = 0.0;
  for (int64_t start = 0; start < v; start += BLOCK) {
    Vector block_dot = L::all(0.f);
    each(start, end_of_block(start, v), [&](int64_t j, auto part) INLINE {
      const Vector z = student.logit(j, part);
      const Entry<Vector> e = at<KIND>(student, teacher, z, teacher.logit(j, part), shift, beta);
      Vector g =
          KIND == FORWARD_KL ? e.unnormalised + e.s : e.unnormalised - e.s * sum_unnormalised;
      if (CLIP) {
        const Vector clipped = clipped_unnormalised<KIND>(e, threshold) - e.s * sum_clipped;
        block_dot += clipped * g;
        g = clipped;
      }
      g -= e.s * target_weight;
      if (WRITE) part.put(student.x + j, student.through_softcap(factor * g, z));
    });
    if (CLIP) dot += sum(block_dot);
  }
  return dot;
}

template <bool SOFTCAP>
void gradient_of_unnormalised(const Role<SOFTCAP>& student, const float* unnormalised, int64_t v,
                              float factor, float sum_unnormalised) {
  each(0, v, [&](int64_t j, auto part) INLINE {
    const Vector z = student.logit(j, part);
    const Vector s = exp_(student.log_p(z));
    const Vector g = factor * (part.get(unnormalised + j) - s * sum_unnormalised);
    part.put(student.x + j, student.through_softcap(g, z));
  });
}

// --- One token of a tile ---

template <bool SOFTCAP>
struct Token {
  Role<SOFTCAP> student, teacher;
  float* state;
  int64_t stride;

  Token(const opsd_tile& tile, int64_t i, const opsd_options& o)
      : student(tile.student + i * tile.student_stride, tile.bias, o.student),
        teacher(tile.teacher + i * tile.teacher_stride, tile.teacher_bias, o.teacher),
        state(tile.state + i),
        stride(tile.state_stride) {}

  float& at(int row) const { return state[row * stride]; }

  void normalise(int64_t v) const {
    opsd::OPSD_ISA::normalise(student, v, state + STUDENT * stride, stride);
    opsd::OPSD_ISA::normalise(teacher, v, state + TEACHER * stride, stride);
  }

  void use_normalisers() {
    student.normalise_by(state + STUDENT * stride, stride);
    teacher.normalise_by(state + TEACHER * stride, stride);
  }
};

template <bool SOFTCAP>
void normalisers_row(const opsd_tile& tile, int64_t i, const opsd_options& o) {
  Token<SOFTCAP>(tile, i, o).normalise(tile.v);
}

template <int KIND, bool SOFTCAP>
void sums_row(const opsd_tile& tile, int64_t i, const opsd_options& o) {
  Token<SOFTCAP> token(tile, i, o);
  token.use_normalisers();
  const bool clip = o.clip == CLIP_ENTRY;
  const auto sums = clip ? sums_of<KIND, true, NOTHING, SOFTCAP>
                         : sums_of<KIND, false, NOTHING, SOFTCAP>;
  add(sums(token.student, token.teacher, tile.v, 0.f, 0.f, o), clip, token.state, token.stride);
}

template <int KIND, bool SOFTCAP>
void gradient_row(const opsd_tile& tile, int64_t i, const float* row_weight, bool sums_known,
                  const opsd_options& o) {
  Token<SOFTCAP> token(tile, i, o);
  token.use_normalisers();
  const float factor = row_weight ? row_weight[i] * o.student.scale / o.student.temperature : 0.f;
  if (!sums_known) {
    constexpr int LEAVE = KIND == FORWARD_KL ? GRADIENT : TWO_TERMS;
    add(sums_of<KIND, false, LEAVE>(token.student, token.teacher, tile.v, factor,
                                    token.at(TARGET_WEIGHT), o),
        false, token.state, token.stride);
    return;
  }
  const auto gradient = o.clip != CLIP_ENTRY ? gradient_of<KIND, false, true, SOFTCAP>
                        : row_weight         ? gradient_of<KIND, true, true, SOFTCAP>
                                             : gradient_of<KIND, true, false, SOFTCAP>;
  const double dot = gradient(token.student, token.teacher, tile.v, factor, token.at(UNNORMALISED),
                              token.at(CLIPPED_UNNORMALISED), token.at(TARGET_WEIGHT), o);
  if (o.clip == CLIP_ENTRY) token.at(DOT) += static_cast<float>(dot);
}

// Computes everything for a whole row while both of its tiles (256 KB at V = 32768) are in the L2
// cache: products are read from memory once, and the gradient is written once.
template <int KIND, bool SOFTCAP>
void whole_row(const opsd_tile& tile, int64_t i, const float* row_weight, const opsd_options& o) {
  Token<SOFTCAP> token(tile, i, o);
  if (token.at(MAX) == -INFINITY) token.normalise(tile.v);
  if (o.clip == CLIP_ENTRY) {
    sums_row<KIND, SOFTCAP>(tile, i, o);
    gradient_row<KIND, SOFTCAP>(tile, i, row_weight, true, o);
    return;
  }
  if (!row_weight) {
    sums_row<KIND, SOFTCAP>(tile, i, o);
    return;
  }
  token.use_normalisers();
  constexpr int LEAVE = KIND == FORWARD_KL ? GRADIENT : FOR_LATER;
  float factor = row_weight[i] * o.student.scale / o.student.temperature;
  add(sums_of<KIND, false, LEAVE>(token.student, token.teacher, tile.v, factor,
                                  token.at(TARGET_WEIGHT), o),
      false, token.state, token.stride);
  const float divergence = token.at(DIVERGENCE);
  float shrink = 1.f;
  if (o.clip == CLIP_TOKEN && divergence > o.clip_threshold) shrink = o.clip_threshold / divergence;
  if (KIND != FORWARD_KL) {
    gradient_of_unnormalised(token.student, token.teacher.x, tile.v, factor * shrink,
                             token.at(UNNORMALISED) + token.at(TARGET_WEIGHT));
  } else if (shrink != 1.f) {
    for (int64_t j = 0; j < tile.v; ++j) token.student.x[j] *= shrink;
  }
}

// --- The rows of a tile, in parallel ---

template <class Row>
void for_each_row(const opsd_tile& tile, const opsd_options& o, const Row& row) {
#pragma omp parallel for num_threads(o.threads) schedule(static) if (o.threads > 1 && tile.n > 1)
  for (int64_t i = 0; i < tile.n; ++i) row(i);
}

inline bool capped(const opsd_options& o) {
  return o.student.softcap > 0.f || o.teacher.softcap > 0.f;
}

// FUNCTION<KIND, SOFTCAP> for these options.
#define OPSD_CHOOSE(FUNCTION, o) \
  (capped(o) ? OPSD_OF_KIND(FUNCTION, true, o) : OPSD_OF_KIND(FUNCTION, false, o))
#define OPSD_OF_KIND(FUNCTION, SOFTCAP, o)                                            \
  (kind_of((o).divergence, (o).beta) == FORWARD_KL   ? FUNCTION<FORWARD_KL, SOFTCAP>  \
   : kind_of((o).divergence, (o).beta) == REVERSE_KL ? FUNCTION<REVERSE_KL, SOFTCAP>  \
   : kind_of((o).divergence, (o).beta) == EVEN_JSD   ? FUNCTION<EVEN_JSD, SOFTCAP>    \
                                                     : FUNCTION<JSD, SOFTCAP>)

template <bool SOFTCAP>
void log_prob_normalisers_row(const opsd_tile& tile, int64_t i, int64_t target,
                              const opsd_options& o) {
  const Role<SOFTCAP> role(tile.student + i * tile.student_stride, tile.bias, o.student);
  normalise(role, tile.v, tile.state + i, tile.state_stride);
  if (target < 0 || target >= tile.v) return;
  // The vector that starts at the target: its first lane is the target's logit.
  const int64_t count = tile.v - target;
  const Vector z = count < LANES ? role.logit(target, Partial{count}) : role.logit(target, Whole());
  tile.state[TARGET * tile.state_stride + i] += z[0];
}

template <bool SOFTCAP>
void log_prob_gradient_row(const opsd_tile& tile, int64_t i, int64_t target, float weight,
                           const opsd_options& o) {
  Role<SOFTCAP> role(tile.student + i * tile.student_stride, tile.bias, o.student);
  role.normalise_by(tile.state + i, tile.state_stride);
  const float factor = weight * o.student.scale / o.student.temperature;
  const bool here = target >= 0 && target < tile.v;
  float one = 0.f;  // the target's part of the derivative
  if (here) {
    const int64_t count = tile.v - target;
    const Vector z =
        count < LANES ? role.logit(target, Partial{count}) : role.logit(target, Whole());
    one = role.through_softcap(L::all(factor), z)[0];
  }
  each(0, tile.v, [&](int64_t j, auto part) INLINE {
    const Vector z = role.logit(j, part);
    part.put(role.x + j, role.through_softcap(-factor * exp_(role.log_p(z)), z));
  });
  if (here) role.x[target] += one;
}

}  // namespace

void normalisers(const opsd_tile* tile, const opsd_options* o) {
  const auto row = capped(*o) ? normalisers_row<true> : normalisers_row<false>;
  for_each_row(*tile, *o, [&](int64_t i) { row(*tile, i, *o); });
}

void sums(const opsd_tile* tile, const opsd_options* o) {
  const auto row = OPSD_CHOOSE(sums_row, *o);
  for_each_row(*tile, *o, [&](int64_t i) { row(*tile, i, *o); });
}

void gradient(const opsd_tile* tile, const float* row_weight, int32_t sums_known,
              const opsd_options* o) {
  const auto row = OPSD_CHOOSE(gradient_row, *o);
  for_each_row(*tile, *o, [&](int64_t i) { row(*tile, i, row_weight, sums_known, *o); });
}

void rows(const opsd_tile* tile, const float* row_weight, const opsd_options* o) {
  const auto row = OPSD_CHOOSE(whole_row, *o);
  for_each_row(*tile, *o, [&](int64_t i) { row(*tile, i, row_weight, *o); });
}

void log_prob_normalisers(const opsd_tile* tile, const int64_t* targets, const opsd_options* o) {
  const auto row = capped(*o) ? log_prob_normalisers_row<true>
                                    : log_prob_normalisers_row<false>;
  for_each_row(*tile, *o, [&](int64_t i) { row(*tile, i, targets[i], *o); });
}

void log_prob_gradient(const opsd_tile* tile, const int64_t* targets, const float* row_weight,
                       const opsd_options* o) {
  const auto row = capped(*o) ? log_prob_gradient_row<true> : log_prob_gradient_row<false>;
  for_each_row(*tile, *o, [&](int64_t i) { row(*tile, i, targets[i], row_weight[i], *o); });
}

}  // namespace OPSD_ISA
}  // namespace opsd
