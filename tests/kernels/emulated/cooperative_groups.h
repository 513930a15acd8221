// Clusters, for cuda_runtime.h beside this.
#pragma once

#include "cuda_runtime.h"

inline dim3 __clusterIdx() { return dim3(blockIdx.x / emulated::blocks); }

namespace cooperative_groups {

struct Cluster {
  unsigned num_blocks() const { return emulated::blocks; }
  unsigned block_rank() const { return blockIdx.x % emulated::blocks; }
  void sync() const {
    emulated::wait(emulated::cluster_barrier, emulated::blocks * blockDim.x);
  }

  // The same object of another block.
  template <class T>
  T* map_shared_rank(T* own, unsigned rank) const {
    char* start = static_cast<char*>(emulated::shared());
    const auto offset = reinterpret_cast<char*>(own) - start;
    return reinterpret_cast<T*>(static_cast<char*>(emulated::shared_of(rank)) + offset);
  }
};

inline Cluster this_cluster() { return {}; }

}  // namespace cooperative_groups
