// Max-pooling that leaves one byte per window behind, and its gradient as a gather, which adds in a fixed order.
//
// Where channels are innermost, a thread takes those of 16 bytes at one pixel; else the same pixel of four planes, or
// of four images. So the place of a window is worked out once for four or eight elements.
#include "arithmetic.h"
#include "elements.cuh"

namespace maskops {
namespace {

constexpr int planes_of_thread = 4;

// Images in memory: planes of (rows, columns, inner), in units of an element or of 16 bytes.
struct Pool {
  Window window;
  int rows, columns, out_rows, out_columns;
  int64_t inner, planes;
};

// The unit of a plane that a thread is at.
struct Pixel {
  int64_t plane, within;
  int row, column;

  // Of planes of `rows` times `columns`; false past the last one.
  __device__ bool find(const Pool& pool, int rows, int columns, int planes_together) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * elementwise_threads + threadIdx.x;
    const int64_t of_a_plane = static_cast<int64_t>(rows) * columns * pool.inner;
    int64_t pixel;
    if (pool.planes * of_a_plane <= INT32_MAX) {
      const uint32_t size = static_cast<uint32_t>(of_a_plane), inner = static_cast<uint32_t>(pool.inner);
      plane = static_cast<uint32_t>(index) / size;
      within = static_cast<uint32_t>(index) - static_cast<uint32_t>(plane) * size;
      pixel = static_cast<uint32_t>(within) / inner;
    } else {
      plane = index / of_a_plane;
      within = index - plane * of_a_plane;
      pixel = within / pool.inner;
    }
    row = static_cast<int>(pixel) / columns;
    column = static_cast<int>(pixel) - row * columns;
    plane *= planes_together;
    return plane < pool.planes;
  }

  __device__ int planes_left(const Pool& pool) const {
    return pool.planes - plane < planes_of_thread ? static_cast<int>(pool.planes - plane) : planes_of_thread;
  }
};

// What a thread takes at one place: a vector of 16 bytes, or an element of each of its planes.
template <DType dtype, bool vectors>
struct Taken {
  static constexpr int count = vectors && dtype != DType::float32 ? 8 : 4;
  static constexpr int unit_bytes = vectors ? 16 : dtype == DType::float32 ? 4 : 2;
  uint32_t words[4];

  __device__ void fill(uint32_t bits) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = bits;
  }

  // at: the first plane's unit; the planes are so many units apart
  __device__ void load(const char* at, int64_t plane, int planes) {
    if constexpr (vectors) {
      const uint4 vector = *reinterpret_cast<const uint4*>(at);
      words[0] = vector.x;
      words[1] = vector.y;
      words[2] = vector.z;
      words[3] = vector.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const char* from = at + i * plane * unit_bytes;
        if (i >= planes) break;
        if constexpr (unit_bytes == 4) {
          words[i] = *reinterpret_cast<const uint32_t*>(from);
        } else {
          words[i] = *reinterpret_cast<const uint16_t*>(from);
        }
      }
    }
  }

  __device__ void store(char* at, int64_t plane, int planes) const {
    if constexpr (vectors) {
      *reinterpret_cast<uint4*>(at) = {words[0], words[1], words[2], words[3]};
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        char* to = at + i * plane * unit_bytes;
        if (i >= planes) break;
        if constexpr (unit_bytes == 4) {
          *reinterpret_cast<uint32_t*>(to) = words[i];
        } else {
          *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(words[i]);
        }
      }
    }
  }

  __device__ float get(int k) const {
    return count == 8 ? to_float(words[k / 2] >> 16 * (k % 2) & 0xffff, dtype) : to_float(words[k], dtype);
  }

  __device__ void set(const float (&values)[count]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = count == 8 ? to_bits(values[i * count / 4], dtype) | to_bits(values[i * count / 4 + 1], dtype) << 16
                            : to_bits(values[i], dtype);
    }
  }
};

// The bytes that belong to a thread's elements.
template <int count, bool vectors>
struct Bytes {
  uint32_t words[count / 4];

