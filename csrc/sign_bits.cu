// ReLU, and frozen batch norm with residual and ReLU, that leave one bit per element behind.
//
// Tensors that lie in memory alike are taken as vectors of 16 bytes, four to a thread; what the lanes of a warp find is
// exchanged so that the bits, too, are written as words. Other tensors are taken one element to a lane.
#include "arithmetic.h"
#include "elements.cuh"

namespace maskops {
namespace {

// A thread takes so many vectors of 16 bytes, all of whose loads are under way before the first is used.
constexpr int rows = 4;
constexpr int vector_bytes = 16;
constexpr int most_threads = 320;
constexpr unsigned all_lanes = 0xffffffffu;

// A float32 per channel for each element of dense memory; channel = index / inner % count.
struct Channels {
  const float *scale, *shift;
  int64_t inner, count;
  int within_step, channel_step;  // from a thread's vector to its next one
  bool in_vectors;                // the elements of a vector are channels that come as vectors, too

  __device__ explicit operator bool() const { return scale || shift; }
  __device__ float scale_of(int channel) const { return scale ? scale[channel] : 1.0f; }
  __device__ float shift_of(int channel) const { return shift ? shift[channel] : 0.0f; }
};

struct Relu {
  Operand output, input, residual;
  Channels channels;
  uint8_t* bits;
  float upper, stop;
  int64_t count;
};

__device__ int64_t divide(int64_t index, int64_t size, bool is_small) {
  return is_small ? static_cast<uint32_t>(index) / static_cast<uint32_t>(size) : index / size;
}

// Where an element lies: in which channel, and where in it.
struct Place {
  int channel, within;

  __device__ Place(const Channels& channels, int64_t index, bool is_small) {
    const int64_t outer = divide(index, channels.inner, is_small);
    within = static_cast<int>(index - outer * channels.inner);
    channel = static_cast<int>(outer - divide(outer, channels.count, is_small) * channels.count);
  }

  __device__ void advance(const Channels& channels, int within_step, int channel_step) {
    within += within_step;
    channel += channel_step;
    if (within >= channels.inner) {
      within -= static_cast<int>(channels.inner);
      ++channel;
    }
    if (channel >= channels.count) channel -= static_cast<int>(channels.count);
  }
};

template <int width>
struct Factors {
  float scale[width], shift[width];

  // Those of the elements from a place on.
  __device__ void read(const Channels& channels, Place place) {
    if (channels.in_vectors) {
      read_vectors(scale, channels.scale, place.channel, 1.0f);
      read_vectors(shift, channels.shift, place.channel, 0.0f);
      return;
    }
    const bool is_one = place.within + width <= channels.inner;  // channel
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (k > 0 && !is_one) place.advance(channels, 1, 0);
      if (k > 0 && (is_one || place.within > 0)) {
        scale[k] = scale[k - 1];
        shift[k] = shift[k - 1];
      } else {
        scale[k] = channels.scale_of(place.channel);
        shift[k] = channels.shift_of(place.channel);
      }
    }
  }

