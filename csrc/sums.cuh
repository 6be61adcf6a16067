// Sums over threads, always in the same order.
#pragma once

#include <cooperative_groups.h>

#include "launch.cuh"

namespace maskops {

constexpr int most_warps = 32;

// The sum of some entries, and how many they are. All threads that take part in a sum of sums have the same result.
struct Sum {
  double total;
  int64_t count;
};

__device__ inline Sum over_warp(Sum sum) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sum.total += __shfl_xor_sync(0xffffffffu, sum.total, lanes);
    sum.count += __shfl_xor_sync(0xffffffffu, sum.count, lanes);
  }
  return sum;
}

// Over the threads of a one-dimensional block. The memory that the block shares for it is used in turns, so that one
// barrier is enough however often a sum is taken.
class BlockSum {
 public:
  static constexpr int shared_sums = 2 * most_warps;

  __device__ explicit BlockSum(Sum* shared) : shared_(shared) {}

  __device__ Sum operator()(Sum own) {
    const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    own = over_warp(own);
    if (warps == 1) return own;
    Sum* const sums = shared_ + turn_ * most_warps;
    turn_ ^= 1;
    if (lane == 0) sums[warp] = own;
    __syncthreads();
    return over_warp(lane < warps ? sums[lane] : Sum{0, 0});
  }

 private:
  Sum* shared_;
  int turn_ = 0;
};

enum class Together { alone, cluster, grid };

// Over the threads of the blocks that work on one thing together: a cluster, or the whole cooperative grid.
class TeamSum {
 public:
  static constexpr int shared_sums = BlockSum::shared_sums + 2;

  // The workspace of a grid has two sums for each of its blocks.
  __device__ TeamSum(Together how, Sum* shared, Sum* workspace)
      : how_(how), own_(shared + BlockSum::shared_sums), workspace_(workspace), block_(shared) {}

  __device__ Sum operator()(Sum sum) {
    sum = block_(sum);
    if (how_ == Together::alone) return sum;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    Sum all = {0, 0};
    if (how_ == Together::cluster) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
      const auto cluster = cooperative_groups::this_cluster();
      if (threadIdx.x == 0) own_[turn_] = sum;
      cluster.sync();
      if (lane < static_cast<int>(cluster.num_blocks())) all = *cluster.map_shared_rank(own_ + turn_, lane);
#else
      __trap();  // the launch asks whether there are clusters
#endif
    } else {
      const int blocks = static_cast<int>(gridDim.x);
      Sum* const sums = workspace_ + turn_ * blocks;
      if (threadIdx.x == 0) sums[blockIdx.x] = sum;
      cooperative_groups::this_grid().sync();
#pragma unroll 2
      for (int block = lane; block < blocks; block += 32) {
        // other processors wrote them: not from the first-level cache
        all.total += __ldcg(&sums[block].total);
        all.count += __ldcg(&sums[block].count);
      }
    }
    turn_ ^= 1;
    return over_warp(all);
  }

  // No block may end while another reads its shared memory.
  __device__ void finish() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (how_ == Together::cluster) cooperative_groups::this_cluster().sync();
#endif
  }

 private:
  Together how_;
  Sum *own_, *workspace_;
  BlockSum block_;
  int turn_ = 0;
};

// How the threads of a block share a sum over the batch for each entry of an image: x along the entries, y along the
// batch. With few images each thread sums all, in their order.
constexpr int few_images = 8;
constexpr int batch_threads = 512;

inline dim3 batch_block(int64_t batch) { return batch > few_images ? dim3(32, batch_threads / 32) : dim3(256, 1); }

inline unsigned batch_blocks(int64_t batch, int64_t entries) {
  const int64_t of_a_block = batch_block(batch).x;
  return static_cast<unsigned>((entries + of_a_block - 1) / of_a_block);
}

// Adds up what the threads of an entry have; the first of them, with threadIdx.y 0, has the sum.
__device__ inline float over_batch(float own) {
  __shared__ float parts[batch_threads];
  if (blockDim.y == 1) return own;
  parts[threadIdx.y * 32 + threadIdx.x] = own;
  __syncthreads();
  float total = 0;
  for (unsigned y = 0; y < blockDim.y; ++y) total += parts[y * 32 + threadIdx.x];
  return total;
}

}  // namespace maskops