  __device__ void load(const uint8_t* at, int64_t plane, int planes) {
    if constexpr (!vectors) {
      words[0] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < planes) words[0] |= static_cast<uint32_t>(at[i * plane]) << 8 * i;
      }
    } else if constexpr (count == 8) {
      const uint2 both = *reinterpret_cast<const uint2*>(at);
      words[0] = both.x;
      words[1] = both.y;
    } else {
      words[0] = *reinterpret_cast<const uint32_t*>(at);
    }
  }

  __device__ void store(uint8_t* at, int64_t plane, int planes) const {
    if constexpr (!vectors) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < planes) at[i * plane] = static_cast<uint8_t>(words[0] >> 8 * i);
      }
    } else if constexpr (count == 8) {
      *reinterpret_cast<uint2*>(at) = {words[0], words[1]};
    } else {
      *reinterpret_cast<uint32_t*>(at) = words[0];
    }
  }

  __device__ int get(int k) const { return static_cast<int>(words[k / 4] >> 8 * (k % 4) & 0xff); }

  __device__ void set(const int (&values)[count]) {
#pragma unroll
    for (int i = 0; i < count / 4; ++i) {
      words[i] = values[4 * i] | values[4 * i + 1] << 8 | values[4 * i + 2] << 16 | values[4 * i + 3] << 24;
    }
  }
};

// How many steps from a place before the image lead into it.
__device__ int steps_inside(int begin, int step) { return begin < 0 ? (-begin + step - 1) / step : 0; }

// batch: so many columns of the window are loaded at once
template <DType dtype, bool vectors, int batch>
__device__ void pool_of_thread(const Pool& pool, char* output, uint8_t* winners, const char* input) {
  using Here = Taken<dtype, vectors>;
  constexpr int count = Here::count;
  constexpr uint32_t lowest = dtype == DType::float32   ? 0xff800000u
                              : dtype == DType::float16 ? 0xfc00fc00u
                                                        : 0xff80ff80u;
  Pixel pixel;
  if (!pixel.find(pool, pool.out_rows, pool.out_columns, vectors ? 1 : planes_of_thread)) return;
  const Window& window = pool.window;
  const int planes = pixel.planes_left(pool);
  const int top = pixel.row * window.stride[0] - window.padding[0];
  const int left = pixel.column * window.stride[1] - window.padding[1];
  const int64_t line = pool.columns * pool.inner, plane = pool.rows * line;
  const int64_t out_plane = static_cast<int64_t>(pool.out_rows) * pool.out_columns * pool.inner;
  const int64_t inner = pixel.within - (static_cast<int64_t>(pixel.row) * pool.out_columns + pixel.column) * pool.inner;
  input += (pixel.plane * plane + inner) * Here::unit_bytes;
  const int some_column = left < 0 ? 0 : left;
  float best[count];
  int winner[count];
  // where all is -inf, the first place inside the image wins
  const int first = steps_inside(top, window.dilation[0]) * window.kernel[1] + steps_inside(left, window.dilation[1]);
#pragma unroll
  for (int k = 0; k < count; ++k) {
    best[k] = -INFINITY;
    winner[k] = first;
  }
#pragma unroll 1
  for (int r = 0; r < window.kernel[0]; ++r) {
    const int y = top + r * window.dilation[0];
    if (y < 0 || y >= pool.rows) continue;
    const char* row = input + y * line * Here::unit_bytes;
#pragma unroll 1
    for (int c = 0; c < window.kernel[1]; c += batch) {
      Here loaded[batch];
      bool inside[batch];
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        // what lies outside is loaded from a pixel inside, so that no load waits for a condition
        const int x = left + (c + b) * window.dilation[1];
        inside[b] = c + b < window.kernel[1] && x >= 0 && x < pool.columns;
        loaded[b].load(row + (inside[b] ? x : some_column) * pool.inner * Here::unit_bytes, plane, planes);
      }
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        if (!inside[b]) loaded[b].fill(lowest);
      }
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        const int place = r * window.kernel[1] + c + b;
#pragma unroll
        for (int k = 0; k < count; ++k) {
          const float value = loaded[b].get(k);
          if (wins(value, best[k])) {
            best[k] = value;
            winner[k] = place;
          }
        }
      }
    }
  }
  Here result;
  result.set(best);
  Bytes<count, vectors> places;
  places.set(winner);
  const int64_t at = pixel.plane * out_plane + pixel.within;
  result.store(output + at * Here::unit_bytes, out_plane, planes);
  places.store(winners + at * (vectors ? count : 1), out_plane, planes);
}

