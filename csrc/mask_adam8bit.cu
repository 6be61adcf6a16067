// Adam's step on masks, its moments kept in eight bits.
#include <cfloat>

#include "dynamic_tree.h"
#include "mask_step.cuh"

namespace maskops {
namespace {

__device__ constexpr DynamicTree<true> signed_tree = DynamicTree<true>::make();
__device__ constexpr DynamicTree<false> unsigned_tree = DynamicTree<false>::make();
static_assert(DynamicTree<true>::make().is_sound() && DynamicTree<false>::make().is_sound());

// The whole block copies a table.
template <typename Table>
__device__ void copy_table(Table& to, const Table& from) {
  for (unsigned word = threadIdx.x; word < sizeof(Table) / 4; word += elementwise_threads) {
    reinterpret_cast<uint32_t*>(&to)[word] = reinterpret_cast<const uint32_t*>(&from)[word];
  }
}

// Moments of eight bits: a block's codes and its scale. All tensors are of one dimension.
struct EightBits {
  Operand codes, scales;

  // The codes of eight entries, the first in the lowest byte; zeros for those that are not there.
  __device__ uint2 fetch_codes(const Space& space, int64_t index, bool together) const {
    if (together) return *reinterpret_cast<const uint2*>(codes.data + index);
    uint64_t word = 0;
#pragma unroll 1
    for (int k = 0; k < eight && index + k < space.count; ++k) {
      word |= uint64_t{*at(codes, index + k)} << 8 * k;
    }
    return {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)};
  }

  __device__ float fetch_scale(int64_t block) const {
    return *reinterpret_cast<const float*>(scales.data + block * scales.strides[0] * sizeof(float));
  }

  template <typename Tree>
  __device__ static void dequantise(uint2 codes, float scale, const Tree& tree, float (&values)[eight]) {
#pragma unroll
    for (int k = 0; k < eight; ++k) values[k] = tree.values[(k < 4 ? codes.x : codes.y) >> 8 * (k % 4) & 0xff] * scale;
  }

  // The entries of a block lie in the lanes of a warp, eight in each; those that are not there are 0.
  template <typename Tree>
  __device__ void quantise(const float (&values)[eight], const Tree& tree, const Space& space, int64_t index,
                           bool together) const {
    uint32_t largest = 0;  // floats without a sign are in the order of their bits, NaN last
#pragma unroll
    for (int k = 0; k < eight; ++k) largest = max(largest, __float_as_uint(values[k]) & 0x7fffffffu);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    const float scale = __uint_as_float(largest), inverse = 1.0f / (scale < FLT_MIN ? FLT_MIN : scale);
    if (threadIdx.x % 32 == 0) {
      *reinterpret_cast<float*>(scales.data + index / scaled_block * scales.strides[0] * sizeof(float)) = scale;
    }
    uint32_t words[2] = {};
#pragma unroll
    for (int k = 0; k < eight; ++k) {
      words[k / 4] |= static_cast<uint32_t>(tree.code(values[k] * inverse)) << 8 * (k % 4);
    }
    if (together) {
      *reinterpret_cast<uint2*>(codes.data + index) = {words[0], words[1]};
      return;
    }
    const uint64_t word = words[0] | uint64_t{words[1]} << 32;
#pragma unroll 1
    for (int k = 0; k < eight && index + k < space.count; ++k) {
      *at(codes, index + k) = static_cast<uint8_t>(word >> 8 * k);
    }
  }

