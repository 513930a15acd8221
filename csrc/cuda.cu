// The tile functions on a GPU, with a plain C interface for opsd_kernels/tiles/cuda.py;
// opsd_kernels/tiles/torch.py says what each function does.
//
// A thread block works on one chunk of CHUNK consecutive entries of one row and leaves its part of
// each sum in parts[sum, row, chunk]; a second kernel adds a row's parts to the state. No atomics,
// and chunks of a fixed size: the result is the same bit for bit, on any device. Loads of 4 bytes a
// lane, 128 a warp, fill whole lines at any stride and alignment.
//
// The tiles' pointers and strides are those of csrc/cpu.h, in device memory. `parts` has room for
// opsd_cuda_parts(n, v) floats. Work is only queued, on `stream`; nothing is allocated and nothing
// waits, so that calls can be captured in a CUDA graph. Returns 0 or a CUDA error.
#include <cuda_runtime.h>

#include "cpu.h"
#include "divergence.h"

#define OPSD_EXPORT extern "C" __attribute__((visibility("default")))

namespace opsd {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, ITEMS = 16, CHUNK = THREADS * ITEMS;
constexpr int MOST_PARTS = 6;  // both roles' normalisers

inline int64_t chunks_of(int64_t v) { return (v + CHUNK - 1) / CHUNK; }

// What a kernel needs beside the tile.
struct Numbers {
  float inner, outer;  // logit = outer tanh(inner (product + bias)), or inner (product + bias)
  float inverse;       // 1 / outer: back to the soft cap's argument
  float factor;        // from the derivative by the logit to that by the product
  float beta, threshold;
  uint32_t chunks;  // of a row
  int64_t part_stride;
  float* parts;
};

Numbers numbers(const opsd_tile& tile, const opsd_options& o, float* parts) {
  const bool capped = o.softcap > 0.f;
  Numbers x;
  x.inner = capped ? o.scale / o.softcap : o.scale / o.temperature;
  x.outer = capped ? o.softcap / o.temperature : 1.f;
  x.inverse = capped ? o.temperature / o.softcap : 0.f;
  x.factor = o.scale / o.temperature;
  x.beta = o.beta;
  x.threshold = o.clip_threshold;
  x.chunks = static_cast<uint32_t>(chunks_of(tile.v));
  x.part_stride = tile.n * static_cast<int64_t>(x.chunks);
  x.parts = parts;
  return x;
}

// Rounded products, never fused with what follows: both roles' logits come from the same roundings,
// and S = T gives exactly 0.
template <bool SOFTCAP>
__device__ __forceinline__ float logit(const float* x, const float* bias, int64_t j,
                                       const Numbers& o) {
  float z = x[j];
  if (bias) z += bias[j];
  z = __fmul_rn(z, o.inner);
  return SOFTCAP ? __fmul_rn(tanh_(z), o.outer) : z;
}

template <bool SOFTCAP>
__device__ __forceinline__ float slope(float z, const Numbers& o) {
  if (!SOFTCAP) return 1.f;
  const float t = z * o.inverse;
  return 1.f - t * t;
}

struct Normaliser {
  float max, log_sum;

  __device__ Normaliser(const float* state, int64_t stride, int64_t row)
      : max(state[MAX * stride + row]), log_sum(logf(state[SUM * stride + row])) {}

  // The maximum is subtracted by itself, exactly: z may be 1e4.
  __device__ __forceinline__ float log_p(float z) const { return (z - max) - log_sum; }
};

// A thread's place: its row, its first entry of the row's chunk, and how many entries are left from
// there. Its other entries follow THREADS apart.
struct Place {
  int64_t row, first;
  int left;

  __device__ Place(int64_t v, const Numbers& o)
      : row(blockIdx.x / o.chunks),
        first(static_cast<int64_t>(blockIdx.x % o.chunks) * CHUNK + threadIdx.x),
        left(v - first < CHUNK ? static_cast<int>(v - first) : CHUNK) {}

