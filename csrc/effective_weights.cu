// The effective weights of many layers that lie anywhere in memory, and the gradients of their factors: one launch
// each.
#include "layer_blocks.cuh"

namespace maskops {
namespace {

constexpr int threads = 256;
constexpr int turns = 4;
// As many layers as a launch's parameters hold.
constexpr int most_layers = 60;
constexpr int most_sums = 40;

struct Layer {
  Space space;
  Operand clean, perturbed, weight, mask, noise, scale;
  bool flat;

  int64_t entries_of_a_block() const { return threads * (flat ? eight : turns); }
};

struct Layers {
  LayerBlocks<most_layers> blocks;
  Layer layers[most_layers];
};

static_assert(sizeof(Layers) < 32000, "a launch takes 32,764 bytes of parameters");

// What the effective weights of some entries are made of.
template <int width>
struct Fetched {
  Packed<width> weight, mask, noise, scale;
};

template <int width>
__device__ Fetched<width> fetch(const Layer& layer, int64_t index) {
  return {fetch<width>(layer.weight, layer.space, index), fetch<width>(layer.mask, layer.space, index),
          fetch<width>(layer.noise, layer.space, index), fetch<width>(layer.scale, layer.space, index)};
}

template <int width>
__device__ void put(const Layer& layer, int64_t index, const Fetched<width>& fetched) {
  float weights[width], masks[width], noises[width], scales[width], values[width];
  unpack(fetched.weight, layer.weight.dtype, weights);
  unpack(fetched.mask, layer.mask.dtype, masks);
  unpack(fetched.noise, layer.noise.dtype, noises);
  unpack(fetched.scale, layer.scale.dtype, scales);
  const bool is_scaled = static_cast<bool>(layer.scale);
#pragma unroll
  for (int k = 0; k < width; ++k) {
    if (!is_scaled) scales[k] = 1.0f;
    values[k] = __fmul_rn(__fmul_rn(weights[k], masks[k]), scales[k]);
  }
  put(layer.clean, layer.space, index, values);
  if (!layer.perturbed) return;
#pragma unroll
  for (int k = 0; k < width; ++k) {
    values[k] = __fmul_rn(__fmul_rn(weights[k], __fadd_rn(masks[k], noises[k])), scales[k]);
  }
  put(layer.perturbed, layer.space, index, values);
}

// Tensors that lie in memory alike are taken eight entries at a time; of others, a thread takes a few.
__global__ void __launch_bounds__(threads, 4) effective_weights_kernel(const __grid_constant__ Layers all) {
  const int found = all.blocks.find();
  const Layer& layer = all.layers[found];
  const int64_t block = blockIdx.x - all.blocks.first_block[found], count = layer.space.count;
  if (layer.flat) {
    const int64_t whole = count / eight * eight, first = block * threads * eight;
    const int64_t index = first + threadIdx.x * eight, rest = whole + threadIdx.x;
    if (index < whole) put(layer, index, fetch<eight>(layer, index));
    if (whole < first + threads * eight && rest < count) put(layer, rest, fetch<1>(layer, rest));
    return;
  }
  const int64_t first = block * (threads * turns) + threadIdx.x;
  Fetched<1> fetched[turns];
#pragma unroll
  for (int turn = 0; turn < turns; ++turn) fetched[turn] = fetch<1>(layer, min(first + turn * threads, count - 1));
#pragma unroll
  for (int turn = 0; turn < turns; ++turn) {
    const int64_t index = first + turn * threads;
    if (index < count) put(layer, index, fetched[turn]);
  }
}

// A tensor over the dimensions that the result has, and over those that are summed.
struct Term {
  Operand kept, summed;
};

struct FactorSum {
  Space kept, summed;
  Operand result;
  Term grad, other_grad, weight, scale;
  bool flat;  // an entry's terms lie in a row, and have one scale
};

struct FactorSums {
  LayerBlocks<most_sums> blocks;
  FactorSum sums[most_sums];
};

static_assert(sizeof(FactorSums) < 32000, "a launch takes 32,764 bytes of parameters");

// Terms of a sum.
template <int width>
struct Products {
  Packed<width> grad, other_grad, weight;
  Packed<1> scale;
};

// Those of an entry, and where their first lies in each tensor.
struct Terms {
  const FactorSum& sum;
  int64_t grad_at, other_grad_at, weight_at, scale_at;

  __device__ Terms(const FactorSum& sum, int64_t entry)
      : sum(sum),
        grad_at(offset_of(sum.kept, sum.grad.kept, entry)),
        other_grad_at(offset_of(sum.kept, sum.other_grad.kept, entry)),
        weight_at(offset_of(sum.kept, sum.weight.kept, entry)),
        scale_at(offset_of(sum.kept, sum.scale.kept, entry)) {}

  __device__ bool start_at_eights() const {
    return grad_at % eight == 0 && other_grad_at % eight == 0 && weight_at % eight == 0;
  }

