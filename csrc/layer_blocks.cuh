// One launch over many layers: which of its blocks work on which of them.
#pragma once

#include "launch.cuh"

namespace maskops {

template <int most>
struct LayerBlocks {
  int layers = 0;
  unsigned first_block[most + 1] = {};

  void add(int64_t blocks) {
    first_block[layers + 1] = first_block[layers] + static_cast<unsigned>(blocks);
    ++layers;
  }

  unsigned blocks() const { return first_block[layers]; }

  // The layer of this block.
  __device__ int find() const {
    int low = 0, high = layers - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_block[middle] <= blockIdx.x) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

inline int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

}  // namespace maskops
