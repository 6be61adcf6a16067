// weight * (mask + noise) of one layer or of all layers of an arena in one launch, and the gradients of the factors.
#include "arithmetic.h"
#include "elements.cuh"
#include "layer_blocks.cuh"

namespace maskops {
namespace {

// How many layers one launch takes: what its parameters hold in less than 4 KiB.
constexpr int most_layers = 480;
constexpr int threads = 256;
constexpr int entries_of_a_block = threads * eight;

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

// The quotient; in 32 bits where numbers of a layer with few entries fit into them.
__device__ int64_t divide(int64_t number, int64_t by, bool is_small) {
  return is_small ? static_cast<uint32_t>(number) / static_cast<uint32_t>(by) : number / by;
}

// Where the factor of a weight lies among the layer's masks.
__device__ int64_t mask_offset(const Row& row, int64_t index, bool is_small) {
  int64_t offset = 0;
  const int last = row.dimensions - 1;
  for (int d = 0; d < last; ++d) {
    const int64_t size = row.size(d), outer = divide(index, size, is_small);
    offset += (index - outer * size) * row.stride(d);
    index = outer;
  }
  return offset + index * row.stride(last);
}

__device__ float factor_at(const Operand& mask, const Operand& noise, int64_t offset) {
  const float factor = load(mask, offset);
  return noise ? __fadd_rn(factor, load(noise, offset)) : factor;
}

// Eight factors that have one distance from each other.
__device__ void fetch_apart(const Operand& operand, int64_t offset, int64_t step, float (&values)[eight]) {
  Packed<1> bits[eight];
#pragma unroll
  for (int k = 0; k < eight; ++k) bits[k] = fetch_at<1>(operand, offset + k * step);
#pragma unroll
  for (int k = 0; k < eight; ++k) values[k] = to_float(bits[k].bits, operand.dtype);
}

// Eight entries at a time where they don't reach into the next row of the mask, loaded at once where they lie so;
// `aligned` and `masks_aligned` tell it of the buffers' addresses.
__global__ void __launch_bounds__(threads, 4)
    arena_effective_weight_kernel(const ArenaLayers layers, ArenaTable table, Operand effective, Operand weight,
                                  Operand mask, Operand noise, bool aligned, bool masks_aligned) {
  const int layer = layers.blocks.find();
  const Row row = row_of(table, table.on_device, layers.first_row + layer);
  const int64_t block = blockIdx.x - layers.blocks.first_block[layer];
  const int64_t index = block * entries_of_a_block + threadIdx.x * eight, length = row.length();
  if (index >= length) return;
  const bool is_small = length <= INT32_MAX;
  const int64_t at = row.start() + index, inner = row.size(0), step = row.stride(0);
  int64_t within = row.dimensions == 1 ? index : index - divide(index, inner, is_small) * inner;
  int64_t offset = row.mask_start() + mask_offset(row, index, is_small);
  if (!aligned || at % eight != 0 || within + eight > inner) {
    const int64_t entries = min(int64_t{eight}, length - index);
#pragma unroll 1
    for (int64_t k = 0; k < entries; ++k, ++within, offset += step) {
      if (within == inner) {
        within = 0;
        offset = row.mask_start() + mask_offset(row, index + k, is_small);
      }
      store(effective, at + k, __fmul_rn(load(weight, at + k), factor_at(mask, noise, offset)));
    }
    return;
  }
  const Packed<eight> weight_bits = fetch_at<eight>(weight, at);
  float values[eight], factors[eight], noises[eight];
  if (step == 1 && masks_aligned && offset % eight == 0) {
    const Packed<eight> mask_bits = fetch_at<eight>(mask, offset), noise_bits = fetch_at<eight>(noise, offset);
    unpack(mask_bits, mask.dtype, factors);
    unpack(noise_bits, noise.dtype, noises);
  } else if (step == 0) {
    const float one = factor_at(mask, noise, offset);
#pragma unroll
    for (int k = 0; k < eight; ++k) factors[k] = one;
  } else {
    fetch_apart(mask, offset, step, factors);
    if (noise) fetch_apart(noise, offset, step, noises);
  }
  unpack(weight_bits, weight.dtype, values);
  const bool adds_noise = noise && step != 0;
#pragma unroll
  for (int k = 0; k < eight; ++k) {
    values[k] = __fmul_rn(values[k], adds_noise ? __fadd_rn(factors[k], noises[k]) : factors[k]);
  }
  put(effective, line(1), at, values);
}

// Where the index of a sum, over the mask's own dimensions or over the others, lies in the weight.
__device__ int64_t weight_offset(const Row& row, int64_t index, bool own, int64_t* mask_at) {
  const bool is_small = row.length() <= INT32_MAX;
  int64_t offset = 0, step = 1;
  for (int d = 0; d < row.dimensions; ++d) {
    const int64_t size = row.size(d), stride = row.stride(d);
    if ((stride != 0) == own) {
      const int64_t outer = divide(index, size, is_small), here = index - outer * size;
      offset += here * step;
      if (own) *mask_at += here * stride;
      index = outer;
    }
    step *= size;
  }
  return offset;
}

// Terms of a sum: gradients times weights.
template <int width>
struct Products {
  Packed<width> grad, weight;
};

template <int width>
__device__ double add_products(double total, const Products<width>& products, DType grad, DType weight) {
  float grads[width], weights[width];
  unpack(products.grad, grad, grads);
  unpack(products.weight, weight, weights);
#pragma unroll
  for (int k = 0; k < width; ++k) total += static_cast<double>(grads[k]) * weights[k];
  return total;
}

// Those of an entry of an arena's masks, from the first on.
struct ArenaTerms {
  const Row& row;
  const Operand &grad, &weight;
  int64_t first;
  bool in_a_row;

