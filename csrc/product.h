// Products of some rows with a large weight, for decoding. Called through ctypes by
// opsd_kernels/packed.py, which says what they compute.
#pragma once

#include <stdint.h>

// Changes with what follows; opsd_kernels/packed.py has the same.
#define OPSD_PRODUCT_INTERFACE 2
#define OPSD_PANEL 48  // outputs whose weights are packed together

extern "C" {

struct opsd_product {
  const float* input;         // [rows, inputs]
  const void *weight, *bias;  // [outputs, inputs], [outputs] or null
  void* out;                  // [rows, outputs], or the packed weight
  int64_t rows, outputs, inputs;
  int32_t bf16;  // the type of weight, bias and out: 1, or 0 for fp32; for 1 `inputs` is even
  int32_t threads;
};

typedef void opsd_product_t(const opsd_product*);

}  // extern "C"
