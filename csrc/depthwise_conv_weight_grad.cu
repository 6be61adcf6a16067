// The gradient of the effective weight of a depthwise convolution: each block sums over a slice of the pixels into a
// part of its own, and a second launch adds the parts, always in the same order.
//
// A thread walks down the rows, keeps all sums of its channels' filters, and the rows of the gradient that meet the row
// of the input it has loaded: each is loaded once.
#include <type_traits>

#include "depthwise.cuh"

namespace maskops {

struct DepthwiseWeightGrad {
  Images grad, input;
  Lanes lanes;
  float* parts;              // [part][tap][channel]
  int rows, row_blocks;      // of the gradient, that a block walks down at once
  int64_t pieces, per_part;  // a piece is a block of lanes over a block of rows
  int padding[2], stride[2], dilation[2], kernel[2];
};

template <int kernel_, int stride_, bool several_channels>
struct GradWalk {
  static constexpr int kernel = kernel_, stride = stride_;
  static constexpr int channels = !several_channels ? 1 : kernel == 3 ? 4 : 2;
  static constexpr int columns = channels == 1 ? 8 : kernel == 3 && stride == 2 ? 2 : 4;
  static constexpr int blocks = kernel == 7 || (kernel == 3 && columns == 4) ? 2 : 3;  // on a processor
};

// Adds what the lanes of a block have, for `taps` taps, and writes the sums of the block's channels.
template <int taps, int channels>
__device__ void write_sums(float (&values)[taps][channels], const Lanes& lanes, int block_channel, float* to) {
  __shared__ float sums[taps][warps_of_a_block][most_channel_groups * channels];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, groups = 1 << lanes.group_bits;
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) {
#pragma unroll
    for (int v = 0; v < channels; ++v) {
      float value = values[tap][v];
      for (int offset = lanes.channels_first ? groups : 1; offset < 32; offset *= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, offset);
      }
      if (lanes.channels_first ? lane < groups : lane == 0) sums[tap][warp][lane * channels + v] = value;
    }
  }
  __syncthreads();
  for (int i = thread; i < taps * groups * channels; i += depthwise_threads) {
    const int tap = i / (groups * channels), channel = i % (groups * channels);
    float total = 0;
    if (lanes.channels_first) {
      for (int w = 0; w < warps_of_a_block; ++w) total += sums[tap][w][channel];
    } else {
      const int warps = warps_of_a_block >> lanes.group_bits;
      for (int w = 0; w < warps; ++w) total += sums[tap][channel / channels * warps + w][channel % channels];
    }
    if (block_channel + channel < lanes.channels) {
      to[static_cast<int64_t>(tap) * lanes.channels + block_channel + channel] = total;
    }
  }
  __syncthreads();
}

template <typename Shape>
__global__ void __launch_bounds__(depthwise_threads, Shape::blocks)
    depthwise_weight_walk(const DepthwiseWeightGrad all) {
  constexpr int kernel = Shape::kernel, stride = Shape::stride, channels = Shape::channels, columns = Shape::columns;
  constexpr int kept = (kernel + stride - 1) / stride;  // rows of the gradient that meet a row of the input
  using Input = RowOf<(columns - 1) * stride + kernel, channels, kernel / 2, columns * stride>;
  using Grad = RowOf<columns, channels, 0, columns>;
  const Place at = place(all.lanes, channels, blockIdx.x);
  const int channels_left = all.lanes.channels - at.channel;
  float sums[kernel][kernel][channels] = {};
  const int64_t begin = blockIdx.y * all.per_part;
  const int64_t end = begin + all.per_part < all.pieces ? begin + all.per_part : all.pieces;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t lane_block = piece / all.row_blocks;
    const int64_t lane = (lane_block << (7 - all.lanes.group_bits)) + at.lane;
    const bool is_there = lane < all.lanes.count && channels_left > 0;
    const int image = static_cast<int>(lane / all.lanes.strips);
    const int grad_column = static_cast<int>(lane % all.lanes.strips) * columns;
    const int first = static_cast<int>(piece % all.row_blocks) * all.rows;
    const int last = first + all.rows < all.grad.rows ? first + all.rows : all.grad.rows;
    const int column = grad_column * stride - all.padding[1];
    int row = first * stride - all.padding[0] - 1;
    const int after = (last - 1) * stride - all.padding[0] + kernel;
    int64_t from = all.input.offset(image, at.channel, row, 0);
    int64_t grad_from = all.grad.offset(image, at.channel, first, 0);
    Input next = {};
    Grad next_grad = {};
    float grads[kept][Grad::count] = {};
    const int rows = (last + kept - 1 - first) * stride;
    for (int i = -1; i < rows; ++i) {
      float values[Input::count];
      unpack_row(next, all.input.elements.dtype, values);
      ++row;
      from += all.input.elements.strides[2];
      const bool is_inside = row < after && static_cast<unsigned>(row) < static_cast<unsigned>(all.input.rows);
      fetch_row(next, all.input, from, column, is_there && is_inside);
      if (stride == 1 || i % stride == 0) {
#pragma unroll
        for (int j = kept - 1; j > 0; --j) {
#pragma unroll
          for (int e = 0; e < Grad::count; ++e) grads[j][e] = grads[j - 1][e];
        }
        unpack_row(next_grad, all.grad.elements.dtype, grads[0]);
      }
      if (stride == 1 || i % stride != 0) {
        // of the next row of the gradient
        fetch_row(next_grad, all.grad, grad_from, grad_column, is_there && first + (i + 1) / stride < last);
        grad_from += all.grad.elements.strides[2];
      }
      if (i < 0) continue;
      const auto add = [&](auto constant) {
        constexpr int phase = decltype(constant)::value;
#pragma unroll
        for (int r = phase; r < kernel; r += stride) {
#pragma unroll
          for (int s = 0; s < kernel; ++s) {
#pragma unroll
            for (int e = 0; e < Grad::count; ++e) {
              sums[r][s][e % channels] +=
                  grads[r / stride][e] * values[e + (e / channels * (stride - 1) + s) * channels];
            }
          }
        }
      };
      if (stride == 1 || i % stride == 0) {
        add(std::integral_constant<int, 0>());
      } else {
        add(std::integral_constant<int, stride - 1>());
      }
    }
  }
  float* to = all.parts + blockIdx.y * static_cast<int64_t>(kernel * kernel) * all.lanes.channels;
