// What the kernels' launchers take: memory, sizes and a stream. Nothing of torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <cuda_runtime.h>

namespace maskops {

enum class DType : int { float32, float16, bfloat16, uint8 };

constexpr int most_dimensions = 5;

// A tensor in device memory; a stride of 0 repeats an entry.
struct View {
  void* data = nullptr;
  DType dtype = DType::float32;
  int dimensions = 0;
  int64_t sizes[most_dimensions] = {};
  int64_t strides[most_dimensions] = {};

  explicit operator bool() const { return data != nullptr; }

  int64_t count() const {
    int64_t product = 1;
    for (int d = 0; d < dimensions; ++d) product *= sizes[d];
    return product;
  }
};

// A tensor of no dimensions: a number of any dtype, in the device's memory or in the host's.
struct Number {
  enum Type : int { float64, float32, float16, bfloat16, int64, int32, int16, int8, uint8 };

  void* data = nullptr;
  Type type = float64;
  bool on_host = true;
};

// One kernel as the driver sees it on the current device.
struct KernelAttributes {
  std::string name;
  int registers, local_bytes, shared_bytes, threads, blocks_per_processor;
};

std::vector<std::string> kernel_names();
std::vector<KernelAttributes> kernel_attributes();

// What every mask step takes. These views may be missing: a weight, without which `grad` is the mask's own gradient; an
// effective weight to write; lower bounds of each entry, without which `lower` is that of all; and totals.
struct MaskStepArguments {
  View mask, grad, weight, effective;
  double l1, toward;
  Number lower;
  View lower_of_each;
  double upper;
  View totals;
  double* workspace;  // of mask_step_workspace() entries, where there are totals or where a step or lr is on the device
};

struct AdamArguments {
  Number step, lr;
  double beta1, beta2, eps;
};

// Entries of the blocks that have a scale of their own in eight-bit states.
constexpr int scaled_block = 256;

int64_t mask_step_workspace();
void mask_adam_step(const MaskStepArguments& arguments, const View& exp_avg, const View& exp_avg_sq,
                    const AdamArguments& adam, cudaStream_t stream);
void mask_sgd_step(const MaskStepArguments& arguments, const View& momentum_buffer, const Number& lr, double momentum,
                   cudaStream_t stream);
// Over tensors of one dimension.
void mask_adam8bit_step(const MaskStepArguments& arguments, const View& exp_avg, const View& exp_avg_scale,
                        const View& exp_avg_sq, const View& exp_avg_sq_scale, const AdamArguments& adam,
                        cudaStream_t stream);

// noise + step_size * sign(grad * weight), then into [-bound, bound]. Without a weight: of grad alone.
void noise_step(const View& noise, const View& grad, const View& weight, float step_size, float bound,
                cudaStream_t stream);

}  // namespace maskops
