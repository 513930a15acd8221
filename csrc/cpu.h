// The C interface of the CPU kernels: pointers, sizes, strides (in elements). Called through ctypes
// by opsd_kernels/tiles/cpp.py.
#pragma once

#include <stdint.h>

extern "C" {

struct opsd_options {
  int32_t divergence;  // opsd::Kind
  int32_t clip;        // opsd::ClipKind
  float beta, clip_threshold;
  float temperature, scale, softcap;  // softcap 0: none
  int32_t threads;
};

// For n tokens: the products h W^T of both roles, [n, v] at `student` and `teacher` (overwritten),
// become stats[k * stats_stride + i], k = 0..4: loss (after the clip), divergence, entropies of
// student and teacher, clipped count opposed[i]: 1 where the entry clip turns the gradient away
// from the unclipped one and, where row_weight is given, `student` row_weight[i] times the gradient
// of token i's loss by h W^T + bias. The biases [v] and row_weight [n] may be null.
typedef void opsd_divergence_rows_t(float* student, float* teacher, const float* bias,
                                    const float* teacher_bias, const float* row_weight,
                                    float* stats, float* opposed, int64_t n, int64_t v,
                                    int64_t student_stride, int64_t teacher_stride,
                                    int64_t stats_stride, const opsd_options* options);

// The same for the log-probability of `targets` [n]; stats: log-probability, entropy.
typedef void opsd_log_prob_rows_t(float* logits, const float* bias, const int64_t* targets,
                                  const float* row_weight, float* stats, int64_t n, int64_t v,
                                  int64_t stride, int64_t stats_stride,
                                  const opsd_options* options);

}  // extern "C"

// One copy for each instruction set that cpu.cpp is compiled for.
#define OPSD_DECLARE(ISA)                        \
  namespace opsd {                               \
  namespace ISA {                                \
  extern opsd_divergence_rows_t divergence_rows; \
  extern opsd_log_prob_rows_t log_prob_rows;     \
  }                                              \
  }
