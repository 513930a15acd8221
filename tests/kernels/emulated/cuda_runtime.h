// As much of CUDA as csrc/cuda.cu uses, on the CPU: the kernels' sources run, and are tested, where
// there is no GPU. The threads of a block, or of a cluster of blocks, are coroutines that take turns;
// a barrier passes the turn on until all have arrived. Clusters follow one another, and a block's
// `__shared__` variables are static: kernels for clusters use `shared()`. Nothing is said about speed, or about the
// rounding of what a GPU has in hardware (exp, log, division). What allocates, copies or waits is not
// here: a call that did so could not be captured in a graph, and does not compile.
#pragma once

#include <math.h>
#include <stdint.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __CUDA_ARCH__ 900  // the device's branch of csrc/divergence.h
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct float4 {
  float x, y, z, w;
};

struct uint2 {
  unsigned x, y;
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 blockIdx, blockDim, threadIdx;

namespace emulated {

constexpr size_t STACK = 64 << 10;
constexpr unsigned MOST_BLOCKS = 16, MOST_WARPS = MOST_BLOCKS * 32;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool done;
};

inline std::vector<Thread> threads;
inline unsigned current;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline Barrier cluster_barrier, block_barrier[MOST_BLOCKS], warp_barrier[MOST_WARPS];
inline float exchange[32 * MOST_WARPS];
inline unsigned blocks;  // of a cluster
inline std::vector<std::vector<char>> memory(MOST_BLOCKS);

inline void* shared_of(unsigned rank) { return memory[rank].data(); }
inline void* shared() { return shared_of(blockIdx.x % blocks); }

inline void yield() { swapcontext(&threads[current].context, &scheduler); }

inline void wait(Barrier& barrier, unsigned all) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == all) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void run_thread() {
  body();
  threads[current].done = true;
  yield();
}

// Runs the blocks from (x, y) on.
inline void run_cluster(unsigned x, unsigned y) {
  const unsigned count = blocks * blockDim.x;
  if (threads.size() < count) threads.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    makecontext(&thread.context, run_thread, 0);
  }
  for (unsigned left = count; left > 0;) {
    for (current = 0; current < count; ++current) {
      if (threads[current].done) continue;
      blockIdx = dim3(x + current / blockDim.x, y);
      threadIdx = dim3(current % blockDim.x);
      swapcontext(&scheduler, &threads[current].context);
      left -= threads[current].done;
    }
  }
}

}  // namespace emulated

inline void __syncthreads() {
  emulated::wait(emulated::block_barrier[emulated::current / blockDim.x], blockDim.x);
}

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  const unsigned self = emulated::current;
  emulated::Barrier& warp = emulated::warp_barrier[self / 32];
  emulated::exchange[self] = x;
  emulated::wait(warp, 32);
  x = emulated::exchange[self ^ mask];
  emulated::wait(warp, 32);
  return x;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }

typedef void* cudaStream_t;
typedef int cudaError_t;

enum { cudaLaunchAttributeClusterDimension, cudaDevAttrClusterLaunch };
enum {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};

struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  const cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulated {

struct Launched {
  int device;
  cudaStream_t stream;
};

inline int device = -1;  // the current one
inline std::vector<Launched> launched;

}  // namespace emulated

// The launches since the last call with `clear`: their number, and the k-th one's place.
extern "C" __attribute__((visibility("default"), used)) inline int emulated_launches(
    int k, int* device, void** stream, int clear) {
  const int count = static_cast<int>(emulated::launched.size());
  if (k < count) {
    *device = emulated::launched[k].device;
    *stream = emulated::launched[k].stream;
  }
  if (clear) emulated::launched.clear();
  return count;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  emulated::launched.push_back({emulated::device, config->stream});
  emulated::body = [=] { kernel(arguments...); };
  ::blockDim = config->blockDim;
  emulated::blocks = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  for (auto& memory : emulated::memory) memory.assign(config->dynamicSmemBytes, 0x7f);
  for (unsigned y = 0; y < config->gridDim.y; ++y) {
    for (unsigned x = 0; x < config->gridDim.x; x += emulated::blocks) emulated::run_cluster(x, y);
  }
  return 0;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int) {
  return 0;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel*, const cudaLaunchConfig_t*) {
  *count = 1;
  return 0;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 1;
  return 0;
}
inline cudaError_t cudaDriverGetVersion(int*) { return 0; }
inline cudaError_t cudaRuntimeGetVersion(int*) { return 0; }
inline cudaError_t cudaSetDevice(int device) {
  emulated::device = device;
  return 0;
}
inline cudaError_t cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
