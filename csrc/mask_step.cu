// The optimisers' steps on masks and noise, one launch over all elements.
#include <cfloat>

#include "arithmetic.h"
#include "dynamic_tree.h"
#include "elements.cuh"
#include "number.cuh"

namespace maskops {
namespace {

constexpr int totals_count = 3;
constexpr int warps = elementwise_threads / 32;

// Adds up each number over the threads of a block, in an order that is always the same; thread 0 has the sums.
__device__ void sum_over_block(double (&values)[totals_count]) {
  __shared__ double of_warps[totals_count][warps];
#pragma unroll
  for (int i = 0; i < totals_count; ++i) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) values[i] += __shfl_xor_sync(0xffffffffu, values[i], lanes);
    if (threadIdx.x % 32 == 0) of_warps[i][threadIdx.x / 32] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < totals_count; ++i) {
    values[i] = 0;
    for (int warp = 0; warp < warps; ++warp) values[i] += of_warps[i][warp];
  }
}

// What all steps on masks do around the optimiser: the gradient before it; bounds, effective weight and totals after it.
struct MaskStep {
  Operand mask, grad, weight, effective, lower_of_each;
  Given lower;
  float l1, toward, upper;
  double* partials;  // the totals of each block, one after the other; or none
  double distance = 0;
  int at_lower = 0, at_upper = 0;

  MaskStep(const MaskStepArguments& arguments, const Operand (&operands)[5], double* partials)
      : mask(operands[0]), grad(operands[1]), weight(operands[2]), effective(operands[3]), lower_of_each(operands[4]),
        lower(arguments.lower), l1(static_cast<float>(arguments.l1)), toward(static_cast<float>(arguments.toward)),
        upper(static_cast<float>(arguments.upper)), partials(partials) {}

  __device__ float gradient(float m, float g, float w) const {
    return mask_gradient(m, weight ? g * w : g, l1, toward);
  }

  template <int width>
  __device__ void finish_entries(const Space& space, int64_t index, float (&m)[width], float (&w)[width]) {
    float low[width];  // fetched late, for there seldom are any, and registers are short
    unpack(fetch<width>(lower_of_each, space, index), lower_of_each.dtype, low);
    apply_bounds(m, w, low, width);
    put(mask, space, index, m);
    put(effective, space, index, w);
  }

  // The masks within their bounds, as their dtype keeps them, and the effective weights in place of the weights.
  template <int width>
  __device__ void apply_bounds(float (&m)[width], float (&w)[width], const float (&low)[width], int present) {
    const float low_of_all = lower_of_each ? 0.0f : lower.value();
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const float bound = lower_of_each ? low[k] : low_of_all;
      m[k] = rounded(into_bounds(m[k], bound, upper), mask.dtype);
      w[k] *= m[k];
      if (partials && k < present) {
        distance += fabs(static_cast<double>(m[k]) - toward);
        at_lower += m[k] == rounded(bound, mask.dtype);
        at_upper += m[k] == rounded(upper, mask.dtype);
      }
    }
  }

  __device__ void finish() const {
    if (!partials) return;
    double values[totals_count] = {distance, static_cast<double>(at_lower), static_cast<double>(at_upper)};
    sum_over_block(values);
    if (threadIdx.x > 0) return;
#pragma unroll
    for (int i = 0; i < totals_count; ++i) partials[totals_count * blockIdx.x + i] = values[i];
  }
};

struct AdamStep : MaskStep {
  Operand exp_avg, exp_avg_sq;
  Adam adam;
  AdamScales scales_at_hand;
  const AdamScales* scales_stored;

  AdamStep(const MaskStep& step, const Operand& exp_avg, const Operand& exp_avg_sq, const Adam& adam, AdamScales at_hand,
           const AdamScales* stored)
      : MaskStep(step), exp_avg(exp_avg), exp_avg_sq(exp_avg_sq), adam(adam), scales_at_hand(at_hand),
        scales_stored(stored) {}

  template <int width>
  __device__ void at(const Space& space, int64_t index) {
    const Packed<width> mask_bits = fetch<width>(mask, space, index), grad_bits = fetch<width>(grad, space, index),
                        weight_bits = fetch<width>(weight, space, index),
                        first_bits = fetch<width>(exp_avg, space, index),
                        second_bits = fetch<width>(exp_avg_sq, space, index);
    const AdamScales scales = scales_stored ? *scales_stored : scales_at_hand;
    float m[width], g[width], w[width], first[width], second[width];
    unpack(mask_bits, mask.dtype, m);
    unpack(grad_bits, grad.dtype, g);
    unpack(weight_bits, weight.dtype, w);
    unpack(first_bits, exp_avg.dtype, first);
    unpack(second_bits, exp_avg_sq.dtype, second);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      average_moments(gradient(m[k], g[k], w[k]), adam, first[k], second[k]);
      m[k] = adam_step(m[k], first[k], second[k], adam.eps, scales);
    }
    put(exp_avg, space, index, first);
    put(exp_avg_sq, space, index, second);
    finish_entries(space, index, m, w);
  }
};

