// The optimisers' steps on masks and noise, one launch over all elements.
#include "mask_step.cuh"

namespace maskops {
namespace {

struct AdamStep : MaskStep {
  Operand exp_avg, exp_avg_sq;
  Adam adam;
  AdamScales scales_at_hand;
  const AdamScales* scales_stored;

  AdamStep(const MaskStep& step, const Operand& exp_avg, const Operand& exp_avg_sq, const Adam& adam,
           AdamScales at_hand, const AdamScales* stored)
      : MaskStep(step),
        exp_avg(exp_avg),
        exp_avg_sq(exp_avg_sq),
        adam(adam),
        scales_at_hand(at_hand),
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
    finish_entries(space, index, m, w, scales.count);
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

__global__ void __launch_bounds__(32) count_and_scale(Number step, Number lr, double host_lr, double host_count,
                                                      double beta1, double beta2, AdamScales* scales) {
  if (threadIdx.x > 0) return;
  if (!step.on_host) {
    write(step, read(step) + 1);
    host_count = read(step);
  }
  *scales = adam_scales(host_count, lr.on_host ? host_lr : read(lr), beta1, beta2);
}

// Every thread takes the partial sums of some blocks, in an order that depends on their number alone.
__global__ void __launch_bounds__(elementwise_threads)
    sum_totals(const double* partials, unsigned blocks, Operand totals) {
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

}  // namespace

const AdamScales* count_step(const AdamArguments& adam, double* workspace, AdamScales& at_hand, cudaStream_t stream) {
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

void finish_totals(const MaskStepArguments& arguments, unsigned blocks, cudaStream_t stream) {
  if (!arguments.totals) return;
  const Elementwise<1> totals({&arguments.totals});
  launch<sum_totals>({dim3(1), dim3(elementwise_threads), stream}, partials_of(arguments), blocks, totals.operands[0]);
}

int64_t mask_step_workspace() { return scales_entries + int64_t{totals_count} * most_blocks(); }

void mask_adam_step(const MaskStepArguments& arguments, const View& exp_avg, const View& exp_avg_sq,
                    const AdamArguments& adam, cudaStream_t stream) {
  const auto& a = arguments;
  const Elementwise<7> all({&a.mask, &a.grad, &a.weight, &a.effective, &a.lower_of_each, &exp_avg, &exp_avg_sq});
  const auto& [m, g, w, e, low, first, second] = all.operands;
  AdamScales at_hand = {};
  const AdamScales* stored = count_step(adam, a.workspace, at_hand, stream);
  const MaskStep step(a, {m, g, w, e, low}, partials_of(a));
  all.run<four>(AdamStep(step, first, second, Adam(adam.beta1, adam.beta2, adam.eps), at_hand, stored), stream);
  finish_totals(a, all.blocks<four>(), stream);
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
