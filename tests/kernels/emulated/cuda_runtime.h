// As much of CUDA as csrc/cuda.cu uses, on the CPU: the kernels' sources run, and are tested, where
// there is no GPU. A block's threads are coroutines that take turns; a barrier passes the turn on
// until all have arrived. Blocks follow one another. Nothing is said about speed, or about the
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
#define __launch_bounds__(threads)

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

constexpr size_t STACK = 256 << 10;

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
inline Barrier block_barrier, warp_barrier[32];
inline float exchange[1024];

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

inline void run_block(unsigned count) {
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
      threadIdx = dim3(current, 0, 0);
      swapcontext(&scheduler, &threads[current].context);
      left -= threads[current].done;
    }
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::block_barrier, blockDim.x); }

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

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
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

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... parameters) {
  emulated::launched.push_back({emulated::device, config->stream});
  emulated::body = [=] { kernel(parameters...); };
  ::blockDim = config->blockDim;
  for (unsigned y = 0; y < config->gridDim.y; ++y) {
    for (unsigned x = 0; x < config->gridDim.x; ++x) {
      ::blockIdx = dim3(x, y);
      emulated::run_block(config->blockDim.x);
    }
  }
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
