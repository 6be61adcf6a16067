// Masked depthwise convolution: each output is the sum of its few products, and the mask is applied where a block loads
// its filters.
//
// A thread walks down the rows and loads each once. It keeps the sums of all output rows that a row of the input adds
// to: three for a filter of three rows. Every step finishes one of them, whose registers the next one takes.
#include <type_traits>

#include "depthwise_conv.cuh"

namespace maskops {

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

template <typename Shape>
struct Forward {
  static void start(const Launch& how, const DepthwiseConvolution& all) { launch<depthwise_walk<Shape>>(how, all); }
};

}  // namespace

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

}  // namespace maskops