  __device__ __forceinline__ bool has(int item) const { return item * THREADS < left; }
};

// The logits of a thread's entries, all loads before any arithmetic. Entries beyond the row's end
// are of probability 0 and add nothing to any sum.
template <bool SOFTCAP>
__device__ __forceinline__ void load_logits(float (&z)[ITEMS], const float* x, const float* bias,
                                            const Place& place, const Numbers& o) {
  x += place.first;
  if (bias) bias += place.first;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    z[i] = place.has(i) ? logit<SOFTCAP>(x, bias, i * THREADS, o) : -INFINITY;
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int k = 16; k > 0; k /= 2) x += __shfl_xor_sync(~0u, x, k);
  return x;
}

__device__ __forceinline__ float larger(float a, float b) { return b > a ? b : a; }

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int k = 16; k > 0; k /= 2) x = larger(x, __shfl_xor_sync(~0u, x, k));
  return x;
}

// Each of the block's `COUNT` sums, stored at part[k * stride].
template <int COUNT>
__device__ __forceinline__ void store_sums(const float (&sums)[COUNT], float* part,
                                           int64_t stride) {
  __shared__ float warps[COUNT][WARPS];
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const float total = warp_sum(sums[k]);
    if (threadIdx.x % 32 == 0) warps[k][threadIdx.x / 32] = total;
  }
  __syncthreads();
  if (threadIdx.x < COUNT) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += warps[threadIdx.x][w];
    part[threadIdx.x * stride] = total;
  }
}

// Grid: (rows * chunks, roles). parts: MAX, SUM, MOMENT of each role.
template <bool SOFTCAP>
__global__ void __launch_bounds__(THREADS) normalisers(opsd_tile tile, Numbers o) {
  const bool teacher = blockIdx.y == 1;
  const Place place(tile.v, o);
  const float* x = teacher ? tile.teacher + place.row * tile.teacher_stride
                           : tile.student + place.row * tile.student_stride;
  const float* bias = teacher ? tile.teacher_bias : tile.bias;
  float z[ITEMS], most = -INFINITY;
  load_logits<SOFTCAP>(z, x, bias, place, o);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) most = larger(most, z[i]);
  __shared__ float warps[WARPS];
  most = warp_max(most);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; ++w) most = larger(most, warps[w]);
  // Nothing but -inf: any finite offset will do, exp(-inf) = 0.
  const float offset = most == -INFINITY ? 0.f : most;
  float sums[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const float below = z[i] - offset, p = exp_(below);
    sums[0] += p;
    sums[1] -= product(p, below);
  }
  float* part = o.parts + 3 * blockIdx.y * o.part_stride + blockIdx.x;
  if (threadIdx.x == 0) part[MAX] = most;
  store_sums(sums, part + SUM * o.part_stride, o.part_stride);
}

// Sums that refer to the maximum `from`, referred to the larger maximum `to`. Nothing seen, or
// nothing but -inf: both are 0, and the difference of the maxima is no number.
__device__ __forceinline__ void refer(float from, float to, float& sum, float& moment) {
  if (sum == 0.f) {
    moment = 0.f;
    return;
  }
  const float shift = to - from, factor = expf(-shift);
  moment = (moment + sum * shift) * factor;
  sum *= factor;
}

// A row's parts of a normaliser into the state. Grid: (rows, roles), a warp each.
__global__ void merge(float* state, int64_t state_stride, Numbers o) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * o.chunks;
  const float* parts = o.parts + 3 * blockIdx.y * o.part_stride + first;
  state += 3 * blockIdx.y * state_stride + blockIdx.x;
  float most = -INFINITY;
  for (uint32_t c = threadIdx.x; c < o.chunks; c += 32) most = larger(most, parts[c]);
  const float old = state[0];
  most = larger(warp_max(most), old);
  float total = 0.f, total_moment = 0.f;
  for (uint32_t c = threadIdx.x; c < o.chunks; c += 32) {
    float sum = parts[SUM * o.part_stride + c], moment = parts[MOMENT * o.part_stride + c];
    refer(parts[c], most, sum, moment);
    total += sum;
    total_moment += moment;
  }
  total = warp_sum(total);
  total_moment = warp_sum(total_moment);
  if (threadIdx.x == 0) {
    float sum = state[SUM * state_stride], moment = state[MOMENT * state_stride];
    refer(old, most, sum, moment);
    state[MAX] = most;
    state[SUM * state_stride] = sum + total;
    state[MOMENT * state_stride] = moment + total_moment;
  }
}

