// weight * (mask + noise) of one layer or of all layers of an arena in one launch, and the gradients of the factors.
#include "arithmetic.h"
#include "elements.cuh"
#include "layer_blocks.cuh"

namespace maskops {
namespace {

// How many layers one launch takes: what its parameters hold in less than 4 KiB.
constexpr int most_layers = 480;
constexpr int entries_of_a_block = 256 * eight;
constexpr int sum_threads = 256;
// Up to so many terms are summed by one thread, whose neighbours sum those of neighbouring masks.
constexpr int few_terms = 32;

// The layers of a launch, from a row of the table on.
struct ArenaLayers {
  LayerBlocks<most_layers> blocks;
  int first_row = 0;
};

// A row of an arena's table: where weight and mask lie in their buffers, then a size and a stride for each dimension.
struct Row {
  const int64_t* numbers;
  int dimensions;

  __host__ __device__ int64_t start() const { return numbers[0]; }
  __host__ __device__ int64_t length() const { return numbers[1]; }
  __host__ __device__ int64_t mask_start() const { return numbers[2]; }
  __host__ __device__ int64_t mask_length() const { return numbers[3]; }
  __host__ __device__ int64_t size(int d) const { return numbers[4 + 2 * d]; }
  __host__ __device__ int64_t stride(int d) const { return numbers[5 + 2 * d]; }
};

__host__ __device__ Row row_of(const ArenaTable& table, const int64_t* numbers, int row) {
  return {numbers + static_cast<int64_t>(row) * table.width, (table.width - 4) / 2};
}

// Where the factor of a weight lies among the layer's masks.
__device__ int64_t mask_offset(const Row& row, int64_t index) {
  int64_t offset = 0;
  for (int d = 0; d < row.dimensions; ++d) {
    const int64_t size = row.size(d), outer = index / size;
    offset += (index - outer * size) * row.stride(d);
    index = outer;
  }
  return offset;
}

__device__ float factor_at(const Operand& mask, const Operand& noise, int64_t offset) {
  const float factor = load(mask, offset);
  return noise ? __fadd_rn(factor, load(noise, offset)) : factor;
}

__global__ void __launch_bounds__(256, 4)
    arena_effective_weight_kernel(const ArenaLayers layers, ArenaTable table, Operand effective, Operand weight,
                                  Operand mask, Operand noise) {
  const int layer = layers.blocks.find();
  const Row row = row_of(table, table.on_device, layers.first_row + layer);
  const int64_t block = blockIdx.x - layers.blocks.first_block[layer];
  const int64_t index = block * entries_of_a_block + threadIdx.x * eight, length = row.length();
  if (index >= length) return;
  const int64_t at = row.start() + index;
  const int64_t inner = row.size(0), step = row.stride(0);
  const int64_t offset = row.mask_start() + mask_offset(row, index);
  if (index + eight > length || index % inner + eight > inner) {
    for (int64_t k = 0; k < (length - index < eight ? length - index : eight); ++k) {
      const float factor = factor_at(mask, noise, row.mask_start() + mask_offset(row, index + k));
      store(effective, at + k, __fmul_rn(load(weight, at + k), factor));
    }
    return;
  }
  const Space flat = {1, {0}, 0};
  const Packed<eight> weight_bits = fetch<eight>(weight, flat, at);
  float weights[eight], values[eight];
#pragma unroll
  for (int k = 0; k < eight; ++k) values[k] = factor_at(mask, noise, offset + k * step);
  unpack(weight_bits, weight.dtype, weights);
#pragma unroll
  for (int k = 0; k < eight; ++k) values[k] = __fmul_rn(weights[k], values[k]);
  put(effective, flat, at, values);
}

// Where the index of a sum, over the mask's own dimensions or over the others, lies in the weight.
__device__ int64_t weight_offset(const Row& row, int64_t index, bool own, int64_t* mask_at) {
  int64_t offset = 0, step = 1;
  for (int d = 0; d < row.dimensions; ++d) {
    const int64_t size = row.size(d), stride = row.stride(d);
    if ((stride != 0) == own) {
      const int64_t outer = index / size, here = index - outer * size;
      offset += here * step;
      if (own) *mask_at += here * stride;
      index = outer;
    }
    step *= size;
  }
  return offset;
}

__device__ int warps_of_a_sum() { return sum_threads / 32; }

// A thread sums few terms alone; many are summed by a warp.
__global__ void __launch_bounds__(sum_threads, 4)
    arena_mask_grad_kernel(const ArenaLayers layers, ArenaTable table, Operand grads, Operand grad, Operand weight) {
  const int layer = layers.blocks.find();
  const Row row = row_of(table, table.on_device, layers.first_row + layer);
  const int64_t block = blockIdx.x - layers.blocks.first_block[layer], count = row.mask_length();
  const int64_t terms = row.length() / count;
  const int lanes = terms <= few_terms ? 1 : 32;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t entry = block * (sum_threads / lanes) + threadIdx.x / lanes;
  const bool inside = entry < count;
  double total = 0;
  int64_t mask_at = row.mask_start();
  if (inside) {
    const int64_t first = row.start() + weight_offset(row, entry, true, &mask_at);
    const bool in_a_row = row.stride(0) == 0 && row.size(0) == terms;
    for (int64_t term = lane; term < terms; term += lanes) {
      const int64_t at = first + (in_a_row ? term : weight_offset(row, term, false, nullptr));
      total += static_cast<double>(load(grad, at)) * load(weight, at);
    }
  }
  if (lanes == 32) {
    for (int far = 16; far > 0; far /= 2) total += __shfl_xor_sync(0xffffffffu, total, far);
  }
  if (inside && lane == 0) store(grads, mask_at, static_cast<float>(total));
}

struct EffectiveWeight {
  Operand effective, weight, mask, noise;

