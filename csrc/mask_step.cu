// The optimisers' steps on masks and noise, one launch over all elements.
#include "arithmetic.h"
#include "elements.cuh"

namespace maskops {

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
