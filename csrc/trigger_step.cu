// The step on a trigger: gradient ascent, then into the L1 ball, then into the range of pixels.
//
// With a small trigger and few gradients one block does it all. Otherwise many blocks step, each with its part of the
// norm; a second launch adds up the parts and rescales what the first has put into the workspace.
#include "elements.cuh"
#include "sums.cuh"

namespace maskops {
namespace {

constexpr int whole_threads = 1024;
constexpr int of_a_thread = 4;
constexpr int largest_whole = whole_threads * of_a_thread;
constexpr int loads_at_once = 8;
constexpr int rescale_threads = 256;

// The space is that of one gradient, in the order of its memory.
struct Ascent {
  Space space;
  Operand trigger, grad;
  int64_t batch, grad_stride;
  float step_size;
};

struct Ball {
  double radius;
  Bounds bounds;
};

__device__ float ascend(const Ascent& ascent, float value, float total) { return fmaf(ascent.step_size, total, value); }

__device__ float load(const Operand& operand, const Space& space, int64_t index) {
  return to_float(fetch<1>(operand, space, index).bits, operand.dtype);
}

__device__ void store(const Ascent& ascent, int64_t index, float value, Bounds bounds) {
  const float one[1] = {clamp(value, bounds.low, bounds.high)};
  put(ascent.trigger, ascent.space, index, one);
}

__device__ float rescale(float value, double factor) { return static_cast<float>(value * factor); }

__global__ void __launch_bounds__(whole_threads, 1) whole_trigger_step(const Ascent ascent, const Ball ball) {
  __shared__ Sum shared[BlockSum::shared_sums];
  BlockSum block_sum(shared);
  float values[of_a_thread], totals[of_a_thread] = {};
  int64_t offsets[of_a_thread];
#pragma unroll
  for (int k = 0; k < of_a_thread; ++k) {
    const int index = static_cast<int>(k * blockDim.x + threadIdx.x);
    const bool here = index < ascent.space.count;
    values[k] = here ? load(ascent.trigger, ascent.space, index) : 0;
    offsets[k] = here ? offset_of(ascent.space, ascent.grad, index) : -1;
  }
  for (int64_t image = 0; image < ascent.batch; ++image) {
    const Operand grad = moved_by(ascent.grad, image * ascent.grad_stride);
    Packed<1> packed[of_a_thread];
#pragma unroll
    for (int k = 0; k < of_a_thread; ++k) {
      packed[k] = offsets[k] < 0 ? Packed<1>{0} : fetch<1>(moved_by(grad, offsets[k]), line(1), 0);
    }
#pragma unroll
    for (int k = 0; k < of_a_thread; ++k) totals[k] += to_float(packed[k].bits, grad.dtype);
  }
  Sum own = {0, 0};
#pragma unroll
  for (int k = 0; k < of_a_thread; ++k) {
    values[k] = ascend(ascent, values[k], totals[k]);
    own.total += fabsf(values[k]);
  }
  const double factor = rescaling(block_sum(own).total, ball.radius);
#pragma unroll
  for (int k = 0; k < of_a_thread; ++k) {
    const int index = static_cast<int>(k * blockDim.x + threadIdx.x);
    if (offsets[k] >= 0) store(ascent, index, rescale(values[k], factor), ball.bounds);
  }
}

// Into the workspace where there is one, and a part of the norm for each block; else into the trigger.
__global__ void __launch_bounds__(batch_threads, 2)
    ascend_on_trigger(const Ascent ascent, Bounds bounds, float* stepped, double* parts) {
  __shared__ Sum shared[BlockSum::shared_sums];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool here = index < ascent.space.count;
  float total = 0;
  if (here) {
    Operand grads = moved_by(ascent.grad, offset_of(ascent.space, ascent.grad, index));
    grads.strides[0] = ascent.grad_stride;
    const Space images = line(ascent.batch);
    const int64_t rows = blockDim.y;
    for (int64_t first = threadIdx.y; first < ascent.batch; first += rows * loads_at_once) {
      Packed<1> packed[loads_at_once];
#pragma unroll
      for (int k = 0; k < loads_at_once; ++k) {
        const int64_t image = first + k * rows;
        packed[k] = image < ascent.batch ? fetch<1>(grads, images, image) : Packed<1>{0};
      }
#pragma unroll
      for (int k = 0; k < loads_at_once; ++k) total += to_float(packed[k].bits, grads.dtype);
    }
  }
  total = over_batch(total);
  if (threadIdx.y > 0) return;
  const float value = here ? ascend(ascent, load(ascent.trigger, ascent.space, index), total) : 0;
  if (stepped == nullptr) {
    if (here) store(ascent, index, value, bounds);
    return;
  }
  if (here) stepped[index] = value;
  const Sum part = BlockSum(shared)({fabsf(value), 0});
  if (threadIdx.x == 0) parts[blockIdx.x] = part.total;
}

__global__ void __launch_bounds__(rescale_threads, 4)
    rescale_trigger(const Ascent ascent, const Ball ball, const float* stepped, const double* parts, int count) {
  __shared__ Sum shared[BlockSum::shared_sums];
  Sum own = {0, 0};
  for (int part = static_cast<int>(threadIdx.x); part < count; part += rescale_threads) own.total += parts[part];
  const double factor = rescaling(BlockSum(shared)(own).total, ball.radius);
  const int64_t step = static_cast<int64_t>(gridDim.x) * rescale_threads;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * rescale_threads + threadIdx.x; index < ascent.space.count;
       index += step) {
    store(ascent, index, rescale(stepped[index], factor), ball.bounds);
  }
}

bool is_whole(int64_t batch, int64_t entries) { return entries <= largest_whole && batch <= few_images; }

}  // namespace

int64_t trigger_step_workspace(int64_t batch, int64_t entries, double radius) {
  if (std::isinf(radius) || is_whole(batch, entries)) return 0;
  return batch_blocks(batch, entries) * static_cast<int64_t>(sizeof(double)) + entries * sizeof(float);
}

void trigger_step(const View& trigger, const View& grad, void* workspace, float step_size, double radius, Bounds bounds,
                  cudaStream_t stream) {
  const View one = inner(grad);
  const Elementwise<2> all({&one, &trigger});
  const int64_t batch = grad.sizes[0], entries = all.space.count;
  if (entries == 0) return;
  const Ascent ascent = {all.space, all.operands[1], all.operands[0], batch, grad.strides[0], step_size};
  const Ball ball = {radius, bounds};
  if (!std::isinf(radius) && is_whole(batch, entries)) {
    const unsigned threads = static_cast<unsigned>(std::min((entries + 31) / 32 * 32, int64_t{whole_threads}));
    launch<whole_trigger_step>({dim3(1), dim3(threads), stream}, ascent, ball);
    return;
  }
  const unsigned blocks = batch_blocks(batch, entries);
  double* const parts = static_cast<double*>(workspace);
  float* const stepped = parts ? reinterpret_cast<float*>(parts + blocks) : nullptr;
  launch<ascend_on_trigger>({dim3(blocks), batch_block(batch), stream}, ascent, bounds, stepped, parts);
  if (!parts) return;
  const int64_t turns = (entries + rescale_threads - 1) / rescale_threads;
  const dim3 grid(static_cast<unsigned>(std::min(turns, int64_t{4} * processors())));
  launch<rescale_trigger>({grid, dim3(rescale_threads), stream}, ascent, ball, stepped, parts,
                          static_cast<int>(blocks));
}

}  // namespace maskops
