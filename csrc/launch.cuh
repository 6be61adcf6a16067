// How every kernel starts, and the list of all kernels.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"

namespace maskops {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int processors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Shared memory whose size the launch says, aligned to 16 bytes.
__device__ inline char* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ uint4 dynamic_shared_memory[];
  return reinterpret_cast<char*>(dynamic_shared_memory);
#else
  return emulator::dynamic_shared();
#endif
}

// Adds a kernel to the list that kernel_attributes() reads.
int enlist(const void* kernel, const char* signature);

template <auto kernel>
int enlist_kernel() {
  return enlist(reinterpret_cast<const void*>(kernel), __PRETTY_FUNCTION__);
}

// One for each kernel that is launched anywhere, made when the library is loaded.
template <auto kernel>
inline const int enlisted = enlist_kernel<kernel>();

// Whether the code that runs on this device was made for clusters; what was made from older PTX wasn't.
template <auto kernel>
bool has_clusters() {
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90 && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
}

struct Launch {
  dim3 grid, block;
  cudaStream_t stream;
  size_t shared = 0;
  unsigned cluster = 1;      // so many blocks share their shared memory, from sm_90 on
  bool cooperative = false;  // all blocks run at once, and can wait for each other
};

// Starts a kernel and raises what went wrong with the start. An empty grid starts nothing.
template <auto kernel, typename... Arguments>
void launch(const Launch& how, Arguments... arguments) {
  (void)enlisted<kernel>;
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;
  cudaLaunchAttribute attributes[1] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared;
  config.stream = how.stream;
  config.attrs = attributes;
  if (how.cluster > 1) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {how.cluster, 1, 1};
    config.numAttrs = 1;
  } else if (how.cooperative) {
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    config.numAttrs = 1;
  }
  if (how.shared > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(how.shared)),
          "cudaFuncSetAttribute");
  }
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "kernel launch");
}

}  // namespace maskops
