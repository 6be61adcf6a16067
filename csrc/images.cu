// A batch of clean images from storage to the input of a network, and the gradient of the trigger in it.
#include "elements.cuh"
#include "sums.cuh"

namespace maskops {
namespace {

constexpr int image_threads = 256;
constexpr int images_at_once = 2;
constexpr int gradients_at_once = 4;
constexpr int blocks_of_a_processor = 8;

// The stored images that the batch takes.
struct Picked {
  Operand images;
  int64_t stride;
  const int64_t* index;
  int64_t index_stride;

  __device__ Operand operator[](int64_t image) const {
    return moved_by(images, (index ? index[image * index_stride] : image) * stride);
  }
};

// The channel of an entry of a dense image, and how far into that it is.
struct Channel {
  uint32_t channel, rest, count, stride;

  __device__ Channel(int64_t place, int64_t count, int64_t stride)
      : count(static_cast<uint32_t>(count)), stride(static_cast<uint32_t>(stride)) {
    const bool is_small = place <= UINT32_MAX;
    const int64_t row = is_small ? static_cast<uint32_t>(place) / this->stride : place / stride;
    rest = static_cast<uint32_t>(place - row * stride);
    channel = static_cast<uint32_t>(row) % this->count;
  }

  __device__ void next() {
    if (++rest < stride) return;
    rest = 0;
    if (++channel == count) channel = 0;
  }

  __device__ float of(const Operand& values, float without) const {
    return values ? to_float(fetch<1>(values, line(count), channel).bits, values.dtype) : without;
  }
};

// The space is that of one image in the order of the output's memory.
struct Preparation {
  Space space;
  Operand output, trigger, mean, std;
  Picked picked;
  Bounds bounds;
  int64_t batch, channels, to_next_channel;
  bool is_trigger_flat;
};

// Each thread prepares the same entries of several images.
template <bool flat>
__global__ void __launch_bounds__(image_threads, 3) prepare(const Preparation preparation) {
  constexpr int width = flat ? eight : 1;
  const Space& space = preparation.space;
  const Operand &trigger = preparation.trigger, &mean = preparation.mean, &std = preparation.std;
  const Picked& picked = preparation.picked;
  const Bounds bounds = preparation.bounds;
  const int64_t place = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * width;
  if (place >= space.count) return;
  float change[width], shift[width], scale[width];
  if (trigger && preparation.is_trigger_flat) {
    unpack(fetch<width>(trigger, space, place), trigger.dtype, change);
  } else {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      // a negative zero changes nothing, not even the sign of zero
      change[k] = trigger ? to_float(fetch<1>(trigger, space, place + k).bits, trigger.dtype) : -0.0f;
    }
  }
  Channel channel(place, preparation.channels, preparation.to_next_channel);
#pragma unroll
  for (int k = 0; k < width; ++k, channel.next()) {
    shift[k] = channel.of(mean, 0);
    scale[k] = channel.of(std, 1);
  }
  const int64_t step = gridDim.y;
  for (int64_t first = blockIdx.y; first < preparation.batch; first += step * images_at_once) {
    Packed<width> packed[images_at_once];
#pragma unroll
    for (int i = 0; i < images_at_once; ++i) {
      const int64_t image = first + i * step;
      if (image < preparation.batch) packed[i] = fetch<width>(picked[image], space, place);
    }
#pragma unroll
    for (int i = 0; i < images_at_once; ++i) {
      const int64_t image = first + i * step;
      if (image >= preparation.batch) continue;
      float values[width];
      unpack(packed[i], picked.images.dtype, values);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const float value = clamp(__fadd_rn(values[k], change[k]), bounds.low, bounds.high);
        values[k] = __fsub_rn(value, shift[k]);
        if (std) values[k] = __fdiv_rn(values[k], scale[k]);
      }
      put(moved_by(preparation.output, image * space.count), line(space.count), place, values);
    }
  }
}

// The space is that of one image in the order of the output's memory.
struct Gradient {
  Space space;
  Operand output, grad, trigger, std;
  Picked picked;
  Bounds bounds;
  int64_t grad_stride, batch, channels, to_next_channel;
};