// A row's parts of plain sums onto the state's. Grid: (rows, sums), a warp each.
__global__ void add(float* state, int64_t state_stride, Numbers o) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * o.chunks;
  const float* parts = o.parts + blockIdx.y * o.part_stride + first;
  float total = 0.f;
  for (uint32_t c = threadIdx.x; c < o.chunks; c += 32) total += parts[c];
  total = warp_sum(total);
  if (threadIdx.x == 0) state[blockIdx.y * state_stride + blockIdx.x] += total;
}

template <bool SOFTCAP>
struct Logits {
  float student[ITEMS], teacher[ITEMS];

  __device__ __forceinline__ Logits(const opsd_tile& tile, const Place& place, const Numbers& o) {
    const float* s = tile.student + place.row * tile.student_stride;
    const float* t = tile.teacher + place.row * tile.teacher_stride;
    load_logits<SOFTCAP>(student, s, tile.bias, place, o);
    load_logits<SOFTCAP>(teacher, t, tile.teacher_bias, place, o);
  }
};

// parts: DIVERGENCE, PULL, and with the entry clip CLIPPED, COUNT, CLIPPED_PULL.
template <int KIND, bool CLIP, bool SOFTCAP>
__global__ void __launch_bounds__(THREADS) sums(opsd_tile tile, Numbers o) {
  const Place place(tile.v, o);
  const Logits<SOFTCAP> z(tile, place, o);
  const Normaliser student(tile.state + STUDENT * tile.state_stride, tile.state_stride, place.row);
  const Normaliser teacher(tile.state + TEACHER * tile.state_stride, tile.state_stride, place.row);
  float total[CLIP ? 5 : 2] = {};
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const Entry<float> e =
        entry<KIND>(student.log_p(z.student[i]), teacher.log_p(z.teacher[i]), o.beta);
    total[0] += e.term;
    total[1] += e.pull;
    if (CLIP) {
      const bool over = e.term > o.threshold;
      total[CLIP ? 2 : 0] += over ? o.threshold : e.term;
      total[CLIP ? 3 : 0] += over ? 1.f : 0.f;
      total[CLIP ? 4 : 0] += clipped_pull<KIND>(e, o.threshold);
    }
  }
  store_sums(total, o.parts + blockIdx.x, o.part_stride);
}

// What `gradient` knows of the sums.
enum Known {
  UNCLIPPED,  // their values; no entry clip
  CLIPPED_TOO,  // with the entry clip; parts: DOT
  NOTHING,  // no entry clip; parts: DIVERGENCE, PULL
};

// In place: a thread reads its entries before it writes them.
template <int KIND, Known KNOWN, bool SOFTCAP>
__global__ void __launch_bounds__(THREADS)
    gradient(opsd_tile tile, const float* row_weight, Numbers o) {
  const Place place(tile.v, o);
  const Logits<SOFTCAP> z(tile, place, o);
  const int64_t stride = tile.state_stride;
  const float* state = tile.state + place.row;
  const Normaliser student(tile.state + STUDENT * stride, stride, place.row);
  const Normaliser teacher(tile.state + TEACHER * stride, stride, place.row);
  const float sum_pull = KNOWN == NOTHING ? 0.f : state[PULL * stride];
  const float sum_clipped = KNOWN == CLIPPED_TOO ? state[CLIPPED_PULL * stride] : 0.f;
  const float scale = row_weight ? row_weight[place.row] * o.factor : 0.f;
  float* to = tile.student + place.row * tile.student_stride + place.first;
  float* to_teacher = tile.teacher + place.row * tile.teacher_stride + place.first;
  float total[KNOWN == NOTHING ? 2 : 1] = {};
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const Entry<float> e =
        entry<KIND>(student.log_p(z.student[i]), teacher.log_p(z.teacher[i]), o.beta);
    const float by_product = scale * slope<SOFTCAP>(z.student[i], o);
    float g = e.pull;
    if (KIND == FORWARD_KL) {
      g += e.s;
    } else if (KNOWN != NOTHING) {
      g -= e.s * sum_pull;
    } else if (place.has(i)) {
      to_teacher[i * THREADS] = by_product * e.s;
    }
    if (KNOWN == CLIPPED_TOO) {
      const float clipped = clipped_pull<KIND>(e, o.threshold) - e.s * sum_clipped;
      total[0] += clipped * g;
      g = clipped;
    }
    if (KNOWN == NOTHING) {
      total[0] += e.term;
      total[KNOWN == NOTHING ? 1 : 0] += e.pull;
    }
    if (row_weight && place.has(i)) to[i * THREADS] = by_product * g;
  }
  if (KNOWN != UNCLIPPED) store_sums(total, o.parts + blockIdx.x, o.part_stride);
}

