// Chooses the fastest copy of the kernels for this processor, once.
#include <pthread.h>
#include <string.h>

#include "cpu.h"

OPSD_DECLARE(baseline)
#ifdef OPSD_HAVE_AVX2
OPSD_DECLARE(avx2)
OPSD_DECLARE(avx512)
#endif

namespace {

struct Variant {
  const char* name;
  opsd_normalisers_t* normalisers;
  opsd_sums_t* sums;
  opsd_gradient_t* gradient;
  opsd_rows_t* rows;
  opsd_log_prob_normalisers_t* log_prob_normalisers;
  opsd_log_prob_gradient_t* log_prob_gradient;
  opsd_attention_t* attention;
  opsd_product_t *pack_weight, *packed_product;
  bool (*runs_here)();
};

#define OPSD_FUNCTIONS(ISA)                                                     \
  #ISA, opsd::ISA::normalisers, opsd::ISA::sums, opsd::ISA::gradient,           \
      opsd::ISA::rows, opsd::ISA::log_prob_normalisers, opsd::ISA::log_prob_gradient, \
      opsd::ISA::attention, opsd::ISA::pack_weight, opsd::ISA::packed_product

const Variant variants[] = {
    // best first
#ifdef OPSD_HAVE_AVX2
    {OPSD_FUNCTIONS(avx512),
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
     }},
    {OPSD_FUNCTIONS(avx2),
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {OPSD_FUNCTIONS(baseline), [] { return true; }},
};

const Variant* best() {
  const Variant* variant = variants;
  while (!variant->runs_here()) ++variant;
  return variant;
}

const Variant* chosen = best();

// GNU OpenMP's threads do not survive a fork: a parallel region in the child would wait for them
// forever.
bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

template <class Options>
Options with_threads(const Options* options) {
  Options copy = *options;
  if (forked || copy.threads < 1) copy.threads = 1;
  return copy;
}

}  // namespace

#define OPSD_EXPORT extern "C" __attribute__((visibility("default")))

OPSD_EXPORT int32_t opsd_interface() { return OPSD_INTERFACE; }

OPSD_EXPORT const char* opsd_instruction_set() { return chosen->name; }

// For tests, which run every variant that works here. Returns 0 if `name` is not one.
OPSD_EXPORT int opsd_use_instruction_set(const char* name) {
  for (const Variant& variant : variants) {
    if (strcmp(variant.name, name) == 0 && variant.runs_here()) {
      chosen = &variant;
      return 1;
    }
  }
  return 0;
}

OPSD_EXPORT void opsd_normalisers(const opsd_tile* tile, const opsd_options* options) {
  const opsd_options copy = with_threads(options);
  chosen->normalisers(tile, &copy);
}

OPSD_EXPORT void opsd_sums(const opsd_tile* tile, const opsd_options* options) {
  const opsd_options copy = with_threads(options);
  chosen->sums(tile, &copy);
}

OPSD_EXPORT void opsd_gradient(const opsd_tile* tile, const float* row_weight, int32_t sums_known,
                               const opsd_options* options) {
  const opsd_options copy = with_threads(options);
  chosen->gradient(tile, row_weight, sums_known, &copy);
}

OPSD_EXPORT void opsd_rows(const opsd_tile* tile, const float* row_weight,
                           const opsd_options* options) {
  const opsd_options copy = with_threads(options);
  chosen->rows(tile, row_weight, &copy);
}

OPSD_EXPORT void opsd_log_prob_normalisers(const opsd_tile* tile, const int64_t* targets,
                                           const opsd_options* options) {
  const opsd_options copy = with_threads(options);
  chosen->log_prob_normalisers(tile, targets, &copy);
}

OPSD_EXPORT void opsd_log_prob_gradient(const opsd_tile* tile, const int64_t* targets,
                                        const float* row_weight, const opsd_options* options) {
  const opsd_options copy = with_threads(options);
  chosen->log_prob_gradient(tile, targets, row_weight, &copy);
}

OPSD_EXPORT int32_t opsd_attention_interface() { return OPSD_ATTENTION_INTERFACE; }

OPSD_EXPORT void opsd_attention_rows(const opsd_attention* given) {
  const opsd_attention copy = with_threads(given);
  chosen->attention(&copy);
}

OPSD_EXPORT int32_t opsd_product_interface() { return OPSD_PRODUCT_INTERFACE; }

OPSD_EXPORT void opsd_pack(const struct opsd_product* given) {
  const struct opsd_product copy = with_threads(given);
  chosen->pack_weight(&copy);
}

OPSD_EXPORT void opsd_product(const struct opsd_product* given) {
  const struct opsd_product copy = with_threads(given);
  chosen->packed_product(&copy);
}