// Each thread sums its entry over the batch, or over a part of it.
__global__ void __launch_bounds__(batch_threads, 2) trigger_gradient(const Gradient gradient) {
  const Space& space = gradient.space;
  const Bounds bounds = gradient.bounds;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool here = index < space.count;
  float total = 0;
  if (here) {
    const Operand grads = moved_by(gradient.grad, offset_of(space, gradient.grad, index));
    Picked picked = gradient.picked;
    float change = 0;
    if (picked.images) {
      picked.images = moved_by(picked.images, offset_of(space, picked.images, index));
      change = to_float(fetch<1>(gradient.trigger, space, index).bits, gradient.trigger.dtype);
    }
    const int64_t step = blockDim.y;
    for (int64_t first = threadIdx.y; first < gradient.batch; first += step * gradients_at_once) {
      Packed<1> values[gradients_at_once], pixels[gradients_at_once];
#pragma unroll
      for (int i = 0; i < gradients_at_once; ++i) {
        const int64_t image = first + i * step;
        values[i] = pixels[i] = {0};
        if (image >= gradient.batch) continue;
        values[i] = fetch<1>(moved_by(grads, image * gradient.grad_stride), line(1), 0);
        if (picked.images) pixels[i] = fetch<1>(picked[image], line(1), 0);
      }
#pragma unroll
      for (int i = 0; i < gradients_at_once; ++i) {
        const float pixel = __fadd_rn(to_float(pixels[i].bits, picked.images.dtype), change);
        const bool passes = !picked.images || (pixel >= bounds.low && pixel <= bounds.high);
        total += passes ? to_float(values[i].bits, grads.dtype) : 0;
      }
    }
  }
  total = over_batch(total);
  if (threadIdx.y > 0 || !here) return;
  const Channel channel(index, gradient.channels, gradient.to_next_channel);
  const float one[1] = {gradient.std ? __fdiv_rn(total, channel.of(gradient.std, 1)) : total};
  put(gradient.output, space, index, one);
}

Operand per_channel(const View& values) {
  Operand operand;
  operand.data = static_cast<char*>(values.data);
  operand.dtype = values.dtype;
  operand.strides[0] = values.strides[0];
  return operand;
}

}  // namespace

void prepare_images(const View& output, const Stored& stored, const View& trigger, Bounds bounds, const View& mean,
                    const View& std, cudaStream_t stream) {
  const View image = inner(output), pixels = inner(stored.images);
  const Elementwise<3> all({&image, &pixels, &trigger});
  const int64_t entries = all.space.count, batch = output.sizes[0], stride = stored.images.strides[0];
  if (entries == 0 || batch == 0) return;
  const Elementwise<2> moved({&image, &pixels});
  const bool flat = moved.flat && entries % eight == 0 && stride % eight == 0;
  const Preparation preparation = {all.space,        all.operands[0],
                                   all.operands[2],  per_channel(mean),
                                   per_channel(std), {all.operands[1], stride, stored.index, stored.index_stride},
                                   bounds,           batch,
                                   output.sizes[1],  output.strides[1],
                                   all.flat};
  const int64_t threads = (entries + (flat ? eight : 1) - 1) / (flat ? eight : 1);
  const int64_t of_a_block = std::min((threads + 31) / 32 * 32, int64_t{image_threads});
  const int64_t blocks = (threads + of_a_block - 1) / of_a_block;
  const int64_t rows = std::max(int64_t{blocks_of_a_processor} * processors() / blocks, int64_t{1});
  const unsigned images = static_cast<unsigned>(std::min({batch, rows, int64_t{65535}}));
  const Launch how = {dim3(static_cast<unsigned>(blocks), images), dim3(static_cast<unsigned>(of_a_block)), stream};
  if (flat) {
    launch<prepare<true>>(how, preparation);
  } else {
    launch<prepare<false>>(how, preparation);
  }
}

void prepare_images_backward(const View& output, const View& grad, const Stored& stored, const View& trigger,
                             Bounds bounds, const View& std, cudaStream_t stream) {
  const View one = inner(grad), pixels = stored.images ? inner(stored.images) : View();
  View total = one;  // the output, with or without a first dimension of 1
  total.data = output.data;
  total.dtype = output.dtype;
  for (int d = 0; d < total.dimensions; ++d) total.strides[d] = output.strides[output.dimensions - 3 + d];
  const Elementwise<4> all({&total, &one, &pixels, &trigger});
  const auto& [out, grads, images, change] = all.operands;
  const int64_t batch = grad.sizes[0];
  if (all.space.count == 0) return;
  const Gradient gradient = {all.space,
                             out,
                             grads,
                             change,
                             per_channel(std),
                             {images, stored.images.strides[0], stored.index, stored.index_stride},
                             bounds,
                             grad.strides[0],
                             batch,
                             total.sizes[0],
                             total.strides[0]};
  const dim3 grid(batch_blocks(batch, all.space.count));
  launch<trigger_gradient>({grid, batch_block(batch), stream}, gradient);
}

}  // namespace maskops
