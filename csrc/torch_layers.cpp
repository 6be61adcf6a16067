// The ops of layers: ReLU with the batch norm or the sum before it, max-pool, depthwise convolution.
#include <cmath>
#include <tuple>

#include "torch_ops.h"
#include "torch_tensors.h"

namespace maskops::binding {
namespace {

// As torch lays out the result of relu, and of hardtanh: they differ in the strides of dimensions of size 1.
Tensor relu_result(const Tensor& input, bool has_upper) {
  if (has_upper) return torch::stable::empty_like(input);
  if (input.is_contiguous()) return empty(input, sizes_of(input), input.scalar_type(), false);
  if (is_channels_last(input)) return empty(input, sizes_of(input), input.scalar_type(), true);
  return torch::stable::empty_like(input);
}

Tensor bits_of(const Tensor& tensor) {
  return torch::stable::new_empty(tensor, {(tensor.numel() + 7) / 8}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor> relu_bits(const Tensor& input, double upper) {
  const Device device(input);
  const Tensor output = relu_result(input, upper < INFINITY), bits = bits_of(input);
  maskops::relu_bits(view(output), view(input), view(bits), static_cast<float>(upper), device.stream());
  return {output, bits};
}

Tensor relu_bits_(Tensor input, double upper) {
  const Device device(input);
  const Tensor bits = bits_of(input);
  maskops::relu_bits(view(input), view(input), view(bits), static_cast<float>(upper), device.stream());
  return bits;
}

Tensor affine_relu_bits_(Tensor input, const OptionalTensor& scale, const OptionalTensor& shift,
                         const OptionalTensor& residual, double upper) {
  const Device device(input);
  const Tensor bits = bits_of(input);
  const OptionalTensor scales = as_floats(scale), shifts = as_floats(shift);
  maskops::affine_relu_bits(view(input), view(scales), view(shifts), view(residual), view(bits),
                            static_cast<float>(upper), device.stream());
  return bits;
}

Tensor relu_bits_backward(const Tensor& grad, const Tensor& bits) {
  const Device device(grad);
  const Tensor result = torch::stable::empty_like(grad);
  maskops::relu_bits_backward(view(result), view(grad), view(bits), device.stream());
  return result;
}

void relu_backward_(Tensor result, const Tensor& grad, const Tensor& gate, const OptionalTensor& addend, double upper) {
  const Device device(grad);
  maskops::relu_backward(view(result), view(grad), view(gate), view(addend), static_cast<float>(upper),
                         device.stream());
}

void add_relu_(Tensor output, const Tensor& residual, double upper) {
  const Device device(output);
  maskops::add_relu(view(output), view(residual), static_cast<float>(upper), device.stream());
}

using Sizes = std::vector<int64_t>;

maskops::Window window_of(const Sizes& kernel_size, const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  maskops::Window window;
  for (int side = 0; side < 2; ++side) {
    window.kernel[side] = static_cast<int>(kernel_size[side]);
    window.stride[side] = static_cast<int>(stride[side]);
    window.padding[side] = static_cast<int>(padding[side]);
    window.dilation[side] = static_cast<int>(dilation[side]);
  }
  return window;
}

// How many windows there are along one side of an image.
int64_t windows(int64_t size, const maskops::Window& window, int side, bool ceil_mode) {
  const int64_t stride = window.stride[side], padding = window.padding[side];
  STD_TORCH_CHECK(size > 0, "max_pool_winners: the image must have entries; got ", size, " along a side");
  const int64_t extent = static_cast<int64_t>(window.dilation[side]) * (window.kernel[side] - 1) + 1;
  STD_TORCH_CHECK(padding >= 0 && 2 * padding <= extent,
                  "max_pool_winners: padding must be at most half of the window of ", extent, "; got ", padding);
  const int64_t room = size + 2 * padding - extent;
  STD_TORCH_CHECK(room >= 0 || (ceil_mode && room + stride > 0), "max_pool_winners: a window of ", extent,
                  " must fit into the padded image; got ", size + 2 * padding);
  int64_t count = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  if (ceil_mode && (count - 1) * stride >= size + padding) --count;  // the last window begins inside the image
  return count;
}

std::tuple<Tensor, Tensor> max_pool_winners(const Tensor& input, Sizes kernel_size, Sizes stride, Sizes padding,
                                            Sizes dilation, bool ceil_mode) {
  const Device device(input);
  const maskops::Window window = window_of(kernel_size, stride, padding, dilation);
  const bool channels_last = suggests_channels_last(input);
  const Tensor dense =
      torch::stable::contiguous(input, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  Sizes sizes = sizes_of(input);
  for (int side = 0; side < 2; ++side) {
    int64_t& size = sizes[sizes.size() - 2 + side];
    size = windows(size, window, side, ceil_mode);
  }
  const Tensor output = empty(input, sizes, input.scalar_type(), channels_last);
  const Tensor winners = empty(input, sizes, ScalarType::Byte, channels_last);
  maskops::max_pool_winners(view(output), view(winners), view(dense), window, channels_last, device.stream());
  return {output, winners};
}

Tensor max_pool_winners_backward(const Tensor& grad, const Tensor& winners, Sizes input_size, Sizes kernel_size,
                                 Sizes stride, Sizes padding, Sizes dilation) {
  const Device device(grad);
  const bool channels_last = !winners.is_contiguous() && is_channels_last(winners);
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  const Tensor dense = torch::stable::contiguous(grad, format), places = torch::stable::contiguous(winners, format);
  const Tensor result = empty(grad, input_size, grad.scalar_type(), channels_last);
  maskops::max_pool_winners_backward(view(result), view(dense), view(places),
                                     window_of(kernel_size, stride, padding, dilation), channels_last, device.stream());
  return result;
}

maskops::DepthwiseFilter depthwise_filter(const Tensor& weight, const OptionalTensor& mask, const OptionalTensor& noise,
                                          const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                          const std::vector<int64_t>& dilation) {
  maskops::DepthwiseFilter filter = {view(weight), view(mask), view(noise), {}, {}, {}};
  for (int d = 0; d < 2; ++d) {
    filter.stride[d] = static_cast<int>(stride[d]);
    filter.padding[d] = static_cast<int>(padding[d]);
    filter.dilation[d] = static_cast<int>(dilation[d]);
  }
  return filter;
}

void depthwise_conv_(Tensor output, const Tensor& input, const Tensor& weight, const OptionalTensor& mask,
                     const OptionalTensor& noise, const OptionalTensor& bias, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const Device device(output);
  maskops::depthwise_conv(view(output), view(input), depthwise_filter(weight, mask, noise, stride, padding, dilation),
                          view(bias), device.stream());
}

void depthwise_conv_input_grad_(Tensor grad_input, const Tensor& grad, const Tensor& weight, const OptionalTensor& mask,
                                const OptionalTensor& noise, std::vector<int64_t> stride, std::vector<int64_t> padding,
                                std::vector<int64_t> dilation) {
  const Device device(grad_input);
  maskops::depthwise_conv_input_grad(view(grad_input), view(grad),
                                     depthwise_filter(weight, mask, noise, stride, padding, dilation), device.stream());
}

void depthwise_conv_weight_grad_(Tensor grad_weight, const Tensor& grad, const Tensor& input,
                                 std::vector<int64_t> stride, std::vector<int64_t> padding,
                                 std::vector<int64_t> dilation) {
  const Device device(grad_weight);
  const auto filter = depthwise_filter(grad_weight, std::nullopt, std::nullopt, stride, padding, dilation);
  const int64_t floats = maskops::depthwise_conv_weight_grad_floats(view(grad), view(input), filter);
  const Tensor parts = torch::stable::new_empty(grad_weight, {floats}, ScalarType::Float);
  maskops::depthwise_conv_weight_grad(view(grad_weight), view(grad), view(input), filter,
                                      static_cast<float*>(parts.data_ptr()), device.stream());
}

}  // namespace

std::vector<Op> layer_ops() {
  return {
      {"relu_bits(Tensor input, float upper) -> (Tensor, Tensor)", TORCH_BOX(&relu_bits)},
      {"relu_bits_(Tensor(a!) input, float upper) -> Tensor", TORCH_BOX(&relu_bits_)},
      {"affine_relu_bits_(Tensor(a!) input, Tensor? scale, Tensor? shift, Tensor? residual, float upper) -> "
       "Tensor",
       TORCH_BOX(&affine_relu_bits_)},
      {"relu_bits_backward(Tensor grad, Tensor bits) -> Tensor", TORCH_BOX(&relu_bits_backward)},
      {"relu_backward_(Tensor(a!) result, Tensor grad, Tensor gate, Tensor? addend, float upper) -> ()",
       TORCH_BOX(&relu_backward_)},
      {"add_relu_(Tensor(a!) output, Tensor residual, float upper) -> ()", TORCH_BOX(&add_relu_)},
      {"max_pool_winners(Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] "
       "dilation, bool ceil_mode) -> (Tensor, Tensor)",
       TORCH_BOX(&max_pool_winners)},
      {"max_pool_winners_backward(Tensor grad, Tensor winners, SymInt[] input_size, SymInt[2] kernel_size, "
       "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation) -> Tensor",
       TORCH_BOX(&max_pool_winners_backward)},
      {"depthwise_conv_(Tensor(a!) output, Tensor input, Tensor weight, Tensor? mask, Tensor? noise, Tensor? bias, "
       "int[2] stride, int[2] padding, int[2] dilation) -> ()",
       TORCH_BOX(&depthwise_conv_)},
      {"depthwise_conv_input_grad_(Tensor(a!) grad_input, Tensor grad, Tensor weight, Tensor? mask, Tensor? "
       "noise, int[2] stride, int[2] padding, int[2] dilation) -> ()",
       TORCH_BOX(&depthwise_conv_input_grad_)},
      {"depthwise_conv_weight_grad_(Tensor(a!) grad_weight, Tensor grad, Tensor input, int[2] stride, int[2] "
       "padding, int[2] dilation) -> ()",
       TORCH_BOX(&depthwise_conv_weight_grad_)},
  };
}

}  // namespace maskops::binding