 private:
  __device__ static uint8_t* at(const Operand& codes, int64_t index) {
    return reinterpret_cast<uint8_t*>(codes.data) + index * codes.strides[0];
  }
};

// The entries of a block that have to be read or written one by one go through shared memory. A warp has so much.
using Staged = float[scaled_block];

// Eight elements from `index` on for each lane of a warp, as far as they are there.
__device__ void load_each(const Operand& operand, const Space& space, int64_t index, Staged& staged,
                          float (&values)[eight]) {
  const int lane = threadIdx.x % 32;
  const int64_t first = index - lane * eight;
  __syncwarp();
#pragma unroll 1
  for (int entry = lane; entry < scaled_block; entry += 32) {
    float value[1] = {};
    if (operand && first + entry < space.count) {
      unpack(fetch<1>(operand, space, first + entry), operand.dtype, value);
    }
    staged[entry] = value[0];
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < eight; ++k) values[k] = staged[lane * eight + k];
}

__device__ void store_each(const Operand& operand, const Space& space, int64_t index, Staged& staged,
                           const float (&values)[eight]) {
  const int lane = threadIdx.x % 32;
  const int64_t first = index - lane * eight;
  __syncwarp();
#pragma unroll
  for (int k = 0; k < eight; ++k) staged[lane * eight + k] = values[k];
  __syncwarp();
#pragma unroll 1
  for (int entry = lane; entry < scaled_block && first + entry < space.count; entry += 32) {
    const float value[1] = {staged[entry]};
    put<1>(operand, space, first + entry, value);
  }
}

// Adam with moments of eight bits: a warp takes a block of entries that share a scale.
__global__ void __launch_bounds__(elementwise_threads, 2)
    adam8bit(Space space, bool flat, MaskStep step, EightBits exp_avg, EightBits exp_avg_sq, Adam adam,
             AdamScales scales_at_hand, const AdamScales* scales_stored) {
  static_assert(scaled_block == 32 * eight);
  __shared__ DynamicTree<true> first_tree;
  __shared__ DynamicTree<false> second_tree;
  __shared__ Staged staged_by_warps[elementwise_warps];
  Staged& staged = staged_by_warps[threadIdx.x / 32];
  space.dimensions = 1;  // which the compiler then knows
  copy_table(first_tree, signed_tree);
  copy_table(second_tree, unsigned_tree);
  __syncthreads();
  const AdamScales scales = scales_stored ? *scales_stored : scales_at_hand;
  const int64_t all_warps = static_cast<int64_t>(gridDim.x) * elementwise_warps;
  const int64_t blocks = (space.count + scaled_block - 1) / scaled_block;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * elementwise_warps + threadIdx.x / 32;
  for (int64_t block = warp; block < blocks; block += all_warps) {
    const int64_t index = block * scaled_block + threadIdx.x % 32 * eight;
    const int present = static_cast<int>(min(max(space.count - index, int64_t{0}), int64_t{eight}));
    const bool together = flat && (block + 1) * scaled_block <= space.count;
    float m[eight], g[eight], w[eight], first[eight], second[eight], low[eight] = {};
    const uint2 first_codes = exp_avg.fetch_codes(space, index, together),
                second_codes = exp_avg_sq.fetch_codes(space, index, together);
    const float first_scale = exp_avg.fetch_scale(block), second_scale = exp_avg_sq.fetch_scale(block);
    if (together) {
      const Packed<eight> mask_bits = fetch<eight>(step.mask, space, index),
                          grad_bits = fetch<eight>(step.grad, space, index),
                          weight_bits = fetch<eight>(step.weight, space, index);
      unpack(mask_bits, step.mask.dtype, m);
      unpack(grad_bits, step.grad.dtype, g);
      unpack(weight_bits, step.weight.dtype, w);
    } else {
      load_each(step.mask, space, index, staged, m);
      load_each(step.grad, space, index, staged, g);
      load_each(step.weight, space, index, staged, w);
    }
    EightBits::dequantise(first_codes, first_scale, first_tree, first);
    EightBits::dequantise(second_codes, second_scale, second_tree, second);
#pragma unroll
    for (int k = 0; k < eight; ++k) {
      average_moments(step.gradient(m[k], g[k], w[k]), adam, first[k], second[k]);
      m[k] = adam_step(m[k], first[k], second[k], adam.eps, scales);
      if (k >= present) first[k] = second[k] = 0;
    }
    if (step.lower_of_each && together) {
      unpack(fetch<eight>(step.lower_of_each, space, index), step.lower_of_each.dtype, low);
    } else if (step.lower_of_each) {
      load_each(step.lower_of_each, space, index, staged, low);
    }
    step.apply_bounds(m, w, low, present, index, scales.count);
    if (together) {
      put(step.mask, space, index, m);
      put(step.effective, space, index, w);
    } else {
      store_each(step.mask, space, index, staged, m);
      if (step.effective) store_each(step.effective, space, index, staged, w);
    }
    exp_avg.quantise(first, first_tree, space, index, together);
    exp_avg_sq.quantise(second, second_tree, space, index, together);
  }
  step.finish();
}

}  // namespace

void mask_adam8bit_step(const MaskStepArguments& arguments, const View& exp_avg, const View& exp_avg_scale,
                        const View& exp_avg_sq, const View& exp_avg_sq_scale, const AdamArguments& adam,
                        cudaStream_t stream) {
  const auto& a = arguments;
  const Elementwise<7> all({&a.mask, &a.grad, &a.weight, &a.effective, &a.lower_of_each, &exp_avg, &exp_avg_sq});
  const Elementwise<2> of_blocks({&exp_avg_scale, &exp_avg_sq_scale});
  const auto& [m, g, w, e, low, first, second] = all.operands;
  const auto& [first_scale, second_scale] = of_blocks.operands;
  AdamScales at_hand = {};
  const AdamScales* stored = count_step(adam, a.workspace, at_hand, stream);
  const MaskStep step(a, {m, g, w, e, low}, partials_of(a));
  const int64_t of_a_block = elementwise_warps * scaled_block;
  const unsigned blocks =
      static_cast<unsigned>(std::min((all.space.count + of_a_block - 1) / of_a_block, int64_t{most_blocks()}));
  launch<adam8bit>({dim3(blocks), dim3(elementwise_threads), stream}, all.space, all.flat, step,
                   EightBits{first, first_scale}, EightBits{second, second_scale},
                   Adam(adam.beta1, adam.beta2, adam.eps), at_hand, stored);
  finish_totals(a, blocks, stream);
}

}  // namespace maskops
