// The ops as torch sees them, over its stable ABI: tensors become views, outputs are allocated, kernels are launched on
// the current stream of the tensors' device. Python has checked shapes and dtypes.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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

maskops::DType dtype_of(ScalarType type) {
  switch (type) {
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
  result.dtype = dtype_of(tensor.scalar_type());
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

maskops::Number::Type number_type_of(const Tensor& tensor) {
  using Number = maskops::Number;
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Number::float64;
    case ScalarType::Float: return Number::float32;
    case ScalarType::Half: return Number::float16;
    case ScalarType::BFloat16: return Number::bfloat16;
    case ScalarType::Long: return Number::int64;
    case ScalarType::Int: return Number::int32;
    case ScalarType::Short: return Number::int16;
    case ScalarType::Char: return Number::int8;
    case ScalarType::Byte:
    case ScalarType::Bool: return Number::uint8;
    default: STD_TORCH_CHECK(false, "expected a real number"); return Number::float64;
  }
}

// A tensor of one entry.
maskops::Number number(const Tensor& tensor) {
#ifdef CUDA_EMULATOR
  const bool on_host = !emulator::is_device_memory(tensor.data_ptr());
#else
  const bool on_host = tensor.is_cpu();
#endif
  return {tensor.data_ptr(), number_type_of(tensor), on_host};
}

// Unwritten memory on the device of a tensor.
Tensor empty(const Tensor& like, ScalarType type, int dimensions, const int64_t* sizes, const int64_t* strides) {
  int32_t device_type, device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device));
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dimensions, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
      device, &result));
  return Tensor(result);
}

// Bytes for a kernel; none where it needs none.
OptionalTensor workspace(const Tensor& like, int64_t bytes) {
  const int64_t stride = 1;
  return bytes > 0 ? OptionalTensor(empty(like, ScalarType::Byte, 1, &bytes, &stride)) : std::nullopt;
}

