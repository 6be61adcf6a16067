// The effective weights of many layers that lie anywhere in memory, and the gradients of their factors: one launch
// each.
#include "elements.cuh"
#include "layer_blocks.cuh"

namespace maskops {
namespace {

constexpr int threads = 256;
constexpr int turns = 4;
// As many layers as a launch's parameters hold.
constexpr int most_layers = 60;
constexpr int most_sums = 40;
// Up to so many terms are summed by one thread, more by a warp.
constexpr int few_terms = 32;

struct Layer {
  Space space;
  Operand clean, perturbed, weight, mask, noise, scale;
};

struct Layers {
  LayerBlocks<most_layers> blocks;
  Layer layers[most_layers];
};

static_assert(sizeof(Layers) < 32000, "a launch takes 32,764 bytes of parameters");

__device__ float value(const Operand& operand, const Space& space, int64_t index) {
  return load(operand, offset_of(space, operand, index));
}

__global__ void __launch_bounds__(threads, 4) effective_weights_kernel(const __grid_constant__ Layers all) {
  const int found = all.blocks.find();
  const Layer& layer = all.layers[found];
  const int64_t first = static_cast<int64_t>(blockIdx.x - all.blocks.first_block[found]) * (threads * turns);
#pragma unroll
  for (int turn = 0; turn < turns; ++turn) {
    const int64_t index = first + turn * threads + threadIdx.x;
    if (index >= layer.space.count) return;
    const float weight = value(layer.weight, layer.space, index), mask = value(layer.mask, layer.space, index);
    const float scale = layer.scale ? value(layer.scale, layer.space, index) : 1.0f;
    store(layer.clean, offset_of(layer.space, layer.clean, index), __fmul_rn(__fmul_rn(weight, mask), scale));
    if (layer.perturbed) {
      const float factor = __fadd_rn(mask, value(layer.noise, layer.space, index));
      store(layer.perturbed, offset_of(layer.space, layer.perturbed, index),
            __fmul_rn(__fmul_rn(weight, factor), scale));
    }
  }
}

// A tensor over the dimensions that the result has, and over those that are summed.
struct Term {
  Operand kept, summed;
};

struct Sum {
  Space kept, summed;
  Operand result;
  Term grad, other_grad, weight, scale;
};

struct Sums {
  LayerBlocks<most_sums> blocks;
  Sum sums[most_sums];
};

static_assert(sizeof(Sums) < 32000, "a launch takes 32,764 bytes of parameters");

__host__ __device__ int lanes_of(const Space& summed) { return summed.count <= few_terms ? 1 : 32; }

__global__ void __launch_bounds__(threads, 4) factor_grads_kernel(const __grid_constant__ Sums all) {
  const int found = all.blocks.find();
  const Sum& sum = all.sums[found];
  const int lanes = lanes_of(sum.summed), lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t block = blockIdx.x - all.blocks.first_block[found];
  const int64_t entry = block * (threads / lanes) + threadIdx.x / lanes;
  const bool inside = entry < sum.kept.count;
  double total = 0;
  if (inside) {
    const auto term_at = [&](const Term& term, int64_t index) {
      return load(term.kept, offset_of(sum.kept, term.kept, entry) + offset_of(sum.summed, term.summed, index));
    };
    for (int64_t index = lane; index < sum.summed.count; index += lanes) {
      double grad = term_at(sum.grad, index);
      if (sum.other_grad.kept) grad += term_at(sum.other_grad, index);
      const float scale = sum.scale.kept ? term_at(sum.scale, index) : 1.0f;
      total += grad * term_at(sum.weight, index) * scale;
    }
  }
  if (lanes == 32) {
    for (int far = 16; far > 0; far /= 2) total += __shfl_xor_sync(0xffffffffu, total, far);
  }
  if (inside && lane == 0) store(sum.result, offset_of(sum.kept, sum.result, entry), static_cast<float>(total));
}

// One number per entry of the first dimension, as a tensor of the sizes of another.
View along_first(const View& numbers, const View& like) {
  if (!numbers) return numbers;
  View view = like;
  view.data = numbers.data;
  view.dtype = numbers.dtype;
  for (int d = 0; d < view.dimensions; ++d) view.strides[d] = d == 0 ? numbers.strides[0] : 0;
  return view;
}

}  // namespace

void effective_weights(const std::vector<WeightViews>& weights, cudaStream_t stream) {
  for (size_t first = 0; first < weights.size(); first += most_layers) {
    Layers all;
    for (size_t i = first; i < std::min(weights.size(), first + most_layers); ++i) {
      const WeightViews& views = weights[i];
      const View scale = along_first(views.scale, views.weight);
      const Elementwise<6> layer({&views.clean, &views.perturbed, &views.weight, &views.mask, &views.noise, &scale});
      const auto& [clean, perturbed, weight, mask, noise, scaling] = layer.operands;
      all.layers[all.blocks.layers] = {layer.space, clean, perturbed, weight, mask, noise, scaling};
      all.blocks.add(divide_up(layer.space.count, threads * turns));
    }
    launch<effective_weights_kernel>({dim3(all.blocks.blocks()), dim3(threads), stream}, all);
  }
}

void factor_grads(const std::vector<FactorViews>& factors, cudaStream_t stream) {
  for (size_t first = 0; first < factors.size(); first += most_sums) {
    Sums all;
    for (size_t i = first; i < std::min(factors.size(), first + most_sums); ++i) {
      const FactorViews& views = factors[i];
      const View scale = along_first(views.scale, views.weight);
      const View* const whole[] = {&views.grad, &views.other_grad, &views.weight, &scale};
      View kept[4], summed[4];
      for (int k = 0; k < 4; ++k) {
        if (!*whole[k]) continue;
        kept[k] = part(*whole[k], views.result, false);
        summed[k] = part(*whole[k], views.result, true);
      }
      const View result = repeated_as(views.result, views.weight);
      const View own = part(result, views.result, false);
      const Elementwise<5> outer({&own, &kept[0], &kept[1], &kept[2], &kept[3]});
      const Elementwise<4> inner({&summed[2], &summed[0], &summed[1], &summed[3]});
      const auto& [weight, grad, other_grad, scaling] = inner.operands;
      const Operand(&outside)[5] = outer.operands;
      all.sums[all.blocks.layers] = {
          outer.space,          inner.space,          outside[0], {outside[1], grad}, {outside[2], other_grad},
          {outside[3], weight}, {outside[4], scaling}};
      all.blocks.add(divide_up(outer.space.count, threads / lanes_of(inner.space)));
    }
    launch<factor_grads_kernel>({dim3(all.blocks.blocks()), dim3(threads), stream}, all);
  }
}

}  // namespace maskops
