// The ops as torch sees them, over its stable ABI: tensors become views, outputs are allocated, kernels are launched on
// the current stream of the tensors' device. Python has checked shapes and dtypes.
#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

// Weak, so that the module loads where torch has no CUDA, and this is never called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using maskops::View;
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
  // a tensor of no elements has no memory, but it isn't missing
  static char nothing[16];
  result.data = tensor.numel() == 0 ? nothing : tensor.data_ptr();
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

// The device of a tensor made the current one, and its current stream.
class Device {
 public:
  explicit Device(const Tensor& tensor) {
    if (!tensor.is_cuda()) return;
    guard_.emplace(tensor.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

// Unwritten memory in the memory order of another tensor, without gaps. Where it is contiguous whatever the strides of its
// dimensions of one entry, they are those of a contiguous one, as of what torch's own ops return.
Tensor empty_like(const Tensor& tensor, ScalarType dtype) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int dimensions = static_cast<int>(tensor.dim());
  std::vector<int> order(dimensions);
  std::iota(order.begin(), order.end(), 0);
  // from the innermost to the outermost dimension; of two alike, the last one is the inner one
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return strides[a] != strides[b] ? strides[a] < strides[b] : a > b;
  });
  std::vector<int64_t> dense(dimensions);
  int64_t step = 1;
  bool has_gaps = false;
  for (int d : order) {
    dense[d] = step;
    has_gaps = has_gaps || (sizes[d] != 1 && strides[d] != step);
    step *= sizes[d];
  }
  if (tensor.is_contiguous()) {
    step = 1;
    for (int d = dimensions - 1; d >= 0; --d) {
      dense[d] = step;
      step *= std::max<int64_t>(sizes[d], 1);
    }
  } else if (!has_gaps) {
    dense.assign(strides.begin(), strides.end());
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dimensions, sizes.data(), dense.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(tensor.device().type())), tensor.get_device_index(),
      &handle));
  return Tensor(handle);
}

Tensor effective_weight(const Tensor& weight, const Tensor& mask, const OptionalTensor& noise, ScalarType dtype) {
  if (dtype == ScalarType::Double) return torch::stable::to(effective_weight(weight, mask, noise, ScalarType::Float), dtype);
  const Device device(weight);
  Tensor effective = empty_like(weight, dtype);
  maskops::effective_weight(view(effective), view(weight), view(mask), view(noise), device.stream());
  return effective;
}

std::vector<Tensor> effective_weight_backward(const Tensor& grad, const Tensor& weight, const Tensor& mask,
                                              const OptionalTensor& noise, std::vector<bool> needs) {
  const Device device(weight);
  std::vector<Tensor> grads;
  if (needs[0]) {
    grads.push_back(empty_like(grad, weight.scalar_type()));
    maskops::effective_weight(view(grads.back()), view(grad), view(mask), view(noise), device.stream());
  }
  for (const Tensor* factor : {needs[1] ? &mask : nullptr, needs[2] ? &*noise : nullptr}) {
    if (!factor) continue;
    const bool whole = factor->numel() == weight.numel();
    grads.push_back(empty_like(whole ? grad : *factor, factor->scalar_type()));
    maskops::factor_grad(view(grads.back()), view(grad), view(weight), device.stream());
  }
  return grads;
}

std::vector<Tensor> effective_weights(std::vector<Tensor> weights, std::vector<Tensor> masks,
                                      std::vector<Tensor> noises, std::vector<Tensor> scales, ScalarType dtype) {
  const Device device(weights[0]);
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size() * (noises.empty() ? 1 : 2); ++i) {
    results.push_back(empty_like(weights[i % weights.size()], dtype));
  }
  std::vector<maskops::WeightViews> views(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    views[i] = {view(results[i]), {}, view(weights[i]), view(masks[i]), {}, {}};
    if (!scales.empty()) views[i].scale = view(scales[i]);
    if (noises.empty()) continue;
    views[i].perturbed = view(results[weights.size() + i]);
    views[i].noise = view(noises[i]);
  }
  maskops::effective_weights(views, device.stream());
  return results;
}

std::vector<Tensor> effective_weights_backward(std::vector<Tensor> grads, std::vector<Tensor> weights,
                                               std::vector<Tensor> masks, std::vector<Tensor> noises,
                                               std::vector<Tensor> scales) {
  const Device device(weights[0]);
  const size_t count = weights.size();
  std::vector<Tensor> results;
  std::vector<maskops::FactorViews> views;
  for (size_t i = 0; i < count + noises.size(); ++i) {
    const size_t layer = i % count;
    const Tensor& factor = i < count ? masks[i] : noises[layer];
    const bool whole = factor.numel() == weights[layer].numel();
    results.push_back(empty_like(whole ? grads[i] : factor, factor.scalar_type()));
    View scale;
    if (!scales.empty()) scale = view(scales[layer]);
    const View other = i < count && !noises.empty() ? view(grads[count + i]) : View();
    views.push_back({view(results[i]), view(grads[i]), other, view(weights[layer]), scale});
  }
  maskops::factor_grads(views, device.stream());
  return results;
}