void* data_of(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// The strides of a dense batch, whose images have the order of memory that those of another have.
void like_images(const Tensor& other, const int64_t* sizes, int64_t* strides) {
  int order[] = {1, 2, 3};
  // to torch, a tensor of no elements is contiguous as it is
  if (std::find(sizes, sizes + 4, 0) == sizes + 4) {
    std::stable_sort(order, order + 3, [&](int a, int b) { return other.stride(a) > other.stride(b); });
  }
  int64_t stride = 1;
  for (int i = 2; i >= 0; --i) {
    strides[order[i]] = stride;
    stride *= std::max(sizes[order[i]], int64_t{1});
  }
  strides[0] = stride;
}

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
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

// Unwritten memory in the memory order of another tensor, without gaps.
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
  if (!has_gaps) dense.assign(strides.begin(), strides.end());
  return empty(tensor, dtype, dimensions, sizes.data(), dense.data());
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

// What all mask steps share, and the memory that it needs.
struct MaskStep {
  maskops::MaskStepArguments arguments;
  OptionalTensor workspace;

  MaskStep(const Tensor& mask, const Tensor& grad, const OptionalTensor& weight, const OptionalTensor& effective,
           double l1, double toward, const Tensor& lower, double upper, const OptionalTensor& totals)
      : arguments{view(mask), view(grad), view(weight), view(effective), l1, toward, {}, {}, upper, view(totals),
                  nullptr} {
    if (lower.numel() == 1) {
      arguments.lower = number(lower);
    } else {
      arguments.lower_of_each = view(lower);
    }
    if (totals) make_workspace(mask);
  }

  maskops::AdamArguments adam(const Tensor& mask, const Tensor& step, const Tensor& lr, double beta1, double beta2,
                              double eps) {
    const maskops::AdamArguments result = {number(step), number(lr), beta1, beta2, eps};
    if (!result.step.on_host || !result.lr.on_host) make_workspace(mask);
    return result;
  }

 private:
  void make_workspace(const Tensor& mask) {
    if (workspace) return;
    workspace = torch::stable::new_empty(mask, {maskops::mask_step_workspace()}, ScalarType::Double);
    arguments.workspace = static_cast<double*>(workspace->data_ptr());
  }
};

void mask_adam_step_(Tensor mask, const Tensor& grad, const OptionalTensor& weight, OptionalTensor effective,
                     Tensor exp_avg, Tensor exp_avg_sq, Tensor step, const Tensor& lr, double beta1, double beta2,
                     double eps, double l1, double toward, const Tensor& lower, double upper, OptionalTensor totals) {
  const Device device(mask);
  MaskStep all(mask, grad, weight, effective, l1, toward, lower, upper, totals);
  const maskops::AdamArguments adam = all.adam(mask, step, lr, beta1, beta2, eps);
  maskops::mask_adam_step(all.arguments, view(exp_avg), view(exp_avg_sq), adam, device.stream());
}

void mask_adam8bit_step_(Tensor mask, const Tensor& grad, const OptionalTensor& weight, OptionalTensor effective,
                         Tensor exp_avg, Tensor exp_avg_scale, Tensor exp_avg_sq, Tensor exp_avg_sq_scale, Tensor step,
                         const Tensor& lr, double beta1, double beta2, double eps, double l1, double toward,
                         const Tensor& lower, double upper, OptionalTensor totals) {
  STD_TORCH_CHECK(mask.dim() == 1, "mask_adam8bit_step_: expected flat tensors; got ", mask.dim(), " dimensions");
  const Device device(mask);
  MaskStep all(mask, grad, weight, effective, l1, toward, lower, upper, totals);
  const maskops::AdamArguments adam = all.adam(mask, step, lr, beta1, beta2, eps);
  maskops::mask_adam8bit_step(all.arguments, view(exp_avg), view(exp_avg_scale), view(exp_avg_sq),
                              view(exp_avg_sq_scale), adam, device.stream());
}

void mask_sgd_step_(Tensor mask, const Tensor& grad, const OptionalTensor& weight, OptionalTensor effective,
                    OptionalTensor momentum_buffer, const Tensor& lr, double momentum, double l1, double toward,
                    const Tensor& lower, double upper, OptionalTensor totals) {
  const Device device(mask);
  const MaskStep all(mask, grad, weight, effective, l1, toward, lower, upper, totals);
  maskops::mask_sgd_step(all.arguments, view(momentum_buffer), number(lr), momentum, device.stream());
}
Tensor into_l1_ball(const Tensor& input, double radius, bool project) {
  const Device device(input);
  const int64_t rows = input.size(0), entries = input.size(1);
  const int64_t sizes[] = {rows, entries}, down = input.stride(0), along = input.stride(1);
  // as in torch's own elementwise results, the order of memory is the input's
  const bool by_columns = down != 0 && along != 0 && (down < along || (down == along && rows < entries));
  const int64_t strides[] = {by_columns ? 1 : std::max(entries, int64_t{1}),
                             by_columns ? std::max(rows, int64_t{1}) : 1};
  const Tensor output = empty(input, input.scalar_type(), 2, sizes, strides);
  const OptionalTensor space = workspace(input, maskops::l1_ball_workspace(rows, entries));
  maskops::l1_ball(view(output), view(input), data_of(space), radius, project, device.stream());
  return output;
}

Tensor rescale_to_l1_ball(const Tensor& input, double radius) { return into_l1_ball(input, radius, false); }

Tensor project_onto_l1_ball(const Tensor& input, double radius) { return into_l1_ball(input, radius, true); }

void noise_step_(Tensor noise, const Tensor& grad, const OptionalTensor& weight, double step_size, double bound) {
  const Device device(noise);
  maskops::noise_step(view(noise), view(grad), view(weight), static_cast<float>(step_size), static_cast<float>(bound),
                      device.stream());
}

maskops::Bounds bounds(std::optional<double> low, std::optional<double> high) {
  maskops::Bounds result;
  if (low) result.low = static_cast<float>(*low);
  if (high) result.high = static_cast<float>(*high);
  return result;
}

maskops::Stored stored(const OptionalTensor& images, const OptionalTensor& index) {
  maskops::Stored result;
  result.images = view(images);
  if (index) {
    result.index = static_cast<const int64_t*>(index->data_ptr());
    result.index_stride = index->stride(0);
  }
  return result;
}

Tensor prepare_images(const Tensor& images, const OptionalTensor& index, const OptionalTensor& trigger,
                      std::optional<double> low, std::optional<double> high, const OptionalTensor& mean,
                      const OptionalTensor& std, ScalarType dtype) {
  const Device device(images);
  const int64_t sizes[] = {index ? index->size(0) : images.size(0), images.size(1), images.size(2), images.size(3)};
  int64_t strides[4];
  like_images(images, sizes, strides);
  const Tensor output = empty(images, dtype, 4, sizes, strides);
  maskops::prepare_images(view(output), stored(images, index), view(trigger), bounds(low, high), view(mean), view(std),
                          device.stream());
  return output;
}

Tensor prepare_images_backward(const Tensor& grad, const OptionalTensor& images, const OptionalTensor& index,
                               const Tensor& trigger, std::optional<double> low, std::optional<double> high,
                               const OptionalTensor& std) {
  const Device device(grad);
  const int64_t sizes[] = {1, grad.size(1), grad.size(2), grad.size(3)};
  int64_t strides[4];
  like_images(grad, sizes, strides);
  const int first = 4 - static_cast<int>(trigger.dim());
  const Tensor output = empty(grad, trigger.scalar_type(), 4 - first, sizes + first, strides + first);
  const bool bounded = low || high;
  maskops::prepare_images_backward(view(output), view(grad), bounded ? stored(images, index) : maskops::Stored(),
                                   view(trigger), bounds(low, high), view(std), device.stream());
  return output;
}

void trigger_step_(Tensor trigger, const Tensor& grad, double step_size, std::optional<double> radius,
                   std::optional<double> low, std::optional<double> high) {
  const Device device(trigger);
  const double ball = radius.value_or(INFINITY);
  const OptionalTensor space =
      workspace(grad, maskops::trigger_step_workspace(grad.size(0), trigger.numel(), ball));
  maskops::trigger_step(view(trigger), view(grad), data_of(space), static_cast<float>(step_size), ball,
                        bounds(low, high), device.stream());
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
  library.def(
      "mask_adam_step_(Tensor(a!) mask, Tensor grad, Tensor? weight, Tensor(b!)? effective, Tensor(c!) exp_avg, "
      "Tensor(d!) exp_avg_sq, Tensor(e!) step, Tensor lr, float beta1, float beta2, float eps, float l1, float toward, "
      "Tensor lower, float upper, Tensor(f!)? totals=None) -> ()");
  library.def(
      "mask_adam8bit_step_(Tensor(a!) mask, Tensor grad, Tensor? weight, Tensor(b!)? effective, Tensor(c!) exp_avg, "
      "Tensor(d!) exp_avg_scale, Tensor(e!) exp_avg_sq, Tensor(f!) exp_avg_sq_scale, Tensor(g!) step, Tensor lr, "
      "float beta1, float beta2, float eps, float l1, float toward, Tensor lower, float upper, "
      "Tensor(h!)? totals=None) -> ()");
  library.def(
      "mask_sgd_step_(Tensor(a!) mask, Tensor grad, Tensor? weight, Tensor(b!)? effective, "
      "Tensor(c!)? momentum_buffer, Tensor lr, float momentum, float l1, float toward, Tensor lower, float upper, "
      "Tensor(d!)? totals=None) -> ()");
  library.def("rescale_to_l1_ball(Tensor input, float radius) -> Tensor");
  library.def("project_onto_l1_ball(Tensor input, float radius) -> Tensor");
  library.def("noise_step_(Tensor(a!) noise, Tensor grad, Tensor? weight, float step_size, float bound) -> ()");
  library.def(
      "prepare_images(Tensor images, Tensor? index, Tensor? trigger, float? low, float? high, Tensor? mean, "
      "Tensor? std, ScalarType dtype) -> Tensor");
  library.def(
      "prepare_images_backward(Tensor grad, Tensor? images, Tensor? index, Tensor trigger, float? low, float? high, "
      "Tensor? std) -> Tensor");
  library.def(
      "trigger_step_(Tensor(a!) trigger, Tensor grad, float step_size, float? radius, float? low, float? high) -> ()");
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
  library.impl("effective_weight", TORCH_BOX(&effective_weight));
  library.impl("effective_weight_backward", TORCH_BOX(&effective_weight_backward));
  library.impl("effective_weights", TORCH_BOX(&effective_weights));
  library.impl("effective_weights_backward", TORCH_BOX(&effective_weights_backward));
  library.impl("arena_effective_weight_", TORCH_BOX(&arena_effective_weight_));
  library.impl("arena_mask_grad", TORCH_BOX(&arena_mask_grad));
  library.impl("mask_adam_step_", TORCH_BOX(&mask_adam_step_));
  library.impl("mask_adam8bit_step_", TORCH_BOX(&mask_adam8bit_step_));
  library.impl("mask_sgd_step_", TORCH_BOX(&mask_sgd_step_));
  library.impl("rescale_to_l1_ball", TORCH_BOX(&rescale_to_l1_ball));
  library.impl("project_onto_l1_ball", TORCH_BOX(&project_onto_l1_ball));
  library.impl("noise_step_", TORCH_BOX(&noise_step_));
  library.impl("prepare_images", TORCH_BOX(&prepare_images));
  library.impl("prepare_images_backward", TORCH_BOX(&prepare_images_backward));
  library.impl("trigger_step_", TORCH_BOX(&trigger_step_));
  library.impl("relu_bits", TORCH_BOX(&relu_bits));
  library.impl("relu_bits_", TORCH_BOX(&relu_bits_));
  library.impl("affine_relu_bits_", TORCH_BOX(&affine_relu_bits_));
  library.impl("relu_bits_backward", TORCH_BOX(&relu_bits_backward));
  library.impl("max_pool_winners", TORCH_BOX(&max_pool_winners));
  library.impl("max_pool_winners_backward", TORCH_BOX(&max_pool_winners_backward));
}
