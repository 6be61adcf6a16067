// What the kernels' launchers take: memory, sizes and a stream. Nothing of torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <cuda_runtime.h>

namespace maskops {

enum class DType : int { float32, float16, bfloat16, uint8 };

constexpr int most_dimensions = 5;

// A tensor in device memory; a stride of 0 repeats an entry.
struct View {
  void* data = nullptr;
  DType dtype = DType::float32;
  int dimensions = 0;
  int64_t sizes[most_dimensions] = {};
  int64_t strides[most_dimensions] = {};

  explicit operator bool() const { return data != nullptr; }

  int64_t count() const {
    int64_t product = 1;
    for (int d = 0; d < dimensions; ++d) product *= sizes[d];
    return product;
  }
};

// One kernel as the driver sees it on the current device.
struct KernelAttributes {
  std::string name;
  int registers, local_bytes, shared_bytes, threads, blocks_per_processor;
};

std::vector<std::string> kernel_names();
std::vector<KernelAttributes> kernel_attributes();

// noise + step_size * sign(grad * weight), then into [-bound, bound]. Without a weight: of grad alone.
void noise_step(const View& noise, const View& grad, const View& weight, float step_size, float bound,
                cudaStream_t stream);

// clamp(input, 0, upper), into output, which may be the input; bits: whether the gradient passes, eight elements to a
// byte in the memory order of the output, which has no gaps.
void relu_bits(const View& output, const View& input, const View& bits, float upper, cudaStream_t stream);

// input = clamp(scale * input + shift + residual, 0, upper), and its bits. Scale and shift have one float32 for each
// index of the second dimension, one after the other; they and the residual may be missing.
void affine_relu_bits(const View& input, const View& scale, const View& shift, const View& residual, const View& bits,
                      float upper, cudaStream_t stream);

// The gradient where the bit is 1, else 0; both have the same strides and no gaps.
void relu_bits_backward(const View& result, const View& grad, const View& bits, cudaStream_t stream);

// Along rows and columns.
struct Window {
  int kernel[2], stride[2], padding[2], dilation[2];
};

// The maximum of each window, and its place in the window, row by row. Images of three or four dimensions, all
// contiguous or all channels_last.
void max_pool_winners(const View& output, const View& winners, const View& input, const Window& window,
                      bool channels_last, cudaStream_t stream);

// For each pixel the gradients of the windows that it won, summed in float32 in the order of the windows.
void max_pool_winners_backward(const View& result, const View& grad, const View& winners, const Window& window,
                               bool channels_last, cudaStream_t stream);

}  // namespace maskops