  __device__ static void read_vectors(float (&values)[width], const float* from, int channel, float without) {
#pragma unroll
    for (int k = 0; k < width; k += 4) {
      const float4 four =
          from ? *reinterpret_cast<const float4*>(from + channel + k) : float4{without, without, without, without};
      values[k] = four.x;
      values[k + 1] = four.y;
      values[k + 2] = four.z;
      values[k + 3] = four.w;
    }
  }
};

// One element for each lane, the first of them at a multiple of eight.
__device__ void relu_of_lanes(const Space& space, const Relu& work, int64_t first) {
  const int lane = threadIdx.x % 32;
  const int64_t index = first + lane;
  bool pass = false;
  if (index < work.count) {
    const Packed<1> bits = fetch<1>(work.input, space, index), added = fetch<1>(work.residual, space, index);
    float value = to_float(bits.bits, work.input.dtype);
    if (work.channels) {
      const int channel = Place(work.channels, index, work.count <= INT32_MAX).channel;
      value = work.channels.scale_of(channel) * value + work.channels.shift_of(channel);
    }
    if (work.residual) value += to_float(added.bits, work.residual.dtype);
    const float result[1] = {relu(rounded(value, work.output.dtype), work.upper)};
    put(work.output, space, index, result);
    pass = passes(result[0], work.stop);
  }
  const unsigned word = __ballot_sync(all_lanes, pass);
  if (lane < 4 && first + lane * eight < work.count) work.bits[first / eight + lane] = word >> lane * eight & 0xff;
}

template <DType dtype>
__device__ float element(const uint32_t (&words)[4], int k) {
  if constexpr (dtype == DType::float32) return to_float(words[k], dtype);
  return to_float(words[k / 2] >> 16 * (k % 2) & 0xffff, dtype);
}

__device__ void split(const uint4& vector, uint32_t (&words)[4]) {
  words[0] = vector.x;
  words[1] = vector.y;
  words[2] = vector.z;
  words[3] = vector.w;
}

// Each lane has a piece of so many bits of each of four rows; it gets those of row (lane % 4) of its group of four
// lanes, the first lane's lowest.
__device__ uint32_t gather_row(const uint32_t (&pieces)[rows], int bits, int lane) {
  const uint32_t even = pieces[0] | pieces[2] << 16, odd = pieces[1] | pieces[3] << 16;
  const bool is_odd = lane & 1, is_second = lane & 2;
  const uint32_t beside = __shfl_xor_sync(all_lanes, is_odd ? even : odd, 1);
  const uint32_t pairs = is_odd ? beside | odd << bits : even | beside << bits;
  const uint32_t low = pairs & 0xffff, high = pairs >> 16;
  const uint32_t across = __shfl_xor_sync(all_lanes, is_second ? low : high, 2);
  return is_second ? across | high << 2 * bits : low | across << 2 * bits;
}

// The vectors of a block: rows one after the other, of one vector for each thread.
template <DType dtype, bool affine>
__device__ void relu_of_vectors(const Relu& work) {
  constexpr int width = dtype == DType::float32 ? 4 : 8;
  const int64_t whole = work.count / (4 * width) * 4;  // vectors, in fours, whose bits make whole words
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows * blockDim.x + threadIdx.x;
  const uint4* const input = reinterpret_cast<const uint4*>(work.input.data);
  const uint4* const residual = reinterpret_cast<const uint4*>(work.residual.data);
  uint4* const output = reinterpret_cast<uint4*>(work.output.data);
  uint4 loaded[rows] = {}, added[rows] = {};
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const int64_t at = first + r * blockDim.x;
    if (at < whole) loaded[r] = input[at];
    if (affine && residual && at < whole) added[r] = residual[at];
  }
  const Channels& channels = work.channels;
  const bool moves = channels.within_step != 0 || channels.channel_step != 0;
  Place place(channels, first * width, work.count <= INT32_MAX);
  Factors<width> factors;
  if (affine) factors.read(channels, place);
  uint32_t pieces[rows] = {};
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const int64_t at = first + r * blockDim.x;
    if (at >= whole) break;
    if (affine && r > 0 && moves) {
      place.advance(channels, channels.within_step, channels.channel_step);
      factors.read(channels, place);
    }
    uint32_t words[4], more[4];
    split(loaded[r], words);
    split(added[r], more);
    uint32_t results[width];
#pragma unroll
    for (int k = 0; k < width; ++k) {
      float value = element<dtype>(words, k);
      if (affine) {
        value = factors.scale[k] * value + factors.shift[k] + element<dtype>(more, k);
        value = rounded(value, dtype);
      }
      value = relu(value, work.upper);
      pieces[r] |= passes(value, work.stop) ? 1u << k : 0u;
      results[k] = to_bits(value, dtype);
    }
    if constexpr (width == 4) {
      output[at] = {results[0], results[1], results[2], results[3]};
    } else {
      output[at] = {results[0] | results[1] << 16, results[2] | results[3] << 16, results[4] | results[5] << 16,
                    results[6] | results[7] << 16};
    }
  }
  const int lane = threadIdx.x % 32;
  const uint32_t word = gather_row(pieces, width, lane);
  const int64_t four = first - lane % 4 + lane % rows * blockDim.x;
  if (four >= whole) return;
  if constexpr (width == 4) {
    reinterpret_cast<uint16_t*>(work.bits)[four / 4] = static_cast<uint16_t>(word);
  } else {
    reinterpret_cast<uint32_t*>(work.bits)[four / 4] = word;
  }
}

template <bool affine>
__global__ void __launch_bounds__(most_threads, affine ? 2 : 4) relu_vectors(const Relu work) {
  switch (work.input.dtype) {
    case DType::float32:
      relu_of_vectors<DType::float32, affine>(work);
      break;
    case DType::float16:
      relu_of_vectors<DType::float16, affine>(work);
      break;
    default:
      relu_of_vectors<DType::bfloat16, affine>(work);
  }
  // what is left after the last four vectors is at most one element for each lane
  const int64_t rest = work.count & -int64_t{work.input.dtype == DType::float32 ? 16 : 32};
  Space line;
  line.dimensions = 1;
  if (blockIdx.x == 0 && threadIdx.x < 32 && rest < work.count) relu_of_lanes(line, work, rest);
}

__global__ void __launch_bounds__(elementwise_threads) relu_elements(const Space space, const Relu work) {
  relu_of_lanes(space, work, static_cast<int64_t>(blockIdx.x) * elementwise_threads + threadIdx.x / 32 * 32);
}

__device__ void pass_element(void* result, const void* grad, const uint8_t* bits, bool is_wide, int64_t index) {
  const bool pass = bits[index / eight] >> index % eight & 1;
  if (is_wide) {
    static_cast<uint32_t*>(result)[index] = pass ? static_cast<const uint32_t*>(grad)[index] : 0;
  } else {
    static_cast<uint16_t*>(result)[index] = pass ? static_cast<const uint16_t*>(grad)[index] : 0;
  }
}

