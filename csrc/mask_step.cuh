// What the optimisers' steps on masks share.
#pragma once

#include "arithmetic.h"
#include "elements.cuh"
#include "number.cuh"

namespace maskops {

constexpr int totals_count = 3;
constexpr int elementwise_warps = elementwise_threads / 32;

// Adds up each number over the threads of a block, in an order that is always the same; thread 0 has the sums.
__device__ inline void sum_over_block(double (&values)[totals_count]) {
  __shared__ double of_warps[totals_count][elementwise_warps];
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
    for (int warp = 0; warp < elementwise_warps; ++warp) values[i] += of_warps[i][warp];
  }
}

// What all steps on masks do around the optimiser: the gradient before it; bounds, effective weight and totals after.
struct MaskStep {
  Operand mask, grad, weight, effective, lower_of_each;
  Given lower;
  float l1, toward, upper;
  double* partials;  // the totals of each block, one after the other; or none
  int64_t stochastic_from;
  double distance = 0;
  int at_lower = 0, at_upper = 0;

  MaskStep(const MaskStepArguments& arguments, const Operand (&operands)[5], double* partials)
      : mask(operands[0]),
        grad(operands[1]),
        weight(operands[2]),
        effective(operands[3]),
        lower_of_each(operands[4]),
        lower(arguments.lower),
        l1(static_cast<float>(arguments.l1)),
        toward(static_cast<float>(arguments.toward)),
        upper(static_cast<float>(arguments.upper)),
        partials(partials),
        stochastic_from(arguments.stochastic_from) {}

  __device__ float gradient(float m, float g, float w) const {
    return mask_gradient(m, weight ? g * w : g, l1, toward);
  }

  // Applies the bounds to the masks that the optimiser has made, and stores them and the effective weights.
  template <int width>
  __device__ void finish_entries(const Space& space, int64_t index, float (&m)[width], float (&w)[width],
                                 uint32_t count = 0) {
    float low[width];  // fetched late, for there seldom are any, and registers are short
    unpack(fetch<width>(lower_of_each, space, index), lower_of_each.dtype, low);
    apply_bounds(m, w, low, width, index, count);
    put(mask, space, index, m);
    put(effective, space, index, w);
  }

  // The masks within their bounds, as their dtype keeps them, and the effective weights in place of the weights.
  template <int width>
  __device__ void apply_bounds(float (&m)[width], float (&w)[width], const float (&low)[width], int present,
                               int64_t index, uint32_t count) {
    const float low_of_all = lower_of_each ? 0.0f : lower.value();
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const float bound = lower_of_each ? low[k] : low_of_all;
      m[k] = into_bounds(m[k], bound, upper);
      const auto entry = static_cast<uint32_t>(stochastic_from + index + k);
      if (stochastic_from >= 0) m[k] = rounded_by(chance(entry, count), m[k]);
      m[k] = rounded(m[k], mask.dtype);
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

// Counts the step up, where it lies. Returns where the scales are if they are not at hand.
const AdamScales* count_step(const AdamArguments& adam, double* workspace, AdamScales& at_hand, cudaStream_t stream);

// So many blocks may have totals.
inline unsigned most_blocks() { return 8 * static_cast<unsigned>(processors()); }

// Entries of the workspace that hold the scales; the partial sums come after them.
constexpr int scales_entries = sizeof(AdamScales) / sizeof(double) + 1;

inline double* partials_of(const MaskStepArguments& arguments) {
  return arguments.totals ? arguments.workspace + scales_entries : nullptr;
}

// Adds the blocks' totals up.
void finish_totals(const MaskStepArguments& arguments, unsigned blocks, cudaStream_t stream);

}  // namespace maskops
