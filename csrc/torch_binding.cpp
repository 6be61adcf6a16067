// The ops as torch sees them, over its stable ABI: tensors become views, outputs are allocated, kernels are launched on
// the current stream of the tensors' device. Python has checked shapes and dtypes.
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

// Weak, so that the module loads where torch has no CUDA, and this is never called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using maskops::View;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

maskops::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return maskops::DType::float32;
    case ScalarType::Half: return maskops::DType::float16;
    case ScalarType::BFloat16: return maskops::DType::bfloat16;
    case ScalarType::Byte: return maskops::DType::uint8;
    default: STD_TORCH_CHECK(false, "expected float32, float16, bfloat16 or uint8"); return maskops::DType::float32;
  }
}

View view(const Tensor& tensor) {
  View result;
  result.data = tensor.data_ptr();
  result.dtype = dtype_of(tensor);
  result.dimensions = static_cast<int>(tensor.dim());
  STD_TORCH_CHECK(result.dimensions <= maskops::most_dimensions, "expected at most ", maskops::most_dimensions,
                  " dimensions; got ", result.dimensions);
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (int d = 0; d < result.dimensions; ++d) {
    result.sizes[d] = sizes[d];
    result.strides[d] = strides[d];
  }
  return result;
}

View view(const OptionalTensor& tensor) { return tensor ? view(*tensor) : View(); }

OptionalTensor as_floats(const OptionalTensor& tensor) {
  if (!tensor) return tensor;
  return torch::stable::contiguous(torch::stable::to(*tensor, ScalarType::Float));
}

// Four dimensions without gaps, the channels innermost, then columns, rows and images.
bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) return false;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// Torch's guess at the layout that strides are meant for, with gaps, too; not so where sizes of 1 leave it open.
bool suggests_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.strides()[1] == 0) return false;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t least = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < least || (d == 0 && least == strides[1])) return false;
    least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  }
  return true;
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype, bool channels_last) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// The device of a tensor made the current one, and its current stream.
class Device {
 public:
  explicit Device(const Tensor& tensor) {
    if (!tensor.is_cuda()) return;
    guard_.emplace(tensor.get_device_index());
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

void noise_step_(Tensor noise, const Tensor& grad, const OptionalTensor& weight, double step_size, double bound) {
  const Device device(noise);
  maskops::noise_step(view(noise), view(grad), view(weight), static_cast<float>(step_size), static_cast<float>(bound),
                      device.stream());
}

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

}  // namespace

STABLE_TORCH_LIBRARY(maskops_cuda, library) {
  library.def("noise_step_(Tensor(a!) noise, Tensor grad, Tensor? weight, float step_size, float bound) -> ()");
  library.def("relu_bits(Tensor input, float upper) -> (Tensor, Tensor)");
  library.def("relu_bits_(Tensor(a!) input, float upper) -> Tensor");
  library.def(
      "affine_relu_bits_(Tensor(a!) input, Tensor? scale, Tensor? shift, Tensor? residual, float upper) -> Tensor");
  library.def("relu_bits_backward(Tensor grad, Tensor bits) -> Tensor");
  library.def(
      "max_pool_winners(Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
      "bool ceil_mode) -> (Tensor, Tensor)");
  library.def(
      "max_pool_winners_backward(Tensor grad, Tensor winners, SymInt[] input_size, SymInt[2] kernel_size, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(maskops_cuda, MASKOPS_DISPATCH_KEY, library) {
  library.impl("noise_step_", TORCH_BOX(&noise_step_));
  library.impl("relu_bits", TORCH_BOX(&relu_bits));
  library.impl("relu_bits_", TORCH_BOX(&relu_bits_));
  library.impl("affine_relu_bits_", TORCH_BOX(&affine_relu_bits_));
  library.impl("relu_bits_backward", TORCH_BOX(&relu_bits_backward));
  library.impl("max_pool_winners", TORCH_BOX(&max_pool_winners));
  library.impl("max_pool_winners_backward", TORCH_BOX(&max_pool_winners_backward));
}
