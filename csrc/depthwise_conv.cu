// Masked depthwise convolution and the gradient of its input: each output is the sum of its few products, and the mask
// is applied where a block loads its filters.
//
// A thread walks down the rows and loads each once. It keeps the sums of all output rows that a row of the input adds
// to: three for a filter of three rows. Every step finishes one of them, whose registers the next one takes.
#include <type_traits>

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

// target[t] = bias + sum over r of filter[r] * source[t * stride + r + first]
template <typename Shape>
__global__ void __launch_bounds__(depthwise_threads, Shape::blocks) depthwise_walk(const DepthwiseConvolution all) {
  constexpr int kernel = Shape::kernel, stride = Shape::stride, channels = Shape::channels, columns = Shape::columns;
  constexpr int sums = (kernel + stride - 1) / stride;  // rows of the target to which a row of the source adds
  using Source = RowOf<(columns - 1) * stride + kernel, channels, kernel / 2, columns * stride>;
  using Target = RowOf<columns, channels, 0, columns>;
  __shared__ __align__(16) float filters[Shape::taps * Shape::block_channels];
  const Place at = place(all.lanes, channels, blockIdx.x % all.lanes.channel_blocks);
  const Strip strip = strip_of<Shape>(all, at, blockIdx.x / all.lanes.channel_blocks);
  const int channels_left = all.lanes.channels - at.channel, column = strip.column * stride + all.first[1];
  const int64_t source_row = all.source.elements.strides[2];
  // the first rows under the filter may lie in the padding
  const int latest = strip.begin + sums - 1, padded = -all.first[0] / stride;
  const int start = padded < strip.begin ? strip.begin : padded < latest ? padded : latest;
  int row = start * stride + all.first[0] - 1;
  const int after = (strip.end - 1) * stride + all.first[0] + kernel;
  int64_t from = all.source.offset(strip.image, at.channel, row, 0);
  int64_t to = all.target.offset(strip.image, at.channel, strip.begin, 0);

  load_filters<Shape>(all, at.block_channel, filters);
  float bias[channels];
  load_bias<Shape>(all.bias, at.channel, channels_left, bias);
  __syncthreads();
  Taps<Shape> taps(filters, at.group * channels);

  Source next = {};
  float totals[sums][columns * channels] = {};
  const int rows = (strip.end + sums - 1 - start) * stride;
  for (int i = -1; i < rows; ++i) {
    float values[Source::count];
    unpack_row(next, all.source.elements.dtype, values);
    ++row;
    from += source_row;
    const bool is_inside = row < after && static_cast<unsigned>(row) < static_cast<unsigned>(all.source.rows);
    fetch_row(next, all.source, from, column, strip.is_there && is_inside);
    if (i < 0) continue;
    const auto add = [&](auto constant) {
      constexpr int phase = decltype(constant)::value;
#pragma unroll
      for (int j = sums - 1; j >= 0; --j) {
        const int r = j * stride + phase;
        if (phase == 0) {
#pragma unroll
          for (int e = 0; e < columns * channels; ++e) totals[j][e] = j ? totals[j - 1][e] : 0.0f;
        }
        if (r >= kernel) continue;
        taps.forget();
#pragma unroll
        for (int s = 0; s < kernel; ++s) {
          float tap[channels];
          taps.get(r * kernel + s, tap);
#pragma unroll
          for (int e = 0; e < columns * channels; ++e) {
            totals[j][e] += tap[e % channels] * values[e + (e / channels * (stride - 1) + s) * channels];
          }
        }
      }
    };
    if (stride == 1 || i % stride == 0) add(std::integral_constant<int, 0>());
    if constexpr (stride == 2) {
      if (i % stride == 0) continue;
      add(std::integral_constant<int, 1>());
    }
    if (start + i / stride < latest) continue;
    float results[columns * channels];
#pragma unroll
    for (int e = 0; e < columns * channels; ++e) results[e] = totals[sums - 1][e] + bias[e % channels];
    if (strip.is_there) put_row<Target>(results, all.target, to, strip.column);
    to += all.target.elements.strides[2];
  }
}

