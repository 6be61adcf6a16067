// The ops as torch sees them, over its stable ABI: tensors become views, outputs are allocated, kernels are launched on
// the current stream of the tensors' device. Python has checked shapes and dtypes.
#include <optional>

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

void noise_step_(Tensor noise, const Tensor& grad, const OptionalTensor& weight, double step_size, double bound) {
  const Device device(noise);
  maskops::noise_step(view(noise), view(grad), view(weight), static_cast<float>(step_size), static_cast<float>(bound),
                      device.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY(maskops_cuda, library) {
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
  library.def("noise_step_(Tensor(a!) noise, Tensor grad, Tensor? weight, float step_size, float bound) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(maskops_cuda, MASKOPS_DISPATCH_KEY, library) {
  library.impl("mask_adam_step_", TORCH_BOX(&mask_adam_step_));
  library.impl("mask_adam8bit_step_", TORCH_BOX(&mask_adam8bit_step_));
  library.impl("mask_sgd_step_", TORCH_BOX(&mask_sgd_step_));
  library.impl("noise_step_", TORCH_BOX(&noise_step_));
}
