// The gradient of the input of a masked depthwise convolution: by a walk of its own where the stride is two, else as a
// convolution with the turned filter.
#include "depthwise_conv.cuh"

namespace maskops {

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

namespace {

template <typename Shape>
struct Spread {
  static void start(const Launch& how, const DepthwiseConvolution& all) { launch<depthwise_spread<Shape>>(how, all); }
};

}  // namespace

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
