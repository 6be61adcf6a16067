// The ops as torch sees them: outputs are allocated, kernels are launched on the current stream of the tensors' device.
// Python has checked shapes and dtypes.
#include <cmath>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "torch_tensors.h"

namespace {

Tensor effective_weight(const Tensor& weight, const Tensor& mask, const OptionalTensor& noise, ScalarType dtype) {
  if (dtype == ScalarType::Double)
    return torch::stable::to(effective_weight(weight, mask, noise, ScalarType::Float), dtype);
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
    const View result = view(grads.back());
    const OptionalTensor space = workspace(weight, maskops::factor_grad_workspace(result, view(weight)));
    maskops::factor_grad(result, view(grad), view(weight), data_of(space), device.stream());
  }
  return grads;
}

std::vector<Tensor> effective_weights(std::vector<Tensor> weights, std::vector<Tensor> masks,
                                      std::vector<Tensor> noises, std::vector<Tensor> scales, ScalarType dtype) {
  if (dtype == ScalarType::Double) {
    std::vector<Tensor> results = effective_weights(weights, masks, noises, scales, ScalarType::Float);
    for (Tensor& result : results) result = torch::stable::to(result, dtype);
    return results;
  }
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
    if (factor.scalar_type() == ScalarType::Byte) {  // masks of bytes have no gradient
      results.push_back(torch::stable::new_zeros(factor, factor.sizes()));
      continue;
    }
    const bool whole = factor.numel() == weights[layer].numel();
    results.push_back(empty_like(whole ? grads[i] : factor, factor.scalar_type()));
    View scale;
    if (!scales.empty()) scale = view(scales[layer]);
    const View other = i < count && !noises.empty() ? view(grads[count + i]) : View();
    views.push_back({view(results[i]), view(grads[i]), other, view(weights[layer]), scale});
  }
  const OptionalTensor space = workspace(weights[0], maskops::factor_grads_workspace(views));
  maskops::factor_grads(views, data_of(space), device.stream());
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
  const maskops::ArenaTable rows = arena_table(table, layers);
  const OptionalTensor space = workspace(mask, maskops::arena_mask_grad_workspace(rows));
  maskops::arena_mask_grad(rows, view(grads), view(grad), view(weight), data_of(space), device.stream());
  return grads;
}

// What all mask steps share, and the memory that it needs.
struct MaskStep {
  maskops::MaskStepArguments arguments;
  OptionalTensor workspace;

  MaskStep(const Tensor& mask, const Tensor& grad, const OptionalTensor& weight, const OptionalTensor& effective,
           double l1, double toward, const Tensor& lower, double upper, const OptionalTensor& totals)
      : arguments{view(mask), view(grad), view(weight), view(effective), l1,     toward,
                  {},         {},         upper,        view(totals),    nullptr} {
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
  const OptionalTensor space = workspace(grad, maskops::trigger_step_workspace(grad.size(0), trigger.numel(), ball));
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

struct Op {
  const char* schema;
  void (*call)(StableIValue*, uint64_t, uint64_t);
};

const Op all_ops[] = {
    {"effective_weight(Tensor weight, Tensor mask, Tensor? noise, ScalarType dtype) -> Tensor",
     TORCH_BOX(&effective_weight)},
    {"effective_weight_backward(Tensor grad, Tensor weight, Tensor mask, Tensor? noise, bool[3] needs) -> "
     "Tensor[]",
     TORCH_BOX(&effective_weight_backward)},
    {"effective_weights(Tensor[] weights, Tensor[] masks, Tensor[] noises, Tensor[] scales, ScalarType dtype) "
     "-> Tensor[]",
     TORCH_BOX(&effective_weights)},
    {"effective_weights_backward(Tensor[] grads, Tensor[] weights, Tensor[] masks, Tensor[] noises, Tensor[] "
     "scales) -> Tensor[]",
     TORCH_BOX(&effective_weights_backward)},
    {"arena_effective_weight_(Tensor(a!) effective, Tensor weight, Tensor mask, Tensor? noise, Tensor table, "
     "int[] layers) -> ()",
     TORCH_BOX(&arena_effective_weight_)},
    {"arena_mask_grad(Tensor grad, Tensor weight, Tensor mask, Tensor table, int[] layers) -> Tensor",
     TORCH_BOX(&arena_mask_grad)},
    {"mask_adam_step_(Tensor(a!) mask, Tensor grad, Tensor? weight, Tensor(b!)? effective, Tensor(c!) "
     "exp_avg, Tensor(d!) exp_avg_sq, Tensor(e!) step, Tensor lr, float beta1, float beta2, float eps, float "
     "l1, float toward, Tensor lower, float upper, Tensor(f!)? totals=None) -> ()",
     TORCH_BOX(&mask_adam_step_)},
    {"mask_adam8bit_step_(Tensor(a!) mask, Tensor grad, Tensor? weight, Tensor(b!)? effective, Tensor(c!) "
     "exp_avg, Tensor(d!) exp_avg_scale, Tensor(e!) exp_avg_sq, Tensor(f!) exp_avg_sq_scale, Tensor(g!) step, "
     "Tensor lr, float beta1, float beta2, float eps, float l1, float toward, Tensor lower, float upper, "
     "Tensor(h!)? totals=None) -> ()",
     TORCH_BOX(&mask_adam8bit_step_)},
    {"mask_sgd_step_(Tensor(a!) mask, Tensor grad, Tensor? weight, Tensor(b!)? effective, Tensor(c!)? "
     "momentum_buffer, Tensor lr, float momentum, float l1, float toward, Tensor lower, float upper, "
     "Tensor(d!)? totals=None) -> ()",
     TORCH_BOX(&mask_sgd_step_)},
    {"rescale_to_l1_ball(Tensor input, float radius) -> Tensor", TORCH_BOX(&rescale_to_l1_ball)},
    {"project_onto_l1_ball(Tensor input, float radius) -> Tensor", TORCH_BOX(&project_onto_l1_ball)},
    {"noise_step_(Tensor(a!) noise, Tensor grad, Tensor? weight, float step_size, float bound) -> ()",
     TORCH_BOX(&noise_step_)},
    {"prepare_images(Tensor images, Tensor? index, Tensor? trigger, float? low, float? high, Tensor? mean, "
     "Tensor? std, ScalarType dtype) -> Tensor",
     TORCH_BOX(&prepare_images)},
    {"prepare_images_backward(Tensor grad, Tensor? images, Tensor? index, Tensor trigger, float? low, float? "
     "high, Tensor? std) -> Tensor",
     TORCH_BOX(&prepare_images_backward)},
    {"trigger_step_(Tensor(a!) trigger, Tensor grad, float step_size, float? radius, float? low, float? high) "
     "-> ()",
     TORCH_BOX(&trigger_step_)},
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

}  // namespace

STABLE_TORCH_LIBRARY(maskops_cuda, library) {
  for (const Op& op : all_ops) library.def(op.schema);
}

STABLE_TORCH_LIBRARY_IMPL(maskops_cuda, MASKOPS_DISPATCH_KEY, library) {
  for (const Op& op : all_ops) {
    const std::string schema = op.schema;
    library.impl(schema.substr(0, schema.find('(')).c_str(), op.call);
  }
}