// Adds to TARGET the logit of each target that lies in this tile. A thread a row.
template <bool SOFTCAP>
__global__ void target(opsd_tile tile, const int64_t* targets, Numbers o) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= tile.n || targets[row] < 0 || targets[row] >= tile.v) return;
  const float* x = tile.student + row * tile.student_stride;
  tile.state[TARGET * tile.state_stride + row] +=
      logit<SOFTCAP>(x, tile.bias, targets[row], o);
}

template <bool SOFTCAP>
__global__ void __launch_bounds__(THREADS)
    log_prob_gradient(opsd_tile tile, const int64_t* targets, const float* row_weight, Numbers o) {
  const Place place(tile.v, o);
  const Normaliser normaliser(tile.state, tile.state_stride, place.row);
  const float scale = row_weight[place.row] * o.factor;
  const int64_t chosen = targets[place.row] - place.first;
  float* x = tile.student + place.row * tile.student_stride;
  float z[ITEMS];
  load_logits<SOFTCAP>(z, x, tile.bias, place, o);
  x += place.first;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const float g = (i * THREADS == chosen ? 1.f : 0.f) - exp_(normaliser.log_p(z[i]));
    if (place.has(i)) x[i * THREADS] = scale * slope<SOFTCAP>(z[i], o) * g;
  }
}

// --- The launches ---

struct Launch {
  const opsd_tile& tile;
  const opsd_options& options;
  Numbers o;
  cudaStream_t stream;

  Launch(const opsd_tile* t, const opsd_options* chosen, float* parts, void* queue)
      : tile(*t),
        options(*chosen),
        o(numbers(*t, *chosen, parts)),
        stream(static_cast<cudaStream_t>(queue)) {}

  bool capped() const { return options.softcap > 0.f; }

  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), int64_t blocks, unsigned by, unsigned threads,
           const Arguments&... arguments) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks), by);
    config.blockDim = dim3(threads);
    config.stream = stream;
    cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }

  // A thread block a chunk.
  template <class... Parameters, class... Arguments>
  void chunkwise(void (*kernel)(Parameters...), unsigned roles,
                 const Arguments&... arguments) const {
    run(kernel, tile.n * o.chunks, roles, THREADS, arguments..., o);
  }

  void normalise(unsigned roles) const {
    chunkwise(capped() ? normalisers<true> : normalisers<false>, roles, tile);
    run(merge, tile.n, roles, 32, tile.state, tile.state_stride, o);
  }

  void add_parts(State first, unsigned count) const {
    run(add, tile.n, count, 32, tile.state + first * tile.state_stride, tile.state_stride, o);
  }
};

typedef void sums_t(opsd_tile, Numbers);
typedef void gradient_t(opsd_tile, const float*, Numbers);

template <int KIND>
sums_t* choose_sums(bool clip, bool capped) {
  if (clip) return capped ? sums<KIND, true, true> : sums<KIND, true, false>;
  return capped ? sums<KIND, false, true> : sums<KIND, false, false>;
}

