// Clusters and cooperative grids of the emulator.
#pragma once

#include <cuda_runtime.h>

namespace cooperative_groups {

struct cluster_group {
  void sync() const { emulator::wait_for_cluster(); }
  unsigned block_rank() const { return emulator::cluster_rank(); }
  unsigned num_blocks() const { return emulator::cluster_size(); }

  template <typename T>
  T* map_shared_rank(T* own, unsigned rank) const {
    return reinterpret_cast<T*>(emulator::shared_of(rank, own));
  }
};

struct grid_group {
  void sync() const { emulator::wait_for_cluster(); }
};

inline cluster_group this_cluster() { return {}; }
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
