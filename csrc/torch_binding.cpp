// The ops as torch sees them, over its stable ABI: tensors become views, outputs are allocated, kernels are launched on
// the current stream of the tensors' device. Python has checked shapes and dtypes.
#include <algorithm>
#include <optional>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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
  result.data = tensor.data_ptr();
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

// Unwritten memory on the device of a tensor.
Tensor empty(const Tensor& like, ScalarType type, int dimensions, const int64_t* sizes, const int64_t* strides) {
  int32_t device_type, device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device));
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
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

}  // namespace

STABLE_TORCH_LIBRARY(maskops_cuda, library) {
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
}

STABLE_TORCH_LIBRARY_IMPL(maskops_cuda, MASKOPS_DISPATCH_KEY, library) {
  library.impl("rescale_to_l1_ball", TORCH_BOX(&rescale_to_l1_ball));
  library.impl("project_onto_l1_ball", TORCH_BOX(&project_onto_l1_ball));
  library.impl("noise_step_", TORCH_BOX(&noise_step_));
  library.impl("prepare_images", TORCH_BOX(&prepare_images));
  library.impl("prepare_images_backward", TORCH_BOX(&prepare_images_backward));
  library.impl("trigger_step_", TORCH_BOX(&trigger_step_));
}
