// Torch's tensors as the launchers take them, and memory for the outputs, over torch's stable ABI.
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

// Weak, so that the module loads where torch has no CUDA, and this is never called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace maskops::binding {

using maskops::View;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline maskops::DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return maskops::DType::float32;
    case ScalarType::Half:
      return maskops::DType::float16;
    case ScalarType::BFloat16:
      return maskops::DType::bfloat16;
    case ScalarType::Byte:
      return maskops::DType::uint8;
    default:
      STD_TORCH_CHECK(false, "expected float32, float16, bfloat16 or uint8");
      return maskops::DType::float32;
  }
}

inline View view(const Tensor& tensor) {
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

inline View view(const OptionalTensor& tensor) { return tensor ? view(*tensor) : View(); }

inline maskops::Number::Type number_type_of(const Tensor& tensor) {
  using Number = maskops::Number;
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Number::float64;
    case ScalarType::Float:
      return Number::float32;
    case ScalarType::Half:
      return Number::float16;
    case ScalarType::BFloat16:
      return Number::bfloat16;
    case ScalarType::Long:
      return Number::int64;
    case ScalarType::Int:
      return Number::int32;
    case ScalarType::Short:
      return Number::int16;
    case ScalarType::Char:
      return Number::int8;
    case ScalarType::Byte:
    case ScalarType::Bool:
      return Number::uint8;
    default:
      STD_TORCH_CHECK(false, "expected a real number");
      return Number::float64;
  }
}

// A tensor of one entry.
inline maskops::Number number(const Tensor& tensor) {
#ifdef CUDA_EMULATOR
  const bool on_host = !emulator::is_device_memory(tensor.data_ptr());
#else
  const bool on_host = tensor.is_cpu();
#endif
  return {tensor.data_ptr(), number_type_of(tensor), on_host};
}

// Unwritten memory on the device of a tensor.
inline Tensor empty(const Tensor& like, ScalarType type, int dimensions, const int64_t* sizes, const int64_t* strides) {
  int32_t device_type, device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device));
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, sizes, strides,
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  device_type, device, &result));
  return Tensor(result);
}

// Bytes for a kernel; none where it needs none.
inline OptionalTensor workspace(const Tensor& like, int64_t bytes) {
  const int64_t stride = 1;
  return bytes > 0 ? OptionalTensor(empty(like, ScalarType::Byte, 1, &bytes, &stride)) : std::nullopt;
}

inline void* data_of(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// The strides of a dense batch, whose images have the order of memory that those of another have.
inline void like_images(const Tensor& other, const int64_t* sizes, int64_t* strides) {
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

inline OptionalTensor as_floats(const OptionalTensor& tensor) {
  if (!tensor) return tensor;
  return torch::stable::contiguous(torch::stable::to(*tensor, ScalarType::Float));
}

// Four dimensions without gaps, the channels innermost, then columns, rows and images.
inline bool is_channels_last(const Tensor& tensor) {
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
inline bool suggests_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.strides()[1] == 0) return false;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t least = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < least || (d == 0 && least == strides[1])) return false;
    least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  }
  return true;
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype, bool channels_last) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// The device of a tensor made the current one, and its current stream.
class Device {
 public:
  explicit Device(const Tensor& tensor) {
    if (!tensor.is_cuda()) return;
    guard_.emplace(tensor.get_device_index());
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

// Unwritten memory in the memory order of another tensor, without gaps. Where it is contiguous whatever the strides of
// its dimensions of one entry, they are those of a contiguous one, as of what torch's own ops return.
inline Tensor empty_like(const Tensor& tensor, ScalarType dtype) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int dimensions = static_cast<int>(tensor.dim());
  std::vector<int> order(dimensions);
  std::iota(order.begin(), order.end(), 0);
  // from the innermost to the outermost dimension; of two alike, the last one is the inner one
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return strides[a] != strides[b] ? strides[a] < strides[b] : a > b; });
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
  return empty(tensor, dtype, dimensions, sizes.data(), dense.data());
}

}  // namespace maskops::binding