template <bool vectors, int batch>
__global__ void __launch_bounds__(elementwise_threads)
    max_pool(const Pool pool, DType dtype, char* output, uint8_t* winners, const char* input) {
  switch (dtype) {
    case DType::float32:
      pool_of_thread<DType::float32, vectors, batch>(pool, output, winners, input);
      break;
    case DType::float16:
      pool_of_thread<DType::float16, vectors, batch>(pool, output, winners, input);
      break;
    default:
      pool_of_thread<DType::bfloat16, vectors, batch>(pool, output, winners, input);
  }
}

// The windows that reach a pixel, along one side, and the pixel's place in the first of them.
struct Reach {
  int first, last, place, step;

  __device__ Reach(const Window& window, int side, int at, int windows) {
    const int stride = window.stride[side], extent = (window.kernel[side] - 1) * window.dilation[side] + 1;
    const int padded = at + window.padding[side];
    first = padded < extent ? 0 : (padded - extent) / stride + 1;
    last = padded / stride < windows ? padded / stride : windows - 1;
    place = padded - first * stride;
    step = stride;
  }
};

template <DType dtype, bool vectors>
__device__ void pool_gradient_of_thread(const Pool& pool, char* result, const char* grad, const uint8_t* winners) {
  using Here = Taken<dtype, vectors>;
  constexpr int count = Here::count, batch = 2;
  Pixel pixel;
  if (!pixel.find(pool, pool.rows, pool.columns, vectors ? 1 : planes_of_thread)) return;
  const Window& window = pool.window;
  const int planes = pixel.planes_left(pool);
  const int64_t line = pool.out_columns * pool.inner, plane = pool.out_rows * line;
  const int64_t in_plane = static_cast<int64_t>(pool.rows) * pool.columns * pool.inner;
  const int64_t inner = pixel.within - (static_cast<int64_t>(pixel.row) * pool.columns + pixel.column) * pool.inner;
  const Reach down(window, 0, pixel.row, pool.out_rows), right(window, 1, pixel.column, pool.out_columns);
  float total[count] = {};
  int from_top = down.place;
#pragma unroll 1
  for (int y = down.first; y <= down.last; ++y, from_top -= down.step) {
    // steps of one pixel are the rule, and save two divisions
    const int place_down = window.dilation[0] == 1 ? from_top : from_top / window.dilation[0];
    if (place_down * window.dilation[0] != from_top) continue;
    const int64_t start = pixel.plane * plane + y * line + inner;
    int from_left = right.place;
#pragma unroll 1
    for (int x = right.first; x <= right.last; x += batch) {
      Here grads[batch];
      Bytes<count, vectors> places[batch];
      int wanted[batch];
#pragma unroll
      for (int b = 0; b < batch; ++b, from_left -= right.step) {
        const int place_right = window.dilation[1] == 1 ? from_left : from_left / window.dilation[1];
        const bool reaches = x + b <= right.last && place_right * window.dilation[1] == from_left;
        wanted[b] = reaches ? place_down * window.kernel[1] + place_right : -1;
        grads[b].fill(0);
        places[b] = {};
        if (reaches) {
          const int64_t at = start + (x + b) * pool.inner;
          grads[b].load(grad + at * Here::unit_bytes, plane, planes);
          places[b].load(winners + at * (vectors ? count : 1), plane, planes);
        }
      }
#pragma unroll
      for (int b = 0; b < batch; ++b) {
#pragma unroll
        for (int k = 0; k < count; ++k) total[k] += places[b].get(k) == wanted[b] ? grads[b].get(k) : 0.0f;
      }
    }
  }
  Here sum;
  sum.set(total);
  sum.store(result + (pixel.plane * in_plane + pixel.within) * Here::unit_bytes, in_plane, planes);
}