  template <int width>
  __device__ void at(const Space& space, int64_t index) const {
    const Packed<width> weight_bits = fetch<width>(weight, space, index), mask_bits = fetch<width>(mask, space, index),
                        noise_bits = fetch<width>(noise, space, index);
    float values[width], factors[width], noises[width];
    unpack(weight_bits, weight.dtype, values);
    unpack(mask_bits, mask.dtype, factors);
    unpack(noise_bits, noise.dtype, noises);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (noise) factors[k] = __fadd_rn(factors[k], noises[k]);
      values[k] = __fmul_rn(values[k], factors[k]);
    }
    put(effective, space, index, values);
  }

  __device__ void finish() const {}
};

// One sum over the repeated dimensions for each entry of a factor.
__global__ void __launch_bounds__(sum_threads, 4)
    factor_grad_kernel(Space kept, Space summed, Operand result, Operand grad, Operand weight, Operand inner_grad,
                       Operand inner_weight) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * warps_of_a_sum() + threadIdx.x / 32;
  if (entry >= kept.count) return;
  const int64_t grad_at = offset_of(kept, grad, entry), weight_at = offset_of(kept, weight, entry);
  double total = 0;
  for (int64_t term = threadIdx.x % 32; term < summed.count; term += 32) {
    total += static_cast<double>(load(grad, grad_at + offset_of(summed, inner_grad, term))) *
             load(weight, weight_at + offset_of(summed, inner_weight, term));
  }
  for (int far = 16; far > 0; far /= 2) total += __shfl_xor_sync(0xffffffffu, total, far);
  if (threadIdx.x % 32 == 0) store(result, offset_of(kept, result, entry), static_cast<float>(total));
}

// Divides the layers among launches, each layer into blocks of so many entries.
template <typename EntriesOf, typename Start>
void each_launch(const ArenaTable& table, EntriesOf blocks_of, Start start) {
  for (int first = 0; first < table.rows; first += most_layers) {
    ArenaLayers layers;
    layers.first_row = first;
    for (int row = first; row < std::min(first + most_layers, table.rows); ++row) {
      layers.blocks.add(blocks_of(row_of(table, table.on_host, row)));
    }
    start(layers);
  }
}

Operand flat(const View& view) {
  Operand operand;
  operand.data = static_cast<char*>(view.data);
  operand.dtype = view.dtype;
  operand.strides[0] = 1;
  return operand;
}

}  // namespace

void effective_weight(const View& effective, const View& weight, const View& mask, const View& noise,
                      cudaStream_t stream) {
  const Elementwise<4> all({&effective, &weight, &mask, &noise});
  const auto& [e, w, m, n] = all.operands;
  all.run(EffectiveWeight{e, w, m, n}, stream);
}

void factor_grad(const View& result, const View& grad, const View& weight, cudaStream_t stream) {
  const View outer_grad = part(grad, result, false), outer_weight = part(weight, result, false);
  const View inner_grad = part(grad, result, true), inner_weight = part(weight, result, true);
  if (inner_grad.dimensions == 0) {
    effective_weight(result, grad, weight, {}, stream);
    return;
  }
  const View own = part(repeated_as(result, grad), result, false);
  const Elementwise<3> kept({&own, &outer_grad, &outer_weight});
  const Elementwise<2> summed({&inner_weight, &inner_grad});
  const Launch how = {dim3(static_cast<unsigned>(divide_up(kept.space.count, sum_threads / 32))), dim3(sum_threads),
                      stream};
  launch<factor_grad_kernel>(how, kept.space, summed.space, kept.operands[0], kept.operands[1], kept.operands[2],
                             summed.operands[1], summed.operands[0]);
}

void arena_effective_weight(const ArenaTable& table, const View& effective, const View& weight, const View& mask,
                            const View& noise, cudaStream_t stream) {
  const auto blocks_of = [](const Row& row) { return divide_up(row.length(), entries_of_a_block); };
  each_launch(table, blocks_of, [&](const ArenaLayers& layers) {
    const Launch how = {dim3(layers.blocks.blocks()), dim3(256), stream};
    launch<arena_effective_weight_kernel>(how, layers, table, flat(effective), flat(weight), flat(mask), flat(noise));
  });
}

void arena_mask_grad(const ArenaTable& table, const View& grads, const View& grad, const View& weight,
                     cudaStream_t stream) {
  const auto blocks_of = [](const Row& row) {
    const int64_t terms = row.mask_length() ? row.length() / row.mask_length() : 0;
    return divide_up(row.mask_length(), terms <= few_terms ? sum_threads : sum_threads / 32);
  };
  each_launch(table, blocks_of, [&](const ArenaLayers& layers) {
    const Launch how = {dim3(layers.blocks.blocks()), dim3(sum_threads), stream};
    launch<arena_mask_grad_kernel>(how, layers, table, flat(grads), flat(grad), flat(weight));
  });
}

}  // namespace maskops
