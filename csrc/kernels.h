// What the kernels' launchers take: memory, sizes and a stream. Nothing of torch.
#pragma once

#include <cmath>
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

// A tensor of no dimensions: a number of any dtype, in the device's memory or in the host's.
struct Number {
  enum Type : int { float64, float32, float16, bfloat16, int64, int32, int16, int8, uint8 };

  void* data = nullptr;
  Type type = float64;
  bool on_host = true;
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

// grad * weight, summed where the result has fewer entries. Here and below, the workspace of a sum has as many bytes as
// the other function says, aligned to 16; without one, no sum is divided among blocks.
int64_t factor_grad_workspace(const View& result, const View& weight);
void factor_grad(const View& result, const View& grad, const View& weight, void* workspace, cudaStream_t stream);

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
int64_t factor_grads_workspace(const std::vector<FactorViews>& factors);
void factor_grads(const std::vector<FactorViews>& factors, void* workspace, cudaStream_t stream);

// effective_weight of all layers of flat buffers.
void arena_effective_weight(const ArenaTable& table, const View& effective, const View& weight, const View& mask,
                            const View& noise, cudaStream_t stream);

// factor_grad of all layers of flat buffers; nothing is written between the layers.
int64_t arena_mask_grad_workspace(const ArenaTable& table);
void arena_mask_grad(const ArenaTable& table, const View& grads, const View& grad, const View& weight, void* workspace,
                     cudaStream_t stream);

// What every mask step takes. These views may be missing: a weight, without which `grad` is the mask's own gradient; an
// effective weight to write; lower bounds of each entry, without which `lower` is that of all; and totals.
struct MaskStepArguments {
  View mask, grad, weight, effective;
  double l1, toward;
  Number lower;
  View lower_of_each;
  double upper;
  View totals;
  double* workspace;  // of mask_step_workspace() entries, where there are totals or where a step or lr is on the device
  int64_t stochastic_from =
      -1;  // the place of the first entry of a mask that is rounded to bfloat16 by chance; or none
};

struct AdamArguments {
  Number step, lr;
  double beta1, beta2, eps;
};

// Entries of the blocks that have a scale of their own in eight-bit states.
constexpr int scaled_block = 256;

int64_t mask_step_workspace();
void mask_adam_step(const MaskStepArguments& arguments, const View& exp_avg, const View& exp_avg_sq,
                    const AdamArguments& adam, cudaStream_t stream);
void mask_sgd_step(const MaskStepArguments& arguments, const View& momentum_buffer, const Number& lr, double momentum,
                   cudaStream_t stream);
// Over tensors of one dimension.
void mask_adam8bit_step(const MaskStepArguments& arguments, const View& exp_avg, const View& exp_avg_scale,
                        const View& exp_avg_sq, const View& exp_avg_sq_scale, const AdamArguments& adam,
                        cudaStream_t stream);

// noise + step_size * sign(grad * weight), then into [-bound, bound]. Without a weight: of grad alone.
void noise_step(const View& noise, const View& grad, const View& weight, float step_size, float bound,
                cudaStream_t stream);

// The rows of a (rows, entries) tensor moved into the L1 ball: times min(1, radius / norm), or to the nearest point.
// The workspace has as many bytes as the other function says, aligned to 16.
int64_t l1_ball_workspace(int64_t rows, int64_t entries);
void l1_ball(const View& output, const View& input, void* workspace, double radius, bool project, cudaStream_t stream);

// Infinite where nothing bounds.
struct Bounds {
  float low = -INFINITY, high = INFINITY;
};

// A batch of stored images, of which an index, if there is one, picks some: for each the number of its image.
struct Stored {
  View images;
  const int64_t* index = nullptr;
  int64_t index_stride = 0;
};

// (clamp(decode(images[index]) + trigger) - mean) / std; the output's images are dense, one after the other.
void prepare_images(const View& output, const Stored& stored, const View& trigger, Bounds bounds, const View& mean,
                    const View& std, cudaStream_t stream);

// The gradient of the trigger in it, dense: summed over the images that the bounds let pass, over std. Without stored
// images there are no bounds.
void prepare_images_backward(const View& output, const View& grad, const Stored& stored, const View& trigger,
                             Bounds bounds, const View& std, cudaStream_t stream);

// trigger + step_size * sum of grad over its first dimension, into the ball unless the radius is infinite, into the
// bounds. The workspace as that of l1_ball.
int64_t trigger_step_workspace(int64_t batch, int64_t entries, double radius);
void trigger_step(const View& trigger, const View& grad, void* workspace, float step_size, double radius, Bounds bounds,
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

// grad + addend where a ReLU let its input pass, else 0, into result, which may be grad. The gate is the ReLU's output,
// with its upper bound, or its bits, in the memory order of the result, which has no gaps; the addend may be missing.
void relu_backward(const View& result, const View& grad, const View& gate, const View& addend, float upper,
                   cudaStream_t stream);

// output = clamp(output + residual, 0, upper).
void add_relu(const View& output, const View& residual, float upper, cudaStream_t stream);

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

// A depthwise layer, one output channel per input channel: factors of the weight's shape (channels, 1, rows, columns),
// with strides of 0 where they are broadcast. Without a mask, the weight is the effective weight.
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
