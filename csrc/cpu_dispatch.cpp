// Chooses, once, the copy of the kernels that this processor runs best.
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
  opsd_divergence_rows_t* divergence_rows;
  opsd_log_prob_rows_t* log_prob_rows;
  bool (*runs_here)();
};

const Variant variants[] = {
    // best first
#ifdef OPSD_HAVE_AVX2
    {"avx512", opsd::avx512::divergence_rows, opsd::avx512::log_prob_rows,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", opsd::avx2::divergence_rows, opsd::avx2::log_prob_rows,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", opsd::baseline::divergence_rows, opsd::baseline::log_prob_rows,
     [] { return true; }},
};

const Variant* best() {
  const Variant* variant = variants;
  while (!variant->runs_here()) ++variant;
  return variant;
}

const Variant* chosen = best();

// GNU OpenMP's threads do not survive a fork, and a parallel region in the child would wait for
// them for ever.
bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

opsd_options with_threads(const opsd_options* options) {
  opsd_options copy = *options;
  if (forked || copy.threads < 1) copy.threads = 1;
  return copy;
}

}  // namespace

#define OPSD_EXPORT extern "C" __attribute__((visibility("default")))

OPSD_EXPORT const char* opsd_instruction_set() { return chosen->name; }

// Tests run every variant that works here. Returns 0 if `name` is none.
OPSD_EXPORT int opsd_use_instruction_set(const char* name) {
  for (const Variant& variant : variants) {
    if (strcmp(variant.name, name) == 0 && variant.runs_here()) {
      chosen = &variant;
      return 1;
    }
  }
  return 0;
}

OPSD_EXPORT void opsd_divergence_rows(float* student, float* teacher, const float* bias,
                                      const float* teacher_bias, const float* row_weight,
                                      float* stats, float* opposed, int64_t n, int64_t v,
                                      int64_t student_stride, int64_t teacher_stride,
                                      int64_t stats_stride, const opsd_options* options) {
  const opsd_options copy = with_threads(options);
  chosen->divergence_rows(student, teacher, bias, teacher_bias, row_weight, stats, opposed, n, v,
                          student_stride, teacher_stride, stats_stride, &copy);
}

OPSD_EXPORT void opsd_log_prob_rows(float* logits, const float* bias, const int64_t* targets,
                                    const float* row_weight, float* stats, int64_t n, int64_t v,
                                    int64_t stride, int64_t stats_stride,
                                    const opsd_options* options) {
  const opsd_options copy = with_threads(options);
  chosen->log_prob_rows(logits, bias, targets, row_weight, stats, n, v, stride, stats_stride,
                        &copy);
}