maskops::ArenaTable arena_table(const Tensor& table, const std::vector<int64_t>& layers) {
  const int rows = static_cast<int>(table.size(0));
  return {static_cast<const int64_t*>(table.data_ptr()), layers.data(), rows, static_cast<int>(table.size(1))};
}

void arena_effective_weight_(Tensor effective, const Tensor& weight, const Tensor& mask, const OptionalTensor& noise,
                             const Tensor& table, std::vector<int64_t> layers) {
  const Device device(weight);
  maskops::arena_effective_weight(arena_table(table, layers), view(effective), view(weight), view(mask), view(noise),
                                  device.stream());
}

Tensor arena_mask_grad(const Tensor& grad, const Tensor& weight, const Tensor& mask, const Tensor& table,
                       std::vector<int64_t> layers) {
  const Device device(weight);
  Tensor grads = empty_like(mask, mask.scalar_type());
  torch::stable::zero_(grads);
  maskops::arena_mask_grad(arena_table(table, layers), view(grads), view(grad), view(weight), device.stream());
  return grads;
}

void noise_step_(Tensor noise, const Tensor& grad, const OptionalTensor& weight, double step_size, double bound) {
  const Device device(noise);
  maskops::noise_step(view(noise), view(grad), view(weight), static_cast<float>(step_size), static_cast<float>(bound),
                      device.stream());
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

void depthwise_conv_(Tensor output, const Tensor& input, const Tensor& weight, const Tensor& mask,
                     const OptionalTensor& noise, const OptionalTensor& bias, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const Device device(output);
  maskops::depthwise_conv(view(output), view(input), depthwise_filter(weight, mask, noise, stride, padding, dilation),
                          view(bias), device.stream());
}

void depthwise_conv_input_grad_(Tensor grad_input, const Tensor& grad, const Tensor& weight, const Tensor& mask,
                                const OptionalTensor& noise, std::vector<int64_t> stride,
                                std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const Device device(grad_input);
  maskops::depthwise_conv_input_grad(view(grad_input), view(grad),
                                     depthwise_filter(weight, mask, noise, stride, padding, dilation),
                                     device.stream());
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

STABLE_TORCH_LIBRARY(maskops_cuda, library) {
  library.def("effective_weight(Tensor weight, Tensor mask, Tensor? noise, ScalarType dtype) -> Tensor");
  library.def(
      "effective_weight_backward(Tensor grad, Tensor weight, Tensor mask, Tensor? noise, bool[3] needs) -> Tensor[]");
  library.def(
      "effective_weights(Tensor[] weights, Tensor[] masks, Tensor[] noises, Tensor[] scales, ScalarType dtype) -> "
      "Tensor[]");
  library.def(
      "effective_weights_backward(Tensor[] grads, Tensor[] weights, Tensor[] masks, Tensor[] noises, Tensor[] scales) "
      "-> Tensor[]");
  library.def(
      "arena_effective_weight_(Tensor(a!) effective, Tensor weight, Tensor mask, Tensor? noise, Tensor table, "
      "int[] layers) -> ()");
  library.def("arena_mask_grad(Tensor grad, Tensor weight, Tensor mask, Tensor table, int[] layers) -> Tensor");
  library.def("noise_step_(Tensor(a!) noise, Tensor grad, Tensor? weight, float step_size, float bound) -> ()");
  library.def(
      "depthwise_conv_(Tensor(a!) output, Tensor input, Tensor weight, Tensor mask, Tensor? noise, Tensor? bias, "
      "int[2] stride, int[2] padding, int[2] dilation) -> ()");
  library.def(
      "depthwise_conv_input_grad_(Tensor(a!) grad_input, Tensor grad, Tensor weight, Tensor mask, Tensor? noise, "
      "int[2] stride, int[2] padding, int[2] dilation) -> ()");
  library.def(
      "depthwise_conv_weight_grad_(Tensor(a!) grad_weight, Tensor grad, Tensor input, int[2] stride, int[2] padding, "
      "int[2] dilation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(maskops_cuda, MASKOPS_DISPATCH_KEY, library) {
  library.impl("effective_weight", TORCH_BOX(&effective_weight));
  library.impl("effective_weight_backward", TORCH_BOX(&effective_weight_backward));
  library.impl("effective_weights", TORCH_BOX(&effective_weights));
  library.impl("effective_weights_backward", TORCH_BOX(&effective_weights_backward));
  library.impl("arena_effective_weight_", TORCH_BOX(&arena_effective_weight_));
  library.impl("arena_mask_grad", TORCH_BOX(&arena_mask_grad));
  library.impl("noise_step_", TORCH_BOX(&noise_step_));
  library.impl("depthwise_conv_", TORCH_BOX(&depthwise_conv_));
  library.impl("depthwise_conv_input_grad_", TORCH_BOX(&depthwise_conv_input_grad_));
  library.impl("depthwise_conv_weight_grad_", TORCH_BOX(&depthwise_conv_weight_grad_));
}
