// What a depthwise convolution and the gradient of its input share: the filters of a block in shared memory, those of a
// thread in registers, and how a walk starts.
#pragma once

#include "depthwise.cuh"

namespace maskops {

struct DepthwiseConvolution {
  Images target, source;
  Filter filter;
  Operand bias;
  Lanes lanes;
  int rows;      // of the target, that a block walks down
  int first[2];  // row and column of the source at which the filter of target (0, 0) begins
  int step[2], dilation[2], spread[2], kernel[2];
  bool turned;
};

// A square filter that moves by `stride` in steps of one, in which the source has no gaps.
template <int kernel_, int stride_, bool several_channels>
struct Walk {
  static constexpr int kernel = kernel_, stride = stride_;
  static constexpr int channels = !several_channels ? 1 : kernel == 3 ? 4 : 2;
  static constexpr bool in_registers = channels == 1 || kernel < 7;
  // images for filters of seven are often a multiple of seven wide
  static constexpr int columns = channels == 1 ? 8 : kernel == 7 ? 7 : kernel == 3 && stride == 2 ? 2 : 4;
  static constexpr int taps = kernel * kernel;
  static constexpr int block_channels = most_channel_groups * channels;
  static constexpr int blocks = kernel == 7 || (kernel == 5 && stride == 2) ? 2 : 3;  // on a processor
};

// The filters of a block's channels, [tap][channel], in shared memory.
template <typename Shape>
__device__ void load_filters(const DepthwiseConvolution& all, int first_channel, float* filters) {
  const int count = Shape::channels << all.lanes.group_bits;
  for (int i = threadIdx.x; i < count * Shape::taps; i += depthwise_threads) {
    const int channel = i / Shape::taps, tap = i % Shape::taps;
    const bool is_there = first_channel + channel < all.lanes.channels;
    const float value =
        is_there ? all.filter.at(first_channel + channel, tap / Shape::kernel, tap % Shape::kernel) : 0.0f;
    filters[(all.turned ? Shape::taps - 1 - tap : tap) * Shape::block_channels + channel] = value;
  }
}

// A thread's filter: read once into registers, or anew for every row.
template <typename Shape>
struct Taps {
  const float* filters;
  int own;
  float registers[Shape::in_registers ? Shape::taps : 1][Shape::channels];

  __device__ Taps(const float* filters, int own) : filters(filters), own(own) {
    if constexpr (Shape::in_registers) {
#pragma unroll
      for (int tap = 0; tap < Shape::taps; ++tap) read(tap, registers[tap]);
    }
  }

  __device__ void read(int tap, float (&values)[Shape::channels]) const {
    const float* at = filters + own + tap * Shape::block_channels;
    if constexpr (Shape::channels == 4) {
      const float4 four = *reinterpret_cast<const float4*>(at);
      values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
    } else if constexpr (Shape::channels == 2) {
      const float2 two = *reinterpret_cast<const float2*>(at);
      values[0] = two.x, values[1] = two.y;
    } else {
      values[0] = *at;
    }
  }

  __device__ void get(int tap, float (&values)[Shape::channels]) const {
    if constexpr (Shape::in_registers) {
#pragma unroll
      for (int v = 0; v < Shape::channels; ++v) values[v] = registers[tap][v];
    } else {
      read(tap, values);
    }
  }

  // What a loop reads from shared memory would else be kept in registers, more than there are.
  __device__ void forget() {
    if constexpr (!Shape::in_registers) own = hidden(own);
  }
};

template <typename Shape>
__device__ void load_bias(const Operand& bias, int channel, int channels, float (&values)[Shape::channels]) {
#pragma unroll
  for (int v = 0; v < Shape::channels; ++v) {
    values[v] = bias && v < channels ? load(bias, (channel + v) * bias.strides[0]) : 0.0f;
  }
}

// What a thread of a walk does: a strip of an image, for some channels, over the target's rows [begin, end).
struct Strip {
  bool is_there;
  int image, column, begin, end;  // the first column of the target
};

template <typename Shape>
__device__ Strip strip_of(const DepthwiseConvolution& all, const Place& at, int64_t lane_block) {
  const int64_t lane = (lane_block << (7 - all.lanes.group_bits)) + at.lane;
  Strip strip;
  strip.is_there = lane < all.lanes.count && at.channel < all.lanes.channels;
  strip.image = static_cast<int>(lane / all.lanes.strips);
  strip.column = static_cast<int>(lane % all.lanes.strips) * Shape::columns;
  strip.begin = static_cast<int>(blockIdx.y) * all.rows;
  strip.end = strip.begin + all.rows < all.target.rows ? strip.begin + all.rows : all.target.rows;
  return strip;
}

inline Operand operand_of(const View& view) {
  Operand operand;
  operand.data = static_cast<char*>(view.data);
  operand.dtype = view.dtype;
  for (int d = 0; d < view.dimensions; ++d) operand.strides[d] = view.strides[d];
  return operand;
}

// Of shape (channels, 1, rows, columns), as (channels, rows, columns).
inline Operand filter_operand(const View& view) {
  Operand operand = operand_of(view);
  operand.strides[1] = view.strides[2];
  operand.strides[2] = view.strides[3];
  return operand;
}

inline DepthwiseConvolution convolution_of(const DepthwiseFilter& filter, const View& bias) {
  DepthwiseConvolution all = {};
  all.filter = {filter_operand(filter.weight), filter_operand(filter.mask), filter_operand(filter.noise)};
  all.bias = operand_of(bias);
  for (int d = 0; d < 2; ++d) all.kernel[d] = static_cast<int>(filter.weight.sizes[2 + d]);
  return all;
}

// A walk of several channels at once where their memory allows it, else of one.
template <template <typename> class Kernel, int kernel, int stride>
void walk(DepthwiseConvolution& all, const View& target, const View& source, cudaStream_t stream) {
  const auto start = [&](auto shape) {
    using Shape = decltype(shape);
    all.lanes = lanes_of(target, channels_innermost(source), Shape::channels, Shape::columns, 2);
    const int64_t blocks =
        blocks_for(all.lanes.count, depthwise_threads >> all.lanes.group_bits) * all.lanes.channel_blocks;
    all.rows = static_cast<int>(rows_of_a_block(target.sizes[2], blocks, 2 * kernel));
    const auto splits = static_cast<unsigned>(blocks_for(target.sizes[2], all.rows));
    Kernel<Shape>::start({dim3(static_cast<unsigned>(blocks), splits), dim3(depthwise_threads), stream}, all);
  };
  constexpr int channels = Walk<kernel, stride, true>::channels;
  all.target = images_of(target, 1, channels);
  all.source = images_of(source, 1, channels);
  if (all.target.packed && all.source.packed) return start(Walk<kernel, stride, true>());
  all.target = images_of(target, 3, 4);
  all.source = images_of(source, 3, 4);
  all.source.packed = all.source.packed && all.first[1] == -(kernel / 2);
  start(Walk<kernel, stride, false>());
}

// target = bias + the convolution of the source, by the kernel that serves it.
void convolve(DepthwiseConvolution& all, const View& target, const View& source, cudaStream_t stream);

}  // namespace maskops
