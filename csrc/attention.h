// Attention of the newest tokens, for decoding. Called through ctypes by opsd_kernels/attention.py,
// which says what it computes.
#pragma once

#include <stdint.h>

// Changes with the structure below; opsd_kernels/attention.py has the same.
#define OPSD_ATTENTION_INTERFACE 1

extern "C" {

// Each sequence has groups of rows that read the same keys and values. The strides, in elements,
// are those of sequences, groups and tokens; a token's entries are contiguous.
struct opsd_attention {
  const void *query, *keys, *values;  // query: [sequences, groups, rows, width], contiguous
  const uint8_t* allowed;             // [sequences, tokens]: 0 at padding; null: there is none
  void* out;                          // [sequences, groups, rows, value_width], contiguous
  int64_t sequences, groups, rows, tokens;
  int64_t width, value_width;  // multiples of 16, at most 512
  int64_t key_strides[3], value_strides[3], allowed_stride;
  float scale;
  int32_t bf16;  // the tensors' type: 1, or 0 for fp32
  int32_t threads;
};

typedef void opsd_attention_t(const opsd_attention*);

}  // extern "C"