struct SgdStep : MaskStep {
  Operand buffer;
  float momentum;
  Given lr;

  SgdStep(const MaskStep& step, const Operand& buffer, double momentum, const Number& lr)
      : MaskStep(step), buffer(buffer), momentum(static_cast<float>(momentum)), lr(lr) {}

  template <int width>
  __device__ void at(const Space& space, int64_t index) {
    const Packed<width> mask_bits = fetch<width>(mask, space, index), grad_bits = fetch<width>(grad, space, index),
                        weight_bits = fetch<width>(weight, space, index),
                        buffer_bits = fetch<width>(buffer, space, index);
    const float rate = lr.value();
    float m[width], g[width], w[width], velocity[width];
    unpack(mask_bits, mask.dtype, m);
    unpack(grad_bits, grad.dtype, g);
    unpack(weight_bits, weight.dtype, w);
    unpack(buffer_bits, buffer.dtype, velocity);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      g[k] = gradient(m[k], g[k], w[k]);
      if (buffer) g[k] = momentum_step(velocity[k], g[k], momentum);
      m[k] = sgd_step(m[k], g[k], rate);
    }
    put(buffer, space, index, g);
    finish_entries(space, index, m, w);
  }
};

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
    for (int k = 0; k < eight; ++k) words[k / 4] |= static_cast<uint32_t>(tree.code(values[k] * inverse)) << 8 * (k % 4);
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

// The entries of a block that have to be read or written one by one go through shared memory, of which a warp has so much.
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
  __shared__ Staged staged_by_warps[warps];
  Staged& staged = staged_by_warps[threadIdx.x / 32];
  space.dimensions = 1;  // which the compiler then knows
  copy_table(first_tree, signed_tree);
  copy_table(second_tree, unsigned_tree);
  __syncthreads();
  const AdamScales scales = scales_stored ? *scales_stored : scales_at_hand;
  const int64_t all_warps = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / 32; block * scaled_block < space.count;
       block += all_warps) {
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
    step.apply_bounds(m, w, low, present);
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

__global__ void __launch_bounds__(32) count_and_scale(Number step, Number lr, double host_lr, double host_count,
                                                      double beta1, double beta2, AdamScales* scales) {
  if (threadIdx.x > 0) return;
  if (!step.on_host) {
    write(step, read(step) + 1);
    host_count = read(step);
  }
  *scales = adam_scales(host_count, lr.on_host ? host_lr : read(lr), beta1, beta2);
}

// Counts the step up, on its device. Returns where the scales lie if they are not at hand.
const AdamScales* count(const AdamArguments& adam, double* workspace, AdamScales& at_hand, cudaStream_t stream) {
  double count = 0;
  if (adam.step.on_host) {
    write(adam.step, read(adam.step) + 1);
    count = read(adam.step);
  }
  const double lr = adam.lr.on_host ? read(adam.lr) : 0;
  if (adam.step.on_host && adam.lr.on_host) {
    at_hand = adam_scales(count, lr, adam.beta1, adam.beta2);
    return nullptr;
  }
  AdamScales* scales = reinterpret_cast<AdamScales*>(workspace);
  launch<count_and_scale>({dim3(1), dim3(32), stream}, adam.step, adam.lr, lr, count, adam.beta1, adam.beta2, scales);
  return scales;
}

// Every thread takes the partial sums of some blocks, in an order that depends on their number alone.
__global__ void __launch_bounds__(elementwise_threads) sum_totals(const double* partials, unsigned blocks,
                                                                  Operand totals) {
  double values[totals_count] = {};
  for (unsigned block = threadIdx.x; block < blocks; block += elementwise_threads) {
#pragma unroll
    for (int i = 0; i < totals_count; ++i) values[i] += partials[totals_count * block + i];
  }
  sum_over_block(values);
  if (threadIdx.x > 0) return;
  Space space;
  space.dimensions = 1;
  space.count = totals_count;
#pragma unroll
  for (int i = 0; i < totals_count; ++i) {
    const float total[1] = {static_cast<float>(values[i])};
    put<1>(totals, space, i, total);
  }
}

unsigned most_blocks() { return 8 * static_cast<unsigned>(processors()); }

// The partial sums come after the scales.
double* partials_of(const MaskStepArguments& arguments) {
  return arguments.totals ? arguments.workspace + 1 : nullptr;
}

void finish_totals(const MaskStepArguments& arguments, unsigned blocks, cudaStream_t stream) {
  if (!arguments.totals) return;
  const Elementwise<1> totals({&arguments.totals});
  launch<sum_totals>({dim3(1), dim3(elementwise_threads), stream}, partials_of(arguments), blocks, totals.operands[0]);
}

}  // namespace

