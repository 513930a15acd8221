// The arithmetic of one vocabulary entry: one definition for every processor.
//
// S and T are the student's and the teacher's probability of an entry, log_s and log_t their
// logarithms. F is a float, or a vector of floats for which Lanes<F> is specialised. All functions
// are pure and branch-free. They are `static`, since this file is compiled for several instruction
// sets into one library. NaN stays NaN; 0 * infinity, which padded entries produce, becomes 0.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define OPSD_ENTRY static __host__ __device__ __forceinline__
#else
#define OPSD_ENTRY static inline __attribute__((always_inline))
#endif

namespace opsd {

enum Kind : int32_t { FORWARD_KL = 0, REVERSE_KL = 1, JSD = 2, EVEN_JSD = 3 };  // EVEN: beta 1/2

static inline Kind kind_of(int32_t divergence, float beta) {
  return divergence == JSD && beta == 0.5f ? EVEN_JSD : static_cast<Kind>(divergence);
}

enum ClipKind : int32_t { CLIP_NONE = 0, CLIP_ENTRY = 1, CLIP_TOKEN = 2 };

// The rows of a state, one column a token: opsd_kernels/tiles/state.py describes them.
enum State : int32_t {
  STUDENT = 0,
  TEACHER = 3,  // each role's first row; its normaliser has three:
  MAX = 0,
  REST = 1,
  MOMENT = 2,
  DIVERGENCE = 6,
  UNNORMALISED = 7,
  CLIPPED = 8,
  COUNT = 9,
  CLIPPED_UNNORMALISED = 10,
  DOT = 11,
  TARGET_WEIGHT = 12,
  TARGET = 3,  // in the state of a log-probability
};

template <class F>
struct Lanes;

template <>
struct Lanes<float> {
  typedef int32_t Int;
  OPSD_ENTRY float all(float x) { return x; }
  OPSD_ENTRY float select(bool condition, float a, float b) { return condition ? a : b; }
  OPSD_ENTRY float convert(int32_t i) { return static_cast<float>(i); }
  OPSD_ENTRY int32_t as_int(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
  }
  OPSD_ENTRY float as_float(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
  OPSD_ENTRY int32_t shift_left(int32_t i, int n) {
    return static_cast<int32_t>(static_cast<uint32_t>(i) << n);
  }
};

// (exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2: the series from its second-order term on.
template <class F>
OPSD_ENTRY F second_order(F r) {
  F p = r * 1.98412698e-4f + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  return p * r + 0.5f;
}

// exp(r) - 1 for |r| <= ln 2 / 2.
template <class F>
OPSD_ENTRY F small_expm1(F r) {
  return r + r * r * second_order(r);
}

// log((1 + s) / (1 - s)) for |s| <= 0.18.
template <class F>
OPSD_ENTRY F small_log(F s) {
  const F z = s * s;
  F p = z * (1.f / 9.f) + 1.f / 7.f;
  p = p * z + 1.f / 5.f;
  p = p * z + 1.f / 3.f;
  return 2.f * s + 2.f * s * z * p;
}

template <class F>
struct Halves {
  F quotient, log_mean;
};

#ifdef __CUDA_ARCH__

// A GPU computes exp, log and division in one or two instructions, with a relative error of 1e-7
// (1e-7 |x| for exp). The polynomials are for their difference from a constant.

template <class F>
OPSD_ENTRY F exp_(F x) {
  return __expf(x);
}

template <class F>
OPSD_ENTRY F divide(F a, F b) {
  return __fdividef(a, b);
}

// exp(x) - 1 for x <= 0, accurate near 0.
template <class F>
OPSD_ENTRY F expm1_(F x) {
  const F near = small_expm1(x), far = __expf(x) - 1.f;
  return x < -0.34f ? far : near;
}

// log(1 + y) for -1 < y <= 0, accurate near 0.
template <class F>
OPSD_ENTRY F log1p_(F y) {
  const F near = small_log(__fdividef(y, 2.f + y)), far = __logf(1.f + y);
  return y < -0.29f ? far : near;
}

// {e / (1 + e), log((1 + e) / 2)} for 0 <= e <= 1, the logarithm with an error of 1e-7.
template <class F>
OPSD_ENTRY Halves<F> halves(F e) {
  const F sum = 1.f + e;
  return {__fdividef(e, sum), __logf(sum) - 0.693147181f};
}

#else

// x = n ln 2 + r with |r| <= ln 2 / 2: exp(x) = 2^n (1 + tail), tail = exp(r) - 1.
// For x in [-88, 88].
template <class F>
struct Exponential {
  typename Lanes<F>::Int shift;  // n, in the exponent's bits
  F tail;
};

template <class F>
OPSD_ENTRY Exponential<F> exponential(F x) {
  typedef Lanes<F> L;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const float magic = 12582912.f;
  const F shifted = x * 1.44269504f + magic;
  const F n = shifted - magic;
  F r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  return {L::shift_left(L::as_int(shifted), 23), small_expm1(r)};
}

// exp(x) for x <= 88, with a relative error of 1e-7; 0 below -87.3, where fp32 has only subnormals.
template <class F>
OPSD_ENTRY F exp_(F x) {
  typedef Lanes<F> L;
  const Exponential<F> e = exponential(L::select(x < -87.3f, L::all(-87.3f), x));
  // Multiply: adding to the exponent's bits could turn NaN into a number.
  const F power = L::as_float(e.shift + 0x3f800000);
  return L::select(x < -87.3f, L::all(0.f), power * e.tail + power);
}

template <class F>
OPSD_ENTRY F divide(F a, F b) {
  return a / b;
}

// exp(x) - 1 for x <= 0, accurate near 0.
template <class F>
OPSD_ENTRY F expm1_(F x) {
  typedef Lanes<F> L;
  const Exponential<F> e = exponential(L::select(x < -80.f, L::all(-80.f), x));
  const F power = L::as_float(e.shift + 0x3f800000);
  return power * e.tail + (power - 1.f);
}

// log(1 + y) for -1 < y <= 0, accurate near 0.
template <class F>
OPSD_ENTRY F log1p_(F y) {
  typedef Lanes<F> L;
  typedef typename L::Int Int;
  const F u = 1.f + y;
  const Int k = (L::as_int(u) - 0x3f3504f3) >> 23;  // u = m 2^k, m in [sqrt(1/2), sqrt(2))
  const F m = L::as_float(L::as_int(u) - L::shift_left(k, 23));
  const F f = L::select(k == 0, y, m - 1.f);
  const F log = L::convert(k) * 0.693147181f + small_log(f / (2.f + f));
  return L::select(y == y, log, y);  // the bits of a NaN could give any number
}

// log x = 2 artanh(s) with s = (x - 1) / (x + 1), here (e - 1) / (e + 3); both share a division.
template <class F>
OPSD_ENTRY Halves<F> halves(F e) {
  const F sum = 1.f + e, inverse = 1.f / (sum * (3.f + e));
  const F s = (e - 1.f) * (sum * inverse), z = s * s;
  F p = z * 2.81614538e-1f + 2.79643447e-1f;
  p = p * z + 4.00246513e-1f;
  p = p * z + 6.66663204e-1f;
  return {e * ((3.f + e) * inverse), s * (p * z + 2.f)};
}

#endif

template <class F>
OPSD_ENTRY F tanh_(F x) {
  typedef Lanes<F> L;
  const F e = expm1_(-2.f * L::select(x < 0.f, -x, x));
  const F t = divide(-e, 2.f + e);
  return L::select(x < 0.f, -t, t);
}

// The smaller of both; `most` if x is NaN.
template <class F>
OPSD_ENTRY F at_most(F x, float most) {
#ifdef __CUDA_ARCH__
  return fminf(x, most);
#else
  return Lanes<F>::select(x < most, x, Lanes<F>::all(most));
#endif
}

template <class F>
OPSD_ENTRY F product(F p, F log_ratio) {
  return Lanes<F>::select(p == 0.f, Lanes<F>::all(0.f), p * log_ratio);
}

// One entry of the divergence.
//
// `plain` is its term in the sum as it is defined, which the entry clip bounds. `term` is the same
// plus a part that adds up to 0 over the vocabulary, which makes it a Bregman divergence: for
// forward_kl T (d + exp(-d) - 1) = T d + S - T with d = log T - log S. It is never negative, and an
// error of the normalisers, which is the same for all d, cancels in its sum. If S and T are close,
// the sum of `plain` would be little else than such errors.
//
// `unnormalised` p is the gradient by log S; the gradient by the logit is p - S sum p. (For
// forward_kl p is -T, whose sum is -1.)
template <class F>
struct Entry {
  F s, t, plain, term, unnormalised;
};

// The series is used for smaller d^2.
constexpr float NEAR = 0.12f;

// p (r + exp(-r) - 1) with r = log p - log q.
template <class F>
OPSD_ENTRY F bregman(F p, F q, F r, F plain) {
  const F square = r * r;
  return Lanes<F>::select(square < NEAR, p * (square * second_order(-r)), plain + (q - p));
}

// (d/2) tanh(d/2) - log cosh(d/2) for |d| <= 80, and `log_mean` = log((1 + exp(-|d|)) / 2), both
// accurate near 0. They add up to -|d| / (1 + exp(|d|)), so that one gives the other.
template <class F>
struct Even {
  F value, log_mean;
};

template <class F>
OPSD_ENTRY Even<F> even(F size) {
  typedef Lanes<F> L;
  const F square = size * size;
  F p = square * -1.66488009e-4f + 1.73059838e-3f;
  p = p * square - 1.56244509e-2f;
  const F near = square * (p * square + 1.24999991e-1f);
  const Halves<F> h = halves(exp_(-size));
  const F sum = -size * h.quotient;
  const auto is_near = square < 0.5f;
  return {L::select(is_near, near, sum - h.log_mean), L::select(is_near, sum - near, h.log_mean)};
}

// d = log T - log S is a separate argument: computed as (z_t - z_s) - (difference of
// log-normalisers) it keeps all digits of d, while log T - log S has only those of log T.
template <int KIND, class F>
OPSD_ENTRY Entry<F> entry(F log_s, F log_t, F d, float beta) {
  typedef Lanes<F> L;
  Entry<F> e;
  e.s = exp_(log_s);
  e.t = exp_(log_t);
  if (KIND == FORWARD_KL) {
    e.plain = product(e.t, d);
    e.term = bregman(e.t, e.s, d, e.plain);
    e.unnormalised = -e.t;
  } else if (KIND == REVERSE_KL) {
    e.plain = e.unnormalised = product(e.s, -d);
    e.term = bregman(e.s, e.t, -d, e.plain);
  } else if (KIND == EVEN_JSD) {
    // log M - log S = max(d, 0) + log((1 + exp(-|d|)) / 2), and the term is M f(d). Where S or T is
    // 0, d is infinite or NaN.
    const F size = at_most(L::select(d < 0.f, -d, d), 80.f);
    const Even<F> f = even(size);
    e.unnormalised = -0.5f * e.s * (L::select(d > 0.f, size, L::all(0.f)) + f.log_mean);
    e.plain = e.term = 0.5f * (e.s + e.t) * f.value;
  } else {
    // log S - log M = -log(1 + b (e^d - 1)), exactly 0 where S = T. For d > 0 the roles swap, so
    // that the exponential never overflows.
    const F share = L::select(d > 0.f, L::all(1.f - beta), L::all(beta));
    const F larger = -log1p_(share * expm1_(L::select(d > 0.f, -d, d)));
    const F ratio_s = L::select(d > 0.f, larger - d, larger);
    const F ratio_t = L::select(d > 0.f, larger, larger + d);
    e.unnormalised = (1.f - beta) * product(e.s, ratio_s);
    e.plain = beta * product(e.t, ratio_t) + e.unnormalised;
    // The parts b (M - T) + (1-b) (M - S) add up to 0 in each entry.
    const F near = beta * (e.t * (ratio_t * ratio_t * second_order(-ratio_t))) +
                   (1.f - beta) * (e.s * (ratio_s * ratio_s * second_order(-ratio_s)));
    e.term = L::select(d * d < NEAR, near, e.plain);
  }
  return e;
}

// An entry's term after the entry clip; their sum is that of min(plain, threshold).
template <int KIND, class F>
OPSD_ENTRY F clipped_term(const Entry<F>& e, float threshold) {
  typedef Lanes<F> L;
  const F zero_sum = KIND == FORWARD_KL   ? e.s - e.t
                     : KIND == REVERSE_KL ? e.t - e.s
                                          : L::all(0.f);
  return L::select(e.plain > threshold, threshold + zero_sum, e.term);
}

// An entry's unnormalised gradient after the entry clip: 0 for a clipped entry. The gradient then
// uses the sum of these.
template <int KIND, class F>
OPSD_ENTRY F clipped_unnormalised(const Entry<F>& e, float threshold) {
  // d(s log s/t) = log s/t + 1: the constant cancels only in the unclipped sum.
  const F unnormalised = KIND == REVERSE_KL ? e.unnormalised + e.s : e.unnormalised;
  return Lanes<F>::select(e.plain > threshold, Lanes<F>::all(0.f), unnormalised);
}

}  // namespace opsd