// The gradient of the input at a stride of two: target[2 * u + r - padding] += filter[r] * source[u].
//
// A row of the source adds to all rows of the target under its filter, of which every step finishes two. In the columns
// it is known when compiling which taps meet, because paddings are odd or even as half of the filter is.
template <typename Shape>
__global__ void __launch_bounds__(depthwise_threads, Shape::blocks) depthwise_spread(const DepthwiseConvolution all) {
  constexpr int kernel = Shape::kernel, channels = Shape::channels, columns = Shape::columns, half = kernel / 2;
  constexpr int before = half / 2;  // columns of the source left of the one that lies over the first of the target
  using Source = RowOf<before + (columns - 1 + half) / 2 + 1, channels, before, columns / 2>;
  using Target = RowOf<columns, channels, 0, columns>;
  __shared__ __align__(16) float filters[Shape::taps * Shape::block_channels];
  const Place at = place(all.lanes, channels, blockIdx.x % all.lanes.channel_blocks);
  const Strip strip = strip_of<Shape>(all, at, blockIdx.x / all.lanes.channel_blocks);
  const int padding = -all.first[0], shift = (-all.first[1] - half) / 2;
  const int column = strip.column / 2 - before + shift;
  // one before the first row of the source that adds to a row of the target
  int row = ((strip.begin + padding - kernel + 1) >> 1) - 1;
  const int first = row, last = (strip.end - 1 + padding) >> 1;
  int64_t from = all.source.offset(strip.image, at.channel, row, 0);
  load_filters<Shape>(all, at.block_channel, filters);
  __syncthreads();
  Taps<Shape> taps(filters, at.group * channels);

  Source next = {};
  float totals[kernel][columns * channels] = {};
  for (; row <= last; ++row) {
    float values[Source::count];
    unpack_row(next, all.source.elements.dtype, values);
    from += all.source.elements.strides[2];
    const bool is_inside = row < last && static_cast<unsigned>(row + 1) < static_cast<unsigned>(all.source.rows);
    fetch_row(next, all.source, from, column, strip.is_there && is_inside);
    if (row == first) continue;
    taps.forget();
#pragma unroll
    for (int r = 0; r < kernel; ++r) {
#pragma unroll
      for (int e = 0; e < columns * channels; ++e) totals[r][e] = r + 2 < kernel ? totals[r + 2][e] : 0.0f;
#pragma unroll
      for (int s = 0; s < kernel; ++s) {
        float tap[channels];
        taps.get(r * kernel + s, tap);
#pragma unroll
        for (int e = 0; e < columns * channels; ++e) {
          const int twice = e / channels + half - s + 2 * before;  // the source's column, from the row's first
          if (twice % 2 == 0) totals[r][e] += tap[e % channels] * values[twice / 2 * channels + e % channels];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int finished = 2 * row + r - padding;
      if (!strip.is_there || finished < strip.begin || finished >= strip.end) continue;
      const int64_t to = all.target.offset(strip.image, at.channel, finished, 0);
      put_row<Target>(totals[r], all.target, to, strip.column);
    }
  }
}

// Any filter, stride and dilation: target[t] = bias + sum over r of filter[r] * source[at / spread], where at is
// t * step + r * dilation + first, of the terms whose quotient is whole. A thread computes one element after the other.
__global__ void __launch_bounds__(elementwise_threads, 4) depthwise_gather(const DepthwiseConvolution all) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * elementwise_threads;
  const int channels = all.lanes.channels, rows = all.target.rows, columns = all.target.columns;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * elementwise_threads + threadIdx.x; index < all.lanes.count;
       index += threads) {
    int64_t left = index;
    const auto take = [&](int size) {
      const int64_t outer = left / size;
      const int inner = static_cast<int>(left - outer * size);
      left = outer;
      return inner;
    };
    int channel = all.lanes.channels_first ? take(channels) : 0;
    const int column = take(columns), row = take(rows);
    if (!all.lanes.channels_first) channel = take(channels);
    const int image = static_cast<int>(left);
    float total = 0;
    for (int r = 0; r < all.kernel[0]; ++r) {
      int y = row * all.step[0] + r * all.dilation[0] + all.first[0];
      if (y < 0 || y % all.spread[0] || (y /= all.spread[0]) >= all.source.rows) continue;
      for (int s = 0; s < all.kernel[1]; ++s) {
        int x = column * all.step[1] + s * all.dilation[1] + all.first[1];
        if (x < 0 || x % all.spread[1] || (x /= all.spread[1]) >= all.source.columns) continue;
        const float tap = all.turned ? all.filter.at(channel, all.kernel[0] - 1 - r, all.kernel[1] - 1 - s)
                                     : all.filter.at(channel, r, s);
        total += tap * load(all.source.elements, all.source.offset(image, channel, y, x));
      }
    }
    if (all.bias) total += load(all.bias, channel * all.bias.strides[0]);
    store(all.target.elements, all.target.offset(image, channel, row, column), total);
  }
}