int64_t mask_step_workspace() { return 1 + int64_t{totals_count} * most_blocks(); }

void mask_adam_step(const MaskStepArguments& arguments, const View& exp_avg, const View& exp_avg_sq,
                    const AdamArguments& adam, cudaStream_t stream) {
  const auto& a = arguments;
  const Elementwise<7> all({&a.mask, &a.grad, &a.weight, &a.effective, &a.lower_of_each, &exp_avg, &exp_avg_sq});
  const auto& [m, g, w, e, low, first, second] = all.operands;
  AdamScales at_hand = {};
  const AdamScales* stored = count(adam, a.workspace, at_hand, stream);
  const MaskStep step(a, {m, g, w, e, low}, partials_of(a));
  all.run<four>(AdamStep(step, first, second, Adam(adam.beta1, adam.beta2, adam.eps), at_hand, stored), stream);
  finish_totals(a, all.blocks<four>(), stream);
}

void mask_adam8bit_step(const MaskStepArguments& arguments, const View& exp_avg, const View& exp_avg_scale,
                        const View& exp_avg_sq, const View& exp_avg_sq_scale, const AdamArguments& adam,
                        cudaStream_t stream) {
  const auto& a = arguments;
  const Elementwise<7> all({&a.mask, &a.grad, &a.weight, &a.effective, &a.lower_of_each, &exp_avg, &exp_avg_sq});
  const Elementwise<2> of_blocks({&exp_avg_scale, &exp_avg_sq_scale});
  const auto& [m, g, w, e, low, first, second] = all.operands;
  const auto& [first_scale, second_scale] = of_blocks.operands;
  AdamScales at_hand = {};
  const AdamScales* stored = count(adam, a.workspace, at_hand, stream);
  const MaskStep step(a, {m, g, w, e, low}, partials_of(a));
  const int64_t of_a_block = warps * scaled_block;
  const unsigned blocks =
      static_cast<unsigned>(std::min((all.space.count + of_a_block - 1) / of_a_block, int64_t{most_blocks()}));
  launch<adam8bit>({dim3(blocks), dim3(elementwise_threads), stream}, all.space, all.flat, step,
                   EightBits{first, first_scale}, EightBits{second, second_scale},
                   Adam(adam.beta1, adam.beta2, adam.eps), at_hand, stored);
  finish_totals(a, blocks, stream);
}

void mask_sgd_step(const MaskStepArguments& arguments, const View& momentum_buffer, const Number& lr, double momentum,
                   cudaStream_t stream) {
  const auto& a = arguments;
  const Elementwise<6> all({&a.mask, &a.grad, &a.weight, &a.effective, &a.lower_of_each, &momentum_buffer});
  const auto& [m, g, w, e, low, buffer] = all.operands;
  const MaskStep step(a, {m, g, w, e, low}, partials_of(a));
  all.run<four>(SgdStep(step, buffer, momentum, lr), stream);
  finish_totals(a, all.blocks<four>(), stream);
}

struct NoiseStep {
  Operand noise, grad, weight;
  float step_size, bound;

  template <int width>
  __device__ void at(const Space& space, int64_t index) const {
    const Packed<width> noise_bits = fetch<width>(noise, space, index), grad_bits = fetch<width>(grad, space, index),
                        weight_bits = fetch<width>(weight, space, index);
    float values[width], grads[width], weights[width];
    unpack(noise_bits, noise.dtype, values);
    unpack(grad_bits, grad.dtype, grads);
    unpack(weight_bits, weight.dtype, weights);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      values[k] = noise_step(values[k], weight ? grads[k] * weights[k] : grads[k], step_size, bound);
    }
    put(noise, space, index, values);
  }

  __device__ void finish() const {}
};

void noise_step(const View& noise, const View& grad, const View& weight, float step_size, float bound,
                cudaStream_t stream) {
  const Elementwise<3> all({&noise, &grad, &weight});
  const auto& [n, g, w] = all.operands;
  all.run(NoiseStep{n, g, w, step_size, bound}, stream);
}

}  // namespace maskops
