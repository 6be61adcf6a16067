// The ops on images and triggers.
#include <cmath>

#include "torch_ops.h"
#include "torch_tensors.h"

namespace maskops::binding {
namespace {

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

}  // namespace

std::vector<Op> image_ops() {
  return {
      {"prepare_images(Tensor images, Tensor? index, Tensor? trigger, float? low, float? high, Tensor? mean, "
       "Tensor? std, ScalarType dtype) -> Tensor",
       TORCH_BOX(&prepare_images)},
      {"prepare_images_backward(Tensor grad, Tensor? images, Tensor? index, Tensor trigger, float? low, float? "
       "high, Tensor? std) -> Tensor",
       TORCH_BOX(&prepare_images_backward)},
      {"trigger_step_(Tensor(a!) trigger, Tensor grad, float step_size, float? radius, float? low, float? high) "
       "-> ()",
       TORCH_BOX(&trigger_step_)},
      {"rescale_to_l1_ball(Tensor input, float radius) -> Tensor", TORCH_BOX(&rescale_to_l1_ball)},
      {"project_onto_l1_ball(Tensor input, float radius) -> Tensor", TORCH_BOX(&project_onto_l1_ball)},
  };
}

}  // namespace maskops::binding
