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

}  // namespace

STABLE_TORCH_LIBRARY(maskops_cuda, library) {
  library.def("noise_step_(Tensor(a!) noise, Tensor grad, Tensor? weight, float step_size, float bound) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(maskops_cuda, MASKOPS_DISPATCH_KEY, library) {
  library.impl("noise_step_", TORCH_BOX(&noise_step_));
}