// is_wide: elements of four bytes, else of two
__global__ void __launch_bounds__(elementwise_threads)
    pass_vectors(uint4* result, const uint4* grad, const uint8_t* bits, bool is_wide, int64_t count) {
  const int64_t whole = is_wide ? count / 4 : count / 8;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows * elementwise_threads + threadIdx.x;
  uint4 loaded[rows] = {};
  uint32_t pieces[rows] = {};
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const int64_t at = first + r * elementwise_threads;
    if (at < whole) {
      loaded[r] = grad[at];
      pieces[r] = is_wide ? bits[at / 2] >> 4 * (at % 2) : bits[at];
    }
  }
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const int64_t at = first + r * elementwise_threads;
    uint32_t words[4];
    split(loaded[r], words);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      // a word is one element or two
      const uint32_t low = pieces[r] >> 2 * k & 1, high = pieces[r] >> (2 * k + 1) & 1;
      words[k] &= is_wide ? 0u - (pieces[r] >> k & 1) : ((0u - low) & 0xffff) | (0u - high) << 16;
    }
    if (at < whole) result[at] = {words[0], words[1], words[2], words[3]};
  }
  const int64_t index = whole * (is_wide ? 4 : 8) + first;
  if (index < count) pass_element(result, grad, bits, is_wide, index);
}

__global__ void __launch_bounds__(elementwise_threads)
    pass_elements(void* result, const void* grad, const uint8_t* bits, bool is_wide, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * elementwise_threads + threadIdx.x;
  if (index < count) pass_element(result, grad, bits, is_wide, index);
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % vector_bytes == 0; }

unsigned blocks_for(int64_t count, int64_t of_a_block) {
  return static_cast<unsigned>((count + of_a_block - 1) / of_a_block);
}

// So many threads that each stays at its channels from one row of vectors to the next, where that can be.
int threads_for(int64_t vectors_of_a_pixel) {
  for (int threads : {256, 192, 224, 160, 288, 320}) {
    if (threads % vectors_of_a_pixel == 0) return threads;
  }
  return elementwise_threads;
}

template <bool affine>
void run(const Elementwise<3>& all, Relu work, float upper, cudaStream_t stream) {
  work.upper = upper;
  work.stop = upper < INFINITY ? upper : NAN;
  work.count = all.space.count;
  const auto& [output, input, residual] = all.operands;
  work.output = output;
  work.input = input;
  work.residual = residual;
  if (!all.flat || (residual && residual.dtype != input.dtype)) {
    launch<relu_elements>({blocks_for(work.count, elementwise_threads), elementwise_threads, stream}, all.space, work);
    return;
  }
  const int width = vector_bytes / bytes_of(input.dtype);
  int threads = elementwise_threads;
  Channels& channels = work.channels;
  if (channels.inner == 1 && channels.count % width == 0) {
    threads = threads_for(channels.count / width);
    channels.in_vectors = is_aligned(channels.scale) && is_aligned(channels.shift);
  }
  channels.within_step = static_cast<int>(threads * width % channels.inner);
  channels.channel_step = static_cast<int>(threads * width / channels.inner % channels.count);
  const unsigned blocks = blocks_for(work.count, rows * threads * width);
  launch<relu_vectors<affine>>({blocks, static_cast<unsigned>(threads), stream}, work);
}

}  // namespace

void relu_bits(const View& output, const View& input, const View& bits, float upper, cudaStream_t stream) {
  Relu work = {};
  work.bits = static_cast<uint8_t*>(bits.data);
  const View none;
  work.channels.inner = work.channels.count = 1;
  run<false>(Elementwise<3>({&output, &input, &none}), work, upper, stream);
}

void affine_relu_bits(const View& input, const View& scale, const View& shift, const View& residual, const View& bits,
                      float upper, cudaStream_t stream) {
  Relu work = {};
  work.bits = static_cast<uint8_t*>(bits.data);
  const bool has_channels = (scale || shift) && input.sizes[1] > 1;
  work.channels.scale = static_cast<const float*>(scale.data);
  work.channels.shift = static_cast<const float*>(shift.data);
  work.channels.inner = has_channels ? input.strides[1] : 1;
  work.channels.count = has_channels ? input.sizes[1] : 1;
  run<true>(Elementwise<3>({&input, &input, &residual}), work, upper, stream);
}

void relu_bits_backward(const View& result, const View& grad, const View& bits, cudaStream_t stream) {
  const int64_t count = grad.count();
  const bool is_wide = grad.dtype == DType::float32;
  const auto* packed = static_cast<const uint8_t*>(bits.data);
  if (is_aligned(grad.data)) {
    const int64_t of_a_block = rows * elementwise_threads * (is_wide ? 4 : 8);
    launch<pass_vectors>({blocks_for(count, of_a_block), elementwise_threads, stream}, static_cast<uint4*>(result.data),
                         static_cast<const uint4*>(grad.data), packed, is_wide, count);
  } else {
    launch<pass_elements>({blocks_for(count, elementwise_threads), elementwise_threads, stream}, result.data,
                          static_cast<const void*>(grad.data), packed, is_wide, count);
  }
}

}  // namespace maskops
