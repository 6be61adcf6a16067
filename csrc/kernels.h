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

// The layers of an arena: rows of [start, length, mask_start, mask_length, size, stride, size, stride, …], the same
// numbers on the device and on the host.
struct ArenaTable {
  const int64_t* on_device;
  const int64_t* on_host;
  int rows, width;
};

// weight * mask, or weight * (mask + noise); the factors are repeated where they have fewer entries.
void effective_weight(const View& effective, const View& weight, const View& mask, const View& noise,
                      cudaStream_t stream);

// grad * weight, summed where the result has fewer entries.
void factor_grad(const View& result, const View& grad, const View& weight, cudaStream_t stream);

// A layer's tensors: what is missing has no data; the scale is one number per entry of the first dimension.
struct WeightViews {
  View clean, perturbed, weight, mask, noise, scale;
};

// clean = weight * mask * scale and perturbed = weight * (mask + noise) * scale of many layers.
void effective_weights(const std::vector<WeightViews>& weights, cudaStream_t stream);

struct FactorViews {
  View result, grad, other_grad, weight, scale;
};

// (grad + other_grad) * weight * scale of many layers, summed where a result has fewer entries.
void factor_grads(const std::vector<FactorViews>& factors, cudaStream_t stream);

// effective_weight of all layers of flat buffers.
void arena_effective_weight(const ArenaTable& table, const View& effective, const View& weight, const View& mask,
                            const View& noise, cudaStream_t stream);

// factor_grad of all layers of flat buffers; nothing is written between the layers.
void arena_mask_grad(const ArenaTable& table, const View& grads, const View& grad, const View& weight,
                     cudaStream_t stream);

// noise + step_size * sign(grad * weight), then into [-bound, bound]. Without a weight: of grad alone.
void noise_step(const View& noise, const View& grad, const View& weight, float step_size, float bound,
                cudaStream_t stream);

// A depthwise layer, one output channel per input channel: factors of the weight's shape (channels, 1, rows, columns),
// with strides of 0 where they are broadcast.
struct DepthwiseFilter {
  View weight, mask, noise;
  int stride[2], padding[2], dilation[2];
};

// bias + the depthwise convolution of the input with weight * (mask + noise).
void depthwise_conv(const View& output, const View& input, const DepthwiseFilter& filter, const View& bias,
                    cudaStream_t stream);

// The gradient of the input of depthwise_conv.
void depthwise_conv_input_grad(const View& grad_input, const View& grad, const DepthwiseFilter& filter,
                               cudaStream_t stream);

// How many floats depthwise_conv_weight_grad needs to work in.
int64_t depthwise_conv_weight_grad_floats(const View& grad, const View& input, const DepthwiseFilter& filter);

// The gradient of the effective weight of depthwise_conv: contiguous float32. Of the filter, the geometry is read, and
// of the weight the sizes.
void depthwise_conv_weight_grad(const View& grad_weight, const View& grad, const View& input,
                                const DepthwiseFilter& filter, float* parts, cudaStream_t stream);

}  // namespace maskops