#pragma unroll
  for (int r = 0; r < kernel; ++r) {
    write_sums(sums[r], all.lanes, at.block_channel, to + static_cast<int64_t>(r * kernel) * all.lanes.channels);
  }
}

// Any filter, stride and dilation: a block gathers for one tap. A lane is a pixel.
__global__ void __launch_bounds__(depthwise_threads, 8) depthwise_weight_gather(const DepthwiseWeightGrad all) {
  const Place at = place(all.lanes, 1, blockIdx.x % all.lanes.channel_blocks);
  const int tap = blockIdx.x / all.lanes.channel_blocks, r = tap / all.kernel[1], s = tap % all.kernel[1];
  float sums[1][1] = {};
  const int lanes = depthwise_threads >> all.lanes.group_bits;
  const int64_t begin = blockIdx.y * all.per_part * lanes + at.lane, end = (blockIdx.y + 1) * all.per_part * lanes;
  for (int64_t pixel = begin; pixel < end && pixel < all.lanes.count && at.channel < all.lanes.channels;
       pixel += lanes) {
    const int64_t line = pixel / all.grad.columns;
    const int grad_column = static_cast<int>(pixel - line * all.grad.columns);
    const int image = static_cast<int>(line / all.grad.rows), grad_row = static_cast<int>(line % all.grad.rows);
    const int row = grad_row * all.stride[0] + r * all.dilation[0] - all.padding[0];
    const int column = grad_column * all.stride[1] + s * all.dilation[1] - all.padding[1];
    if (row < 0 || row >= all.input.rows || column < 0 || column >= all.input.columns) continue;
    sums[0][0] += load(all.grad.elements, all.grad.offset(image, at.channel, grad_row, grad_column)) *
                  load(all.input.elements, all.input.offset(image, at.channel, row, column));
  }
  const int64_t taps = static_cast<int64_t>(all.kernel[0]) * all.kernel[1];
  write_sums(sums, all.lanes, at.block_channel, all.parts + (blockIdx.y * taps + tap) * all.lanes.channels);
}

