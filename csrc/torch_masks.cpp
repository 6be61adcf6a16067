// The ops on weights and masks: effective weights, their gradients, and the steps of masks and their noise.
#include "torch_ops.h"
#include "torch_tensors.h"

namespace maskops::binding {
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
           double l1, double toward, const Tensor& lower, double upper, const OptionalTensor& totals,
           std::optional<int64_t> stochastic_from = std::nullopt)
      : arguments{view(mask), view(grad), view(weight), view(effective), l1,      toward,
                  {},         {},         upper,        view(totals),    nullptr, stochastic_from.value_or(-1)} {
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
                     double eps, double l1, double toward, const Tensor& lower, double upper, OptionalTensor totals,
                     std::optional<int64_t> stochastic_from) {
  const Device device(mask);
  MaskStep all(mask, grad, weight, effective, l1, toward, lower, upper, totals, stochastic_from);
  const maskops::AdamArguments adam = all.adam(mask, step, lr, beta1, beta2, eps);
  maskops::mask_adam_step(all.arguments, view(exp_avg), view(exp_avg_sq), adam, device.stream());
}

void mask_adam8bit_step_(Tensor mask, const Tensor& grad, const OptionalTensor& weight, OptionalTensor effective,
                         Tensor exp_avg, Tensor exp_avg_scale, Tensor exp_avg_sq, Tensor exp_avg_sq_scale, Tensor step,
                         const Tensor& lr, double beta1, double beta2, double eps, double l1, double toward,
                         const Tensor& lower, double upper, OptionalTensor totals,
                         std::optional<int64_t> stochastic_from) {
  STD_TORCH_CHECK(mask.dim() == 1, "mask_adam8bit_step_: expected flat tensors; got ", mask.dim(), " dimensions");
  const Device device(mask);
  MaskStep all(mask, grad, weight, effective, l1, toward, lower, upper, totals, stochastic_from);
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

void noise_step_(Tensor noise, const Tensor& grad, const OptionalTensor& weight, double step_size, double bound) {
  const Device device(noise);
  maskops::noise_step(view(noise), view(grad), view(weight), static_cast<float>(step_size), static_cast<float>(bound),
                      device.stream());
}

}  // namespace

std::vector<Op> mask_ops() {
  return {
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
       "l1, float toward, Tensor lower, float upper, Tensor(f!)? totals=None, int? stochastic_from=None) -> ()",
       TORCH_BOX(&mask_adam_step_)},
      {"mask_adam8bit_step_(Tensor(a!) mask, Tensor grad, Tensor? weight, Tensor(b!)? effective, Tensor(c!) "
       "exp_avg, Tensor(d!) exp_avg_scale, Tensor(e!) exp_avg_sq, Tensor(f!) exp_avg_sq_scale, Tensor(g!) step, "
       "Tensor lr, float beta1, float beta2, float eps, float l1, float toward, Tensor lower, float upper, "
       "Tensor(h!)? totals=None, int? stochastic_from=None) -> ()",
       TORCH_BOX(&mask_adam8bit_step_)},
      {"mask_sgd_step_(Tensor(a!) mask, Tensor grad, Tensor? weight, Tensor(b!)? effective, Tensor(c!)? "
       "momentum_buffer, Tensor lr, float momentum, float l1, float toward, Tensor lower, float upper, "
       "Tensor(d!)? totals=None) -> ()",
       TORCH_BOX(&mask_sgd_step_)},
      {"noise_step_(Tensor(a!) noise, Tensor grad, Tensor? weight, float step_size, float bound) -> ()",
       TORCH_BOX(&noise_step_)},
  };
}

}  // namespace maskops::binding
