// The C interface of the CPU kernels: pointers, sizes, strides (in elements). Called through ctypes
// by opsd_kernels/tiles/cpp.py; opsd_kernels/tiles/torch.py says what each function does.
#pragma once

#include "attention.h"
#include "product.h"

// Changes with every structure and signature below; opsd_kernels/tiles/c_interface.py has the same.
#define OPSD_INTERFACE 3

extern "C" {

// Transforms a product h W^T + bias to the logit; softcap 0: none.
struct opsd_transform {
  float temperature, scale, softcap;
};

struct opsd_options {
  int32_t divergence;  // opsd::Kind
  int32_t clip;        // opsd::ClipKind
  float beta, clip_threshold;
  opsd_transform student, teacher;
  int32_t threads;
};

// The products h W^T of both roles for n tokens and v vocabulary entries, and the tokens' state.
// The biases [v] may be null.
struct opsd_tile {
  float *student, *teacher;
  const float *bias, *teacher_bias;
  float* state;  // row k of token i: state[k * state_stride + i], k from opsd::State
  int64_t n, v, student_stride, teacher_stride, state_stride;
};

typedef void opsd_normalisers_t(const opsd_tile*, const opsd_options*);
typedef void opsd_sums_t(const opsd_tile*, const opsd_options*);
// row_weight [n] may be null in both.
typedef void opsd_gradient_t(const opsd_tile*, const float* row_weight, int32_t sums_known,
                             const opsd_options*);
typedef void opsd_rows_t(const opsd_tile*, const float* row_weight, const opsd_options*);

// Log-probabilities use only `student` and `bias` of the tile.
typedef void opsd_log_prob_normalisers_t(const opsd_tile*, const int64_t* targets,
                                         const opsd_options*);
typedef void opsd_log_prob_gradient_t(const opsd_tile*, const int64_t* targets,
                                      const float* row_weight, const opsd_options*);

}  // extern "C"

// A copy for each instruction set for which cpu.cpp and attention.cpp are compiled.
#define OPSD_DECLARE(ISA)                                        \
  namespace opsd {                                               \
  namespace ISA {                                                \
  extern opsd_normalisers_t normalisers;                         \
  extern opsd_sums_t sums;                                       \
  extern opsd_gradient_t gradient;                               \
  extern opsd_rows_t rows;                                       \
  extern opsd_log_prob_normalisers_t log_prob_normalisers;       \
  extern opsd_log_prob_gradient_t log_prob_gradient;             \
  extern opsd_attention_t attention;                             \
  extern opsd_product_t pack_weight, packed_product;              \
  }                                                              \
  }