namespace {

Operand operand_of(const View& view) {
  Operand operand;
  operand.data = static_cast<char*>(view.data);
  operand.dtype = view.dtype;
  for (int d = 0; d < view.dimensions; ++d) operand.strides[d] = view.strides[d];
  return operand;
}

// Of shape (channels, 1, rows, columns), as (channels, rows, columns).
Operand filter_operand(const View& view) {
  Operand operand = operand_of(view);
  operand.strides[1] = view.strides[2];
  operand.strides[2] = view.strides[3];
  return operand;
}

DepthwiseConvolution convolution_of(const DepthwiseFilter& filter, const View& bias) {
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

template <typename Shape>
struct Forward {
  static void start(const Launch& how, const DepthwiseConvolution& all) { launch<depthwise_walk<Shape>>(how, all); }
};

template <typename Shape>
struct Spread {
  static void start(const Launch& how, const DepthwiseConvolution& all) { launch<depthwise_spread<Shape>>(how, all); }
};

void convolve(DepthwiseConvolution& all, const View& target, const View& source, cudaStream_t stream) {
  const auto is = [&](int kernel, int step) {
    bool all_are = can_walk(target) && can_walk(source);
    for (int d = 0; d < 2; ++d) {
      all_are = all_are && all.kernel[d] == kernel && all.step[d] == step && all.spread[d] == 1 && all.dilation[d] == 1;
    }
    return all_are;
  };
  if (is(3, 1)) return walk<Forward, 3, 1>(all, target, source, stream);
  if (is(3, 2)) return walk<Forward, 3, 2>(all, target, source, stream);
  if (is(5, 1)) return walk<Forward, 5, 1>(all, target, source, stream);
  if (is(5, 2)) return walk<Forward, 5, 2>(all, target, source, stream);
  if (is(7, 1)) return walk<Forward, 7, 1>(all, target, source, stream);
  all.target = images_of(target, 1, 1);
  all.source = images_of(source, 1, 1);
  all.lanes.channels_first = channels_innermost(source);
  all.lanes.channels = static_cast<int>(target.sizes[1]);
  all.lanes.count = target.count();
  const int64_t blocks = std::min(blocks_for(all.lanes.count, elementwise_threads), int64_t{8} * processors());
  launch<depthwise_gather>({dim3(static_cast<unsigned>(blocks)), dim3(elementwise_threads), stream}, all);
}

}  // namespace

void depthwise_conv(const View& output, const View& input, const DepthwiseFilter& filter, const View& bias,
                    cudaStream_t stream) {
  if (output.count() == 0) return;
  DepthwiseConvolution all = convolution_of(filter, bias);
  for (int d = 0; d < 2; ++d) {
    all.first[d] = -filter.padding[d];
    all.step[d] = filter.stride[d];
    all.dilation[d] = filter.dilation[d];
    all.spread[d] = 1;
  }
  convolve(all, output, input, stream);
}

void depthwise_conv_input_grad(const View& grad_input, const View& grad, const DepthwiseFilter& filter,
                               cudaStream_t stream) {
  if (grad_input.count() == 0) return;
  DepthwiseConvolution all = convolution_of(filter, {});
  const auto halves = [&](int kernel) {
    bool all_are = can_walk(grad_input) && can_walk(grad);
    for (int d = 0; d < 2; ++d) {
      all_are = all_are && all.kernel[d] == kernel && filter.stride[d] == 2 && filter.dilation[d] == 1;
      all.first[d] = -filter.padding[d];
    }
    return all_are && (filter.padding[1] - kernel / 2) % 2 == 0;
  };
  if (halves(3)) return walk<Spread, 3, 1>(all, grad_input, grad, stream);
  if (halves(5)) return walk<Spread, 5, 1>(all, grad_input, grad, stream);
  // a convolution with the turned filter, over gradients that lie `stride` apart
  all.turned = true;
  for (int d = 0; d < 2; ++d) {
    all.first[d] = filter.padding[d] - filter.dilation[d] * (all.kernel[d] - 1);
    all.step[d] = 1;
    all.dilation[d] = filter.dilation[d];
    all.spread[d] = filter.stride[d];
  }
  convolve(all, grad_input, grad, stream);
}

}  // namespace maskops