// result[channel][tap] = the sum of the parts, [part][tap][channel]. A warp sums every fourth part of 32 channels of a
// tap.
__global__ void __launch_bounds__(depthwise_threads, 8)
    depthwise_sum_parts(float* result, const float* parts, int64_t count, int taps, int channels) {
  __shared__ float sums[warps_of_a_block][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tap = blockIdx.x % taps, channel = static_cast<int>(blockIdx.x / taps) * 32 + lane;
  const int64_t step = static_cast<int64_t>(taps) * channels;
  float total = 0;
  if (channel < channels) {
#pragma unroll 8
    for (int64_t part = warp; part < count; part += warps_of_a_block) {
      total += parts[part * step + static_cast<int64_t>(tap) * channels + channel];
    }
  }
  sums[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || channel >= channels) return;
  for (int w = 1; w < warps_of_a_block; ++w) total += sums[w][lane];
  result[static_cast<int64_t>(channel) * taps + tap] = total;
}

namespace {

// How the work is cut into parts, and the launch that computes them.
struct Plan {
  DepthwiseWeightGrad all = {};
  int64_t parts = 0, blocks = 0;
  void (*start)(const Launch& how, DepthwiseWeightGrad all) = nullptr;

  void cut(int64_t row_blocks) {
    const int64_t lanes = depthwise_threads >> all.lanes.group_bits;
    all.row_blocks = static_cast<int>(row_blocks);
    all.pieces = blocks_for(all.lanes.count, lanes) * row_blocks;
    const int64_t wanted = std::min(std::max<int64_t>(blocks_for(4 * processors(), blocks), 1), all.pieces);
    all.per_part = wanted == 0 ? 0 : blocks_for(all.pieces, wanted);
    parts = wanted == 0 ? 0 : blocks_for(all.pieces, all.per_part);
  }
};

// Several channels at once where their memory allows it, else one.
template <int kernel, int stride>
void walk(Plan& plan, const View& grad, const View& input) {
  DepthwiseWeightGrad& all = plan.all;
  const auto take = [&](auto shape) {
    using Shape = decltype(shape);
    all.lanes = lanes_of(grad, channels_innermost(input), Shape::channels, Shape::columns, 5);
    plan.blocks = all.lanes.channel_blocks;
    const int64_t lane_blocks = blocks_for(all.lanes.count, depthwise_threads >> all.lanes.group_bits);
    all.rows = static_cast<int>(rows_of_a_block(grad.sizes[2], lane_blocks * plan.blocks, 2 * kernel));
    plan.cut(blocks_for(grad.sizes[2], all.rows));
    plan.start = [](const Launch& how, DepthwiseWeightGrad all) { launch<depthwise_weight_walk<Shape>>(how, all); };
  };
  constexpr int channels = GradWalk<kernel, stride, true>::channels;
  all.grad = images_of(grad, 1, channels);
  all.input = images_of(input, 1, channels);
  if (all.grad.packed && all.input.packed) return take(GradWalk<kernel, stride, true>());
  all.grad = images_of(grad, 3, 4);
  all.input = images_of(input, 3, 4);
  all.input.packed = all.input.packed && all.padding[1] == kernel / 2;
  take(GradWalk<kernel, stride, false>());
}

void choose(Plan& plan, const View& grad, const View& input) {
  DepthwiseWeightGrad& all = plan.all;
  const auto is = [&](int kernel, int stride) {
    bool all_are = can_walk(grad) && can_walk(input);
    for (int d = 0; d < 2; ++d) {
      all_are = all_are && all.kernel[d] == kernel && all.stride[d] == stride && all.dilation[d] == 1;
    }
    return all_are;
  };
  if (is(3, 1)) return walk<3, 1>(plan, grad, input);
  if (is(3, 2)) return walk<3, 2>(plan, grad, input);
  if (is(5, 1)) return walk<5, 1>(plan, grad, input);
  if (is(5, 2)) return walk<5, 2>(plan, grad, input);
  if (is(7, 1)) return walk<7, 1>(plan, grad, input);
  all.grad = images_of(grad, 1, 1);
  all.input = images_of(input, 1, 1);
  all.lanes = lanes_of(grad, channels_innermost(input), 1, 1, 5);
  all.lanes.count *= grad.sizes[2];
  plan.blocks = static_cast<int64_t>(all.lanes.channel_blocks) * all.kernel[0] * all.kernel[1];
  plan.cut(1);
  plan.start = [](const Launch& how, DepthwiseWeightGrad all) { launch<depthwise_weight_gather>(how, all); };
}

Plan plan_of(const View& grad, const View& input, const DepthwiseFilter& filter) {
  Plan plan;
  if (grad.count() == 0) return plan;
  for (int d = 0; d < 2; ++d) {
    plan.all.kernel[d] = static_cast<int>(filter.weight.sizes[2 + d]);
    plan.all.stride[d] = filter.stride[d];
    plan.all.padding[d] = filter.padding[d];
    plan.all.dilation[d] = filter.dilation[d];
  }
  choose(plan, grad, input);
  return plan;
}

}  // namespace

int64_t depthwise_conv_weight_grad_floats(const View& grad, const View& input, const DepthwiseFilter& filter) {
  return plan_of(grad, input, filter).parts * filter.weight.count();
}

void depthwise_conv_weight_grad(const View& grad_weight, const View& grad, const View& input,
                                const DepthwiseFilter& filter, float* parts, cudaStream_t stream) {
  Plan plan = plan_of(grad, input, filter);
  const int channels = static_cast<int>(grad_weight.sizes[0]);
  const int taps = static_cast<int>(filter.weight.sizes[2] * filter.weight.sizes[3]);
  plan.all.parts = parts;
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.parts));
  if (plan.parts > 0) plan.start({grid, dim3(depthwise_threads), stream}, plan.all);
  launch<depthwise_sum_parts>(
      {dim3(static_cast<unsigned>(blocks_for(channels, 32) * taps)), dim3(depthwise_threads), stream},
      static_cast<float*>(grad_weight.data), static_cast<const float*>(parts), plan.parts, taps, channels);
}

}  // namespace maskops
