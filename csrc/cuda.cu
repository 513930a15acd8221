// The tile functions on a GPU, with a plain C interface for opsd_kernels/tiles/cuda.py;
// opsd_kernels/tiles/torch.py says what each function does.
//
// A thread block computes one chunk of a row (csrc/cuda_chunk.h) and stores its sums in partials; a
// second kernel adds them to the row's state; or a cluster of blocks computes a row at once
// (csrc/cuda_rows.h). There are no atomics, and rows are divided by their length alone: each way's
// results are bit for bit the same on any device.
//
// The tiles' pointers and strides are those of csrc/cpu.h, in device memory. `partials` has room
// for opsd_cuda_partials(n, v) floats. Work is only queued, on `stream`; calls do not allocate or
// wait, so that they can be captured in a CUDA graph. Returns 0 or a CUDA error.
#include "cuda_rows.h"

#define OPSD_EXPORT extern "C" __attribute__((visibility("default")))

namespace opsd {
namespace {

// Grid: (rows * chunks, roles). partials: each role's normaliser.
template <bool SOFTCAP>
__global__ void __launch_bounds__(THREADS) normalisers(opsd_tile tile, Numbers o) {
  const bool teacher = blockIdx.y == 1;
  const Transform t = teacher ? o.teacher : o.student;
  const Place place(tile.v, o);
  const float* row = teacher ? tile.teacher + place.row * tile.teacher_stride
                             : tile.student + place.row * tile.student_stride;
  float z[ITEMS], own = -INFINITY;
  load_unscaled<SOFTCAP>(z, row, teacher ? tile.teacher_bias : tile.bias, place, t);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) own = larger(own, __fmul_rn(z[i], t.scale));
  __shared__ float warps[WARPS];
  float most = warp_max(own);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; ++w) most = larger(most, warps[w]);
  float sums[3] = {};
  if (own == most) {
    add_exponentials<true>(sums, z, t.scale, most);
  } else {
    add_exponentials<false>(sums, z, t.scale, most);
  }
  float* partial = o.partials + PARTIAL_NORMALISER * blockIdx.y * o.partial_stride + blockIdx.x;
  if (threadIdx.x == 0) partial[MAX] = most;
  store_sums(sums, partial + REST * o.partial_stride, o.partial_stride);
}

// Merges a row's partial normalisers into the state. Grid: (rows, roles), a warp each.
__global__ void merge(float* state, int64_t state_stride, Numbers o) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * o.chunks;
  const float* partials = o.partials + PARTIAL_NORMALISER * blockIdx.y * o.partial_stride + first;
  state += 3 * blockIdx.y * state_stride + blockIdx.x;
  float most = -INFINITY;
  for (uint32_t c = threadIdx.x; c < o.chunks; c += 32) most = larger(most, partials[c]);
  const float old = state[0];
  most = larger(warp_max(most), old);
  float total = 0.f, total_moment = 0.f, total_largest = 0.f;
  const auto add = [&](float from, float rest, float moment, float largest) {
    refer(from, most, rest, moment, largest);
    total += rest;
    total_moment += moment;
    total_largest += largest;
  };
  for (uint32_t c = threadIdx.x; c < o.chunks; c += 32) {
    const float* partial = partials + c;
    add(partial[MAX], partial[REST * o.partial_stride], partial[MOMENT * o.partial_stride],
        partial[LARGEST * o.partial_stride]);
  }
  if (threadIdx.x == 0) {
    const float rest = state[REST * state_stride], seen = rest == -1.f ? 0.f : 1.f;
    add(old, seen * rest, state[MOMENT * state_stride], seen);
  }
  total = warp_sum(total);
  total_moment = warp_sum(total_moment);
  total_largest = warp_sum(total_largest);
  if (threadIdx.x == 0) {
    state[MAX] = most;
    state[REST * state_stride] = (total_largest - 1.f) + total;
    state[MOMENT * state_stride] = total_moment;
  }
}

// Adds a row's partial sums to the state's. Grid: (rows, sums), a warp each.
__global__ void add(float* state, int64_t state_stride, Numbers o) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * o.chunks;
  const float* partials = o.partials + blockIdx.y * o.partial_stride + first;
  float total = 0.f;
  for (uint32_t c = threadIdx.x; c < o.chunks; c += 32) total += partials[c];
  total = warp_sum(total);
  if (threadIdx.x == 0) state[blockIdx.y * state_stride + blockIdx.x] += total;
}

// Both roles' entries of a thread.
template <bool SOFTCAP>
struct Roles {
  float student[ITEMS], teacher[ITEMS];
  Normalisers by;