  template <int width>
  __device__ Products<width> fetch(int64_t term) const {
    const int64_t at = first + (in_a_row ? term : weight_offset(row, term, false, nullptr));
    return {fetch_at<width>(grad, at), fetch_at<width>(weight, at)};
  }

  template <int width>
  __device__ double add(double total, const Products<width>& products) const {
    return add_products(total, products, grad.dtype, weight.dtype);
  }
};

__host__ __device__ Division division_of(const Row& row, bool has_workspace) {
  const int64_t entries = row.mask_length();
  return {entries, entries == 0 ? 0 : row.length() / entries, has_workspace};
}

__global__ void __launch_bounds__(sum_threads, 3)
    arena_mask_grad_kernel(const ArenaLayers layers, ArenaTable table, Operand grads, Operand grad, Operand weight,
                           bool aligned, double* workspace) {
  const int layer = layers.blocks.find();
  const Row row = row_of(table, table.on_device, layers.first_row + layer);
  const Division division = division_of(row, workspace != nullptr);
  const Share share = division.share(blockIdx.x - layers.blocks.first_block[layer]);
  const bool inside = share.entry < division.entries;
  double total = 0;
  int64_t mask_at = row.mask_start();
  if (inside) {
    const int64_t first = row.start() + weight_offset(row, share.entry, true, &mask_at);
    const bool in_a_row = row.stride(0) == 0 && row.size(0) == division.terms;
    const bool at_once = in_a_row && aligned && division.lanes > 1 && first % eight == 0;
    total = total_of<eight>(ArenaTerms{row, grad, weight, first, in_a_row}, at_once, share);
  }
  total = over_lanes(total, division.lanes);
  if (!inside || share.lane != 0) return;
  if (division.parts > 1) {
    workspace[blockIdx.x] = total;
  } else {
    store(grads, mask_at, static_cast<float>(total));
  }
}

// A block for each layer of the launch before.
__global__ void __launch_bounds__(sum_threads, 3)
    arena_mask_grad_parts_kernel(const ArenaLayers layers, ArenaTable table, Operand grads, const double* workspace) {
  const Row row = row_of(table, table.on_device, layers.first_row + static_cast<int>(blockIdx.x));
  const Division division = division_of(row, true);
  if (division.parts == 1) return;
  add_parts(division, workspace + layers.blocks.first_block[blockIdx.x], [&](int64_t entry, double total) {
    int64_t mask_at = row.mask_start();
    weight_offset(row, entry, true, &mask_at);
    store(grads, mask_at, static_cast<float>(total));
  });
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

// Those of an entry of one layer's factor, from the first on.
struct LayerTerms {
  const Space& space;
  const Operand &grad, &weight;
  int64_t grad_at, weight_at;

  template <int width>
  __device__ Products<width> fetch(int64_t term) const {
    if constexpr (width == 1) {
      return {fetch_at<1>(grad, grad_at + offset_of(space, grad, term)),
              fetch_at<1>(weight, weight_at + offset_of(space, weight, term))};
    } else {
      return {fetch_at<width>(grad, grad_at + term), fetch_at<width>(weight, weight_at + term)};
    }
  }

  template <int width>
  __device__ double add(double total, const Products<width>& products) const {
    return add_products(total, products, grad.dtype, weight.dtype);
  }
};

// One sum over the repeated dimensions for each entry of a factor; flat: its terms lie in a row.
__global__ void __launch_bounds__(sum_threads, 3)
    factor_grad_kernel(const __grid_constant__ Space kept, const __grid_constant__ Space summed,
                       const __grid_constant__ Operand result, const __grid_constant__ Operand grad,
                       const __grid_constant__ Operand weight, const __grid_constant__ Operand inner_grad,
                       const __grid_constant__ Operand inner_weight, bool flat, double* workspace) {
  const Division division(kept.count, summed.count, workspace != nullptr);
  const Share share = division.share(blockIdx.x);
  const bool inside = share.entry < division.entries;
  double total = 0;
  if (inside) {
    const int64_t grad_at = offset_of(kept, grad, share.entry), weight_at = offset_of(kept, weight, share.entry);
    const bool at_once = flat && division.lanes > 1 && grad_at % eight == 0 && weight_at % eight == 0;
    total = total_of<eight>(LayerTerms{summed, inner_grad, inner_weight, grad_at, weight_at}, at_once, share);
  }
  total = over_lanes(total, division.lanes);
  if (!inside || share.lane != 0) return;
  if (division.parts > 1) {
    workspace[blockIdx.x] = total;
  } else {
    store(result, offset_of(kept, result, share.entry), static_cast<float>(total));
  }
}

__global__ void __launch_bounds__(sum_threads, 3)
    factor_grad_parts_kernel(const __grid_constant__ Space kept, const __grid_constant__ Operand result, int64_t terms,
                             const double* workspace) {
  add_parts(Division(kept.count, terms, true), workspace, [&](int64_t entry, double total) {
    store(result, offset_of(kept, result, entry), static_cast<float>(total));
  });
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

// Whether a sum of these layers is taken by several blocks.
bool has_parts(const ArenaTable& table, const ArenaLayers& layers) {
  for (int row = layers.first_row; row < layers.first_row + layers.blocks.layers; ++row) {
    if (division_of(row_of(table, table.on_host, row), true).parts > 1) return true;
  }
  return false;
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

int64_t factor_grad_workspace(const View& result, const View& weight) {
  const int64_t entries = result.count();
  const Division division(entries, entries == 0 ? 0 : weight.count() / entries, true);
  return division.parts > 1 ? division.blocks() * static_cast<int64_t>(sizeof(double)) : 0;
}

void factor_grad(const View& result, const View& grad, const View& weight, void* workspace, cudaStream_t stream) {
  const View outer_grad = part(grad, result, false), outer_weight = part(weight, result, false);
  const View inner_grad = part(grad, result, true), inner_weight = part(weight, result, true);
  if (inner_grad.dimensions == 0) {
    effective_weight(result, grad, weight, {}, stream);
    return;
  }
  const View own = part(repeated_as(result, grad), result, false);
  const Elementwise<3> kept({&own, &outer_grad, &outer_weight});
  const Elementwise<2> summed({&inner_weight, &inner_grad});
  const auto& [result_over, grad_over, weight_over] = kept.operands;
  const Division division(kept.space.count, summed.space.count, workspace != nullptr);
  double* const parts = static_cast<double*>(workspace);
  launch<factor_grad_kernel>({dim3(static_cast<unsigned>(division.blocks())), dim3(sum_threads), stream}, kept.space,
                             summed.space, result_over, grad_over, weight_over, summed.operands[1], summed.operands[0],
                             summed.flat, parts);
  if (division.parts > 1) {
    launch<factor_grad_parts_kernel>({dim3(1), dim3(sum_threads), stream}, kept.space, result_over, division.terms,
                                     parts);
  }
}

void arena_effective_weight(const ArenaTable& table, const View& effective, const View& weight, const View& mask,
                            const View& noise, cudaStream_t stream) {
  const auto blocks_of = [](const Row& row) { return divide_up(row.length(), entries_of_a_block); };
  const bool aligned = is_aligned(effective) && is_aligned(weight);
  const bool masks_aligned = is_aligned(mask) && is_aligned(noise);
  each_launch(table, blocks_of, [&](const ArenaLayers& layers) {
    launch<arena_effective_weight_kernel>({dim3(layers.blocks.blocks()), dim3(threads), stream}, layers, table,
                                          flat(effective), flat(weight), flat(mask), flat(noise), aligned,
                                          masks_aligned);
  });
}

int64_t arena_mask_grad_workspace(const ArenaTable& table) {
  int64_t most = 0;
  const auto blocks_of = [](const Row& row) { return division_of(row, true).blocks(); };
  each_launch(table, blocks_of, [&](const ArenaLayers& layers) {
    if (has_parts(table, layers)) most = std::max(most, int64_t{layers.blocks.blocks()});
  });
  return most * static_cast<int64_t>(sizeof(double));
}

void arena_mask_grad(const ArenaTable& table, const View& grads, const View& grad, const View& weight, void* workspace,
                     cudaStream_t stream) {
  double* const parts = static_cast<double*>(workspace);
  const auto blocks_of = [&](const Row& row) { return division_of(row, parts != nullptr).blocks(); };
  const bool aligned = is_aligned(grad) && is_aligned(weight);
  each_launch(table, blocks_of, [&](const ArenaLayers& layers) {
    launch<arena_mask_grad_kernel>({dim3(layers.blocks.blocks()), dim3(sum_threads), stream}, layers, table,
                                   flat(grads), flat(grad), flat(weight), aligned, parts);
    if (parts == nullptr || !has_parts(table, layers)) return;
    const unsigned rows = static_cast<unsigned>(layers.blocks.layers);
    launch<arena_mask_grad_parts_kernel>({dim3(rows), dim3(sum_threads), stream}, layers, table, flat(grads), parts);
  });
}

}  // namespace maskops
