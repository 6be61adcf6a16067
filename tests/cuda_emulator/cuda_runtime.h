// CUDA kernels on the CPU, for tests: this folder stands before CUDA's own headers in the include path.
//
// The threads of a block are fibers, which run in turns from one barrier to the next; the blocks run one after the
// other, those of a cluster or of a cooperative launch together. With CUDA_EMULATOR_REVERSED=1 threads and blocks run
// in the opposite order: a missing barrier then gives another result. A __shared__ variable is a static one, so kernels
// whose blocks run together take their shared memory from the launch. All memory is the host's but for tensors of one
// number whose address, or "all", stands in CUDA_EMULATOR_DEVICE_MEMORY: those are left to the kernels to read.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define CUDA_EMULATOR

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace emulator {

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t values[32] = {};
};

struct Block;

// The thread that runs now.
struct Thread {
  uint3 index, block_index;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned lane = 0;
};

Thread& self();
void wait_for(Barrier& barrier, unsigned threads);
void wait_for_block();
void wait_for_cluster();
char* dynamic_shared();
bool is_device_memory(const void* at);
unsigned cluster_rank();
unsigned cluster_size();
char* shared_of(unsigned rank, const void* own);
void run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

// What each lane of the mask gives, to each of them.
template <typename T>
void exchange(unsigned mask, T value, T (&values)[32]) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves up to eight bytes");
  Thread& thread = self();
  Warp& warp = *thread.warp;
  std::memcpy(&warp.values[thread.lane], &value, sizeof(T));
  const unsigned lanes = static_cast<unsigned>(__builtin_popcount(mask));
  wait_for(warp.barrier, lanes);
  for (unsigned lane = 0; lane < 32; ++lane) std::memcpy(&values[lane], &warp.values[lane], sizeof(T));
  wait_for(warp.barrier, lanes);
}

}  // namespace emulator

// Of the thread that runs now.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

using std::max;
using std::min;

inline void __syncthreads() { emulator::wait_for_block(); }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::wait_for(emulator::self().warp->barrier, static_cast<unsigned>(__builtin_popcount(mask)));
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  T values[32];
  emulator::exchange(mask, value, values);
  const int own = static_cast<int>(emulator::self().lane);
  return values[own / width * width + (lane & (width - 1))];
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  T values[32];
  emulator::exchange(mask, value, values);
  const int own = static_cast<int>(emulator::self().lane), other = own ^ lanes;
  return other / width > own / width ? value : values[other];
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  T values[32];
  emulator::exchange(mask, value, values);
  const int own = static_cast<int>(emulator::self().lane), other = own + static_cast<int>(lanes);
  return other / width > own / width ? value : values[other];
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  T values[32];
  emulator::exchange(mask, value, values);
  const int own = static_cast<int>(emulator::self().lane), other = own - static_cast<int>(lanes);
  return other < own / width * width ? value : values[other];
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  int values[32];
  emulator::exchange(mask, predicate, values);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= (mask >> lane & 1 && values[lane] ? 1u : 0u) << lane;
  return bits;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

int __syncthreads_count(int predicate);
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) {
  return __syncthreads_count(predicate) == static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
}

template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}

template <typename T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}

template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename T>
T __ldcs(const T* at) {
  return *at;
}
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
template <typename T>
void __stcs(T* at, T value) {
  *at = value;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulator::run(*config, [&] { kernel(arguments...); });
  return cudaSuccess;
}