  __device__ __forceinline__ Roles(const opsd_tile& tile, const Place& place, const Numbers& o)
      : by(Normaliser(tile.state + STUDENT * tile.state_stride + place.row, tile.state_stride,
                      o.student),
           Normaliser(tile.state + TEACHER * tile.state_stride + place.row, tile.state_stride,
                      o.teacher)) {
    load_unscaled<SOFTCAP>(student, tile.student + place.row * tile.student_stride, tile.bias,
                           place, o.student);
    load_unscaled<SOFTCAP>(teacher, tile.teacher + place.row * tile.teacher_stride,
                           tile.teacher_bias, place, o.teacher);
  }

  template <int KIND>
  __device__ __forceinline__ Entry<float> at(int i, float beta) const {
    return by.template entry<KIND>(student[i], teacher[i], beta);
  }
};

// partials: DIVERGENCE, UNNORMALISED, and with the entry clip CLIPPED, COUNT, CLIPPED_UNNORMALISED.
template <int KIND, bool CLIP, bool SOFTCAP>
__global__ void __launch_bounds__(THREADS) sums(opsd_tile tile, Numbers o) {
  const Place place(tile.v, o);
  const Roles<SOFTCAP> roles(tile, place, o);
  float total[CLIP ? 5 : 2] = {};
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    add_entry<KIND, CLIP>(total, roles.template at<KIND>(i, o.beta), o.threshold);
  }
  store_sums(total, o.partials + blockIdx.x, o.partial_stride);
}

// Which sums `gradient` knows.
enum Known {
  UNCLIPPED,  // their values; no entry clip
  CLIPPED_TOO,  // with the entry clip; partials: DOT
  NOTHING,  // no entry clip; partials: DIVERGENCE, UNNORMALISED
};

// `out` may be the student's products: a thread reads its entries before it writes them.
template <int KIND, Known KNOWN, bool SOFTCAP>
__global__ void __launch_bounds__(THREADS)
    gradient(opsd_tile tile, Out out, const float* row_weight, Numbers o) {
  const Place place(tile.v, o);
  const Roles<SOFTCAP> roles(tile, place, o);
  const int64_t stride = tile.state_stride;
  const float* state = tile.state + place.row;
  const float sum = KNOWN == NOTHING ? 0.f : state[UNNORMALISED * stride];
  const float sum_clipped = KNOWN == CLIPPED_TOO ? state[CLIPPED_UNNORMALISED * stride] : 0.f;
  const float weight = row_weight ? row_weight[place.row] * o.factor : 0.f;
  const float target_weight = state[TARGET_WEIGHT * stride];
  // first: the gradient; or the unnormalised one, and then `second` is S.
  float total[KNOWN == NOTHING ? 2 : 1] = {}, first[ITEMS], second[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const Entry<float> e = roles.template at<KIND>(i, o.beta);
    const float by_product = weight * slope<SOFTCAP>(roles.student[i], o.student);
    float g = e.unnormalised;
    if (KIND == FORWARD_KL) {
      g += e.s;
    } else if (KNOWN != NOTHING) {
      g -= e.s * sum;
    } else {
      second[i] = by_product * e.s;
    }
    if (KNOWN == CLIPPED_TOO) {
      const float clipped = clipped_unnormalised<KIND>(e, o.threshold) - e.s * sum_clipped;
      total[0] += clipped * g;
      g = clipped;
    }
    if (KNOWN == NOTHING) {
      total[0] += e.term;
      total[KNOWN == NOTHING ? 1 : 0] += e.unnormalised;
    }
    if (KNOWN != NOTHING || KIND == FORWARD_KL) g -= e.s * target_weight;
    first[i] = by_product * g;
  }
  if (row_weight) store(out, first, place);
  if (KNOWN == NOTHING && KIND != FORWARD_KL) {
    store(tile.teacher + place.row * tile.teacher_stride, second, place);
  }
  if (KNOWN != UNCLIPPED) store_sums(total, o.partials + blockIdx.x, o.partial_stride);
}

// Adds to TARGET the logit of each target that is in this tile. One thread for each row.
template <bool SOFTCAP>
__global__ void target(opsd_tile tile, const int64_t* targets, Numbers o) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= tile.n || targets[row] < 0 || targets[row] >= tile.v) return;
  float x = tile.student[row * tile.student_stride + targets[row]];
  if (tile.bias) x += tile.bias[targets[row]];
  tile.state[TARGET * tile.state_stride + row] +=
      __fmul_rn(unscaled<SOFTCAP>(x, o.student), o.student.scale);
}