template <bool vectors>
__global__ void __launch_bounds__(elementwise_threads)
    max_pool_gradient(const Pool pool, DType dtype, char* result, const char* grad, const uint8_t* winners) {
  switch (dtype) {
    case DType::float32:
      pool_gradient_of_thread<DType::float32, vectors>(pool, result, grad, winners);
      break;
    case DType::float16:
      pool_gradient_of_thread<DType::float16, vectors>(pool, result, grad, winners);
      break;
    default:
      pool_gradient_of_thread<DType::bfloat16, vectors>(pool, result, grad, winners);
  }
}

struct Plan {
  Pool pool;
  bool vectors;

  // image: of the sizes before pooling; pooled and winners: after it
  Plan(const View& image, const View& pooled, const View& winners, const Window& window, bool channels_last) {
    const int channel = image.dimensions - 3;
    const int64_t images = channel > 0 ? image.sizes[0] : 1, channels = image.sizes[channel];
    const int width = 16 / bytes_of(image.dtype);
    const auto is_aligned = [](const View& view) { return reinterpret_cast<uintptr_t>(view.data) % 16 == 0; };
    vectors = channels_last && channels % width == 0 && is_aligned(image) && is_aligned(pooled) && is_aligned(winners);
    pool.window = window;
    pool.rows = static_cast<int>(image.sizes[channel + 1]);
    pool.columns = static_cast<int>(image.sizes[channel + 2]);
    pool.out_rows = static_cast<int>(pooled.sizes[channel + 1]);
    pool.out_columns = static_cast<int>(pooled.sizes[channel + 2]);
    pool.inner = !channels_last ? 1 : vectors ? channels / width : channels;
    pool.planes = channels_last ? images : images * channels;
  }

  // A thread for each pixel of so many planes together.
  unsigned blocks(int rows, int columns) const {
    const int64_t together = vectors ? 1 : planes_of_thread;
    const int64_t threads = (pool.planes + together - 1) / together * rows * columns * pool.inner;
    return static_cast<unsigned>((threads + elementwise_threads - 1) / elementwise_threads);
  }
};

}  // namespace

void max_pool_winners(const View& output, const View& winners, const View& input, const Window& window,
                      bool channels_last, cudaStream_t stream) {
  const Plan plan(input, output, winners, window, channels_last);
  const Launch how = {plan.blocks(plan.pool.out_rows, plan.pool.out_columns), elementwise_threads, stream};
  const auto run = [&](auto vectors, auto batch) {
    launch<max_pool<decltype(vectors)::value, decltype(batch)::value>>(
        how, plan.pool, input.dtype, static_cast<char*>(output.data), static_cast<uint8_t*>(winners.data),
        static_cast<const char*>(input.data));
  };
  const std::integral_constant<int, 2> two;
  const std::integral_constant<int, 3> three;
  const bool by_three = window.kernel[1] % 2 && window.kernel[1] > 1;
  if (plan.vectors) {
    by_three ? run(std::true_type(), three) : run(std::true_type(), two);
  } else {
    by_three ? run(std::false_type(), three) : run(std::false_type(), two);
  }
}

void max_pool_winners_backward(const View& result, const View& grad, const View& winners, const Window& window,
                               bool channels_last, cudaStream_t stream) {
  const Plan plan(result, grad, winners, window, channels_last);
  const Launch how = {plan.blocks(plan.pool.rows, plan.pool.columns), elementwise_threads, stream};
  const auto run = [&](auto by_vectors) {
    launch<max_pool_gradient<decltype(by_vectors)::value>>(
        how, plan.pool, result.dtype, static_cast<char*>(result.data), static_cast<const char*>(grad.data),
        static_cast<const uint8_t*>(winners.data));
  };
  plan.vectors ? run(std::true_type()) : run(std::false_type());
}

}  // namespace maskops
