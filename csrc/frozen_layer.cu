// What stands between frozen convolutions: a residual and the ReLU in one pass, and backwards the ReLU with a second
// gradient in one pass.
#include "arithmetic.h"
#include "elements.cuh"

namespace maskops {
namespace {

// The gate of a gradient: a ReLU's output, or its bits, in the memory order of the result.
struct ReluBackward {
  Operand result, grad, addend, gate;
  const uint8_t* bits;
  float stop;

  template <int width>
  __device__ void at(const Space& space, int64_t index) const {
    const Packed<width> incoming = fetch<width>(grad, space, index), added = fetch<width>(addend, space, index);
    const Packed<width> output = fetch<width>(gate, space, index);
    // eight elements begin with a byte
    const uint32_t byte = bits ? bits[index / eight] >> index % eight : 0;
    float values[width], more[width], outputs[width];
    unpack(incoming, grad.dtype, values);
    unpack(added, addend.dtype, more);
    unpack(output, gate.dtype, outputs);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const bool pass = bits ? byte >> k & 1 : passes(outputs[k], stop);
      // adding nothing would make 0 of -0
      values[k] = pass ? addend ? values[k] + more[k] : values[k] : 0.0f;
    }
    put(result, space, index, values);
  }

  __device__ void finish() const {}
};

struct AddRelu {
  Operand output, residual;
  float upper;

  template <int width>
  __device__ void at(const Space& space, int64_t index) const {
    const Packed<width> first = fetch<width>(output, space, index), second = fetch<width>(residual, space, index);
    float values[width], more[width];
    unpack(first, output.dtype, values);
    unpack(second, residual.dtype, more);
#pragma unroll
    for (int k = 0; k < width; ++k) values[k] = relu(rounded(values[k] + more[k], output.dtype), upper);
    put(output, space, index, values);
  }

  __device__ void finish() const {}
};

}  // namespace

void relu_backward(const View& result, const View& grad, const View& gate, const View& addend, float upper,
                   cudaStream_t stream) {
  const View none;
  const bool has_bits = gate.dtype == DType::uint8;
  const Elementwise<4> all({&result, &grad, &addend, has_bits ? &none : &gate});
  const auto& [output, incoming, added, by_output] = all.operands;
  const auto* bits = has_bits ? static_cast<const uint8_t*>(gate.data) : nullptr;
  all.run(ReluBackward{output, incoming, added, by_output, bits, upper < INFINITY ? upper : NAN}, stream);
}

void add_relu(const View& output, const View& residual, float upper, cudaStream_t stream) {
  const Elementwise<2> all({&output, &residual});
  const auto& [both, added] = all.operands;
  all.run(AddRelu{both, added, upper}, stream);
}

}  // namespace maskops