template <bool SOFTCAP>
__global__ void __launch_bounds__(THREADS)
    log_prob_gradient(opsd_tile tile, Out out, const int64_t* targets, const float* row_weight,
                      Numbers o) {
  const Place place(tile.v, o);
  const Normaliser normaliser(tile.state + place.row, tile.state_stride, o.student);
  const float weight = row_weight[place.row] * o.factor;
  const int64_t chosen = targets[place.row] - place.first;
  float z[ITEMS];
  load_unscaled<SOFTCAP>(z, tile.student + place.row * tile.student_stride, tile.bias, place,
                         o.student);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const float g = (Place::at(i) == chosen ? 1.f : 0.f) - exp_(normaliser.log_p(z[i]));
    z[i] = weight * slope<SOFTCAP>(z[i], o.student) * g;
  }
  store(out, z, place);
}

// --- The launches ---

struct Launch {
  const opsd_tile& tile;
  const opsd_options& options;
  Numbers o;
  cudaStream_t stream;

  Launch(const opsd_tile* t, const opsd_options* chosen, float* partials, void* queue)
      : tile(*t),
        options(*chosen),
        o(numbers(*t, *chosen, partials)),
        stream(static_cast<cudaStream_t>(queue)) {}

  bool capped() const { return options.student.softcap > 0.f || options.teacher.softcap > 0.f; }

  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), int64_t blocks, unsigned by, unsigned threads,
           const Arguments&... arguments) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks), by);
    config.blockDim = dim3(threads);
    config.stream = stream;
    cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }

  // Launches one thread block for each chunk.
  template <class... Parameters, class... Arguments>
  void chunkwise(void (*kernel)(Parameters...), unsigned roles,
                 const Arguments&... arguments) const {
    run(kernel, tile.n * o.chunks, roles, THREADS, arguments..., o);
  }

  void normalise(unsigned roles) const {
    chunkwise(capped() ? normalisers<true> : normalisers<false>, roles, tile);
    run(merge, tile.n, roles, 32, tile.state, tile.state_stride, o);
  }

  void add_partials(State first, unsigned count) const {
    run(add, tile.n, count, 32, tile.state + first * tile.state_stride, tile.state_stride, o);
  }
};

typedef void sums_t(opsd_tile, Numbers);
typedef void rows_t(opsd_tile, Out, const float*, float, int, Numbers);
typedef void gradient_t(opsd_tile, Out, const float*, Numbers);

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

template <int KIND>
rows_t* choose_rows(bool clip, bool capped) {
  if (clip) return capped ? rows<KIND, true, true> : rows<KIND, true, false>;
  return capped ? rows<KIND, false, true> : rows<KIND, false, false>;
}

// A launch of `rows`, a cluster for each of n rows.
struct RowLaunch {
  cudaLaunchAttribute cluster = {};
  cudaLaunchConfig_t config = {};

  RowLaunch(rows_t* kernel, int64_t n, const Parts& parts, cudaStream_t stream) {
    const int bytes = static_cast<int>(parts.bytes);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, parts.blocks > 8);
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(parts.blocks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(n * parts.blocks));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
};

}  // namespace
}  // namespace opsd

using namespace opsd;

// Changes with every signature below; opsd_kernels/tiles/cuda.py has the same.
#define OPSD_CUDA_INTERFACE 5

// FUNCTION<KIND> for the options.
#define OPSD_OF_KIND(FUNCTION, kind)                  \
  ((kind) == FORWARD_KL   ? FUNCTION<FORWARD_KL>      \
   : (kind) == REVERSE_KL ? FUNCTION<REVERSE_KL>      \
   : (kind) == EVEN_JSD   ? FUNCTION<EVEN_JSD>        \
                          : FUNCTION<JSD>)

// Every call sets the tensors' device, and returns if the tile is empty.
#define OPSD_BEGIN(tile, device)                               \
  if ((tile)->n == 0 || (tile)->v == 0) return 0;              \
  if (cudaError_t error = cudaSetDevice(device)) return error;

OPSD_EXPORT int64_t opsd_cuda_partials(int64_t n, int64_t v) {
  return MOST_PARTIALS * n * chunks_of(v);
}