template <int KIND>
gradient_t* choose_gradient(Known known, bool capped) {
  switch (known) {
    case UNCLIPPED:
      return capped ? gradient<KIND, UNCLIPPED, true> : gradient<KIND, UNCLIPPED, false>;
    case CLIPPED_TOO:
      return capped ? gradient<KIND, CLIPPED_TOO, true> : gradient<KIND, CLIPPED_TOO, false>;
    default:
      return capped ? gradient<KIND, NOTHING, true> : gradient<KIND, NOTHING, false>;
  }
}

}  // namespace
}  // namespace opsd

using namespace opsd;

// Every call starts on the tensors' device, and none with nothing to do launches.
#define OPSD_BEGIN(tile, device)                               \
  if ((tile)->n == 0 || (tile)->v == 0) return 0;              \
  if (cudaError_t error = cudaSetDevice(device)) return error;

OPSD_EXPORT int64_t opsd_cuda_parts(int64_t n, int64_t v) { return MOST_PARTS * n * chunks_of(v); }

OPSD_EXPORT const char* opsd_cuda_error(int32_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

OPSD_EXPORT int32_t opsd_cuda_normalisers(const opsd_tile* tile, const opsd_options* options,
                                          float* parts, int32_t device, void* stream) {
  OPSD_BEGIN(tile, device)
  Launch(tile, options, parts, stream).normalise(2);
  return cudaGetLastError();
}

OPSD_EXPORT int32_t opsd_cuda_sums(const opsd_tile* tile, const opsd_options* options,
                                   float* parts, int32_t device, void* stream) {
  OPSD_BEGIN(tile, device)
  const Launch launch(tile, options, parts, stream);
  const bool clip = options->clip == CLIP_ENTRY;
  auto* choose = options->divergence == FORWARD_KL   ? choose_sums<FORWARD_KL>
                 : options->divergence == REVERSE_KL ? choose_sums<REVERSE_KL>
                                                     : choose_sums<JSD>;
  launch.chunkwise(choose(clip, launch.capped()), 1, *tile);
  launch.add_parts(DIVERGENCE, clip ? 5 : 2);
  return cudaGetLastError();
}

OPSD_EXPORT int32_t opsd_cuda_gradient(const opsd_tile* tile, const float* row_weight,
                                       int32_t sums_known, const opsd_options* options,
                                       float* parts, int32_t device, void* stream) {
  OPSD_BEGIN(tile, device)
  const Launch launch(tile, options, parts, stream);
  const Known known = options->clip == CLIP_ENTRY ? CLIPPED_TOO : sums_known ? UNCLIPPED : NOTHING;
  auto* choose = options->divergence == FORWARD_KL   ? choose_gradient<FORWARD_KL>
                 : options->divergence == REVERSE_KL ? choose_gradient<REVERSE_KL>
                                                     : choose_gradient<JSD>;
  launch.chunkwise(choose(known, launch.capped()), 1, *tile, row_weight);
  if (known == CLIPPED_TOO) launch.add_parts(DOT, 1);
  if (known == NOTHING) launch.add_parts(DIVERGENCE, 2);
  return cudaGetLastError();
}

OPSD_EXPORT int32_t opsd_cuda_log_prob_normalisers(const opsd_tile* tile, const int64_t* targets,
                                                   const opsd_options* options, float* parts,
                                                   int32_t device, void* stream) {
  OPSD_BEGIN(tile, device)
  const Launch launch(tile, options, parts, stream);
  launch.normalise(1);
  launch.run(launch.capped() ? target<true> : target<false>, (tile->n + 127) / 128, 1, 128, *tile,
             targets, launch.o);
  return cudaGetLastError();
}

OPSD_EXPORT int32_t opsd_cuda_log_prob_gradient(const opsd_tile* tile, const int64_t* targets,
                                                const float* row_weight,
                                                const opsd_options* options, float* parts,
                                                int32_t device, void* stream) {
  OPSD_BEGIN(tile, device)
  const Launch launch(tile, options, parts, stream);
  launch.chunkwise(launch.capped() ? log_prob_gradient<true> : log_prob_gradient<false>, 1, *tile,
                   targets, row_weight);
  return cudaGetLastError();
}
