// Products with packed weights in bf16, for decoding. Called through ctypes by
// opsd_kernels/packed.py, which says what they compute.
#pragma once

#include <stdint.h>

// Changes with what follows; opsd_kernels/packed.py has the same.
#define OPSD_PRODUCT_INTERFACE 1
#define OPSD_PANEL 48  // outputs whose weights are packed together

extern "C" {

// Tensors in bf16: input [rows, inputs], bias [outputs] or null, out [rows, outputs].
struct opsd_product {
  const void *input, *weight, *bias;  // weight: as opsd_pack writes it
  void* out;
  int64_t rows, outputs, inputs;  // inputs: an even number
  int32_t threads;
};

typedef void opsd_product_t(const opsd_product*);

}  // extern "C"

namespace opsd {
extern opsd_product_t pack;     // `input`, the weight [outputs, inputs], to `out`
extern opsd_product_t product;  // `input` weight^T + `bias`, to `out`
}  // namespace opsd