OPSD_EXPORT const char* opsd_cuda_error(int32_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

OPSD_EXPORT int32_t opsd_cuda_interface() { return OPSD_CUDA_INTERFACE; }

// The CUDA version of the driver (0: there is none) and of the runtime in this library, as 1000 *
// major + 10 * minor. Needs no device.
OPSD_EXPORT void opsd_cuda_versions(int32_t* driver, int32_t* runtime) {
  *driver = *runtime = 0;
  cudaDriverGetVersion(driver);
  cudaRuntimeGetVersion(runtime);
}

OPSD_EXPORT int32_t opsd_cuda_normalisers(const opsd_tile* tile, const opsd_options* options,
                                          float* partials, int32_t device, void* stream) {
  OPSD_BEGIN(tile, device)
  Launch(tile, options, partials, stream).normalise(2);
  return cudaGetLastError();
}

OPSD_EXPORT int32_t opsd_cuda_sums(const opsd_tile* tile, const opsd_options* options,
                                   float* partials, int32_t device, void* stream) {
  OPSD_BEGIN(tile, device)
  const Launch launch(tile, options, partials, stream);
  const bool clip = options->clip == CLIP_ENTRY;
  auto* choose = OPSD_OF_KIND(choose_sums, kind_of(options->divergence, options->beta));
  launch.chunkwise(choose(clip, launch.capped()), 1, *tile);
  launch.add_partials(DIVERGENCE, clip ? 5 : 2);
  return cudaGetLastError();
}

// out [n, v]: rows of out_stride entries of out_type (opsd::Type).
OPSD_EXPORT int32_t opsd_cuda_gradient(const opsd_tile* tile, void* out, int64_t out_stride,
                                       int32_t out_type, const float* row_weight,
                                       int32_t sums_known, const opsd_options* options,
                                       float* partials, int32_t device, void* stream) {
  OPSD_BEGIN(tile, device)
  const Launch launch(tile, options, partials, stream);
  const Known known = options->clip == CLIP_ENTRY ? CLIPPED_TOO : sums_known ? UNCLIPPED : NOTHING;
  auto* choose = OPSD_OF_KIND(choose_gradient, kind_of(options->divergence, options->beta));
  const Out written{out, out_stride, static_cast<Type>(out_type)};
  launch.chunkwise(choose(known, launch.capped()), 1, *tile, written, row_weight);
  if (known == CLIPPED_TOO) launch.add_partials(DOT, 1);
  if (known == NOTHING) launch.add_partials(DIVERGENCE, 2);
  return cudaGetLastError();
}

// Whether opsd_cuda_rows can run on rows of v entries.
OPSD_EXPORT int32_t opsd_cuda_row_fits(int64_t v, int32_t device) {
  int supported = 0, clusters = 0;
  cudaSetDevice(device);
  cudaDeviceGetAttribute(&supported, cudaDevAttrClusterLaunch, device);
  rows_t* kernel = rows<JSD, true, true>;
  const RowLaunch launch(kernel, 1, Parts(v), nullptr);
  if (supported) cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config);
  cudaGetLastError();  // that a row does not fit is no error
  return supported && clusters > 0;
}

OPSD_EXPORT int32_t opsd_cuda_rows(const opsd_tile* tile, void* out, int64_t out_stride,
                                   int32_t out_type, const float* row_weight,
                                   const opsd_options* options, int32_t device, void* stream) {
  OPSD_BEGIN(tile, device)
  const bool clip = options->clip == CLIP_ENTRY;
  const bool capped = options->student.softcap > 0.f || options->teacher.softcap > 0.f;
  auto* choose = OPSD_OF_KIND(choose_rows, kind_of(options->divergence, options->beta));
  const Parts parts(tile->v);
  const RowLaunch launch(choose(clip, capped), tile->n, parts, static_cast<cudaStream_t>(stream));
  const float most = options->clip == CLIP_TOKEN ? options->clip_threshold : INFINITY;
  cudaLaunchKernelEx(&launch.config, choose(clip, capped), *tile,
                     Out{out, out_stride, static_cast<Type>(out_type)}, row_weight, most,
                     static_cast<int>(parts.entries), numbers(*tile, *options, nullptr));
  return cudaGetLastError();
}

OPSD_EXPORT int32_t opsd_cuda_log_prob_normalisers(const opsd_tile* tile, const int64_t* targets,
                                                   const opsd_options* options, float* partials,
                                                   int32_t device, void* stream) {
  OPSD_BEGIN(tile, device)
  const Launch launch(tile, options, partials, stream);
  launch.normalise(1);
  launch.run(launch.capped() ? target<true> : target<false>, (tile->n + 127) / 128, 1, 128, *tile,
             targets, launch.o);
  return cudaGetLastError();
}

OPSD_EXPORT int32_t opsd_cuda_log_prob_gradient(const opsd_tile* tile, void* out,
                                                int64_t out_stride, int32_t out_type,
                                                const int64_t* targets, const float* row_weight,
                                                const opsd_options* options, float* partials,
                                                int32_t device, void* stream) {
  OPSD_BEGIN(tile, device)
  const Launch launch(tile, options, partials, stream);
  const Out written{out, out_stride, static_cast<Type>(out_type)};
  launch.chunkwise(launch.capped() ? log_prob_gradient<true> : log_prob_gradient<false>, 1, *tile,
                   written, targets, row_weight);
  return cudaGetLastError();
}