  template <int width>
  __device__ Packed<width> fetch(const Term& term, int64_t first, int64_t index) const {
    return fetch_at<width>(term.kept, first + (width == 1 ? offset_of(sum.summed, term.summed, index) : index));
  }

  template <int width>
  __device__ Products<width> fetch(int64_t index) const {
    return {fetch<width>(sum.grad, grad_at, index), fetch<width>(sum.other_grad, other_grad_at, index),
            fetch<width>(sum.weight, weight_at, index), fetch<1>(sum.scale, scale_at, width == 1 ? index : 0)};
  }

  template <int width>
  __device__ double add(double total, const Products<width>& products) const {
    float grads[width], other_grads[width], weights[width];
    unpack(products.grad, sum.grad.kept.dtype, grads);
    unpack(products.other_grad, sum.other_grad.kept.dtype, other_grads);
    unpack(products.weight, sum.weight.kept.dtype, weights);
    const float scale = sum.scale.kept ? to_float(products.scale.bits, sum.scale.kept.dtype) : 1.0f;
    const bool has_other = static_cast<bool>(sum.other_grad.kept);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      double grad = grads[k];
      if (has_other) grad += other_grads[k];
      total += grad * weights[k] * scale;
    }
    return total;
  }
};

__global__ void __launch_bounds__(sum_threads, 3)
    factor_grads_kernel(const __grid_constant__ FactorSums all, double* workspace) {
  const int found = all.blocks.find();
  const FactorSum& sum = all.sums[found];
  const Division division(sum.kept.count, sum.summed.count, workspace != nullptr);
  const Share share = division.share(blockIdx.x - all.blocks.first_block[found]);
  const bool inside = share.entry < division.entries;
  double total = 0;
  if (inside) {
    const Terms terms(sum, share.entry);
    total = total_of<four>(terms, sum.flat && division.lanes > 1 && terms.start_at_eights(), share);
  }
  total = over_lanes(total, division.lanes);
  if (!inside || share.lane != 0) return;
  if (division.parts > 1) {
    workspace[blockIdx.x] = total;
  } else {
    store(sum.result, offset_of(sum.kept, sum.result, share.entry), static_cast<float>(total));
  }
}

// A block for each result of the launch before.
__global__ void __launch_bounds__(sum_threads, 3)
    factor_grads_parts_kernel(const __grid_constant__ FactorSums all, const double* workspace) {
  const FactorSum& sum = all.sums[blockIdx.x];
  const Division division(sum.kept.count, sum.summed.count, true);
  if (division.parts == 1) return;
  add_parts(division, workspace + all.blocks.first_block[blockIdx.x], [&](int64_t entry, double total) {
    store(sum.result, offset_of(sum.kept, sum.result, entry), static_cast<float>(total));
  });
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
      Layer& added = all.layers[all.blocks.layers];
      added = {layer.space, clean, perturbed, weight, mask, noise, scaling, layer.flat};
      all.blocks.add(divide_up(layer.space.count, added.entries_of_a_block()));
    }
    launch<effective_weights_kernel>({dim3(all.blocks.blocks()), dim3(threads), stream}, all);
  }
}

int64_t factor_grads_workspace(const std::vector<FactorViews>& factors) {
  int64_t blocks = 0;
  bool has_parts = false;
  for (const FactorViews& views : factors) {
    const int64_t entries = views.result.count();
    const Division division(entries, entries == 0 ? 0 : views.weight.count() / entries, true);
    blocks += division.blocks();
    has_parts = has_parts || division.parts > 1;
  }
  return has_parts ? blocks * static_cast<int64_t>(sizeof(double)) : 0;
}

void factor_grads(const std::vector<FactorViews>& factors, void* workspace, cudaStream_t stream) {
  double* const parts = static_cast<double*>(workspace);
  for (size_t first = 0; first < factors.size(); first += most_sums) {
    FactorSums all;
    bool has_parts = false;
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
      const bool one_scale = inner.space.dimensions == 1 && scaling.strides[0] == 0;
      const bool flat = one_scale && Elementwise<3>({&summed[2], &summed[0], &summed[1]}).flat;
      all.sums[all.blocks.layers] = {
          outer.space,          inner.space,           outside[0], {outside[1], grad}, {outside[2], other_grad},
          {outside[3], weight}, {outside[4], scaling}, flat};
      const Division division(outer.space.count, inner.space.count, parts != nullptr);
      has_parts = has_parts || division.parts > 1;
      all.blocks.add(division.blocks());
    }
    launch<factor_grads_kernel>({dim3(all.blocks.blocks()), dim3(sum_threads), stream}, all, parts);
    if (has_parts) {
      const unsigned results = static_cast<unsigned>(all.blocks.layers);
      launch<factor_grads_parts_kernel>({dim3(results), dim3(sum_threads), stream}, all, parts);
    }
  }
}

}  // namespace maskops
