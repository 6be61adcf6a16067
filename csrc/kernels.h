// What the kernels' launchers take: memory, sizes and a stream. Nothing of torch.
#pragma once

#include <cmath>
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

// One kernel as the driver sees it on the current device.
struct KernelAttributes {
  std::string name;
  int registers, local_bytes, shared_bytes, threads, blocks_per_processor;
};

std::vector<std::string> kernel_names();
std::vector<KernelAttributes> kernel_attributes();

// noise + step_size * sign(grad * weight), then into [-bound, bound]. Without a weight: of grad alone.
void noise_step(const View& noise, const View& grad, const View& weight, float step_size, float bound,
                cudaStream_t stream);

// The rows of a (rows, entries) tensor moved into the L1 ball: times min(1, radius / norm), or to the nearest point.
// The workspace has as many bytes as the other function says, aligned to 16.
int64_t l1_ball_workspace(int64_t rows, int64_t entries);
void l1_ball(const View& output, const View& input, void* workspace, double radius, bool project, cudaStream_t stream);

// Infinite where nothing bounds.
struct Bounds {
  float low = -INFINITY, high = INFINITY;
};

// A batch of stored images, of which an index, if there is one, picks some: for each the number of its image.
struct Stored {
  View images;
  const int64_t* index = nullptr;
  int64_t index_stride = 0;
};

// (clamp(decode(images[index]) + trigger) - mean) / std; the output's images are dense, one after the other.
void prepare_images(const View& output, const Stored& stored, const View& trigger, Bounds bounds, const View& mean,
                    const View& std, cudaStream_t stream);

// The gradient of the trigger in it, dense: summed over the images that the bounds let pass, over std. Without stored
// images there are no bounds.
void prepare_images_backward(const View& output, const View& grad, const Stored& stored, const View& trigger,
                             Bounds bounds, const View& std, cudaStream_t stream);

// trigger + step_size * sum of grad over its first dimension, into the ball unless the radius is infinite, into the
// bounds. The workspace as that of l1_ball.
int64_t trigger_step_workspace(int64_t batch, int64_t entries, double radius);
void trigger_step(const View& trigger, const View& grad, void* workspace, float step_size, double radius, Bounds bounds,
                  cudaStream_t stream);

}  // namespace maskops
