// Elementwise kernels over tensors of any dtype and strides, computed in float32.
//
// The dtype is read at run time: such a kernel waits for memory, not for a branch that all threads take alike, and so
// one kernel serves all combinations. What a thread loads stays packed until all its loads are under way. Tensors that
// lie in memory alike are taken eight elements at a time, or four where a step has so many of them that eight of each
// would not fit into the registers; others one by one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "arithmetic.h"
#include "launch.cuh"
#include "layout.h"

namespace maskops {

constexpr int four = 4;
constexpr int eight = 8;
constexpr int elementwise_threads = 256;

// The index space of a kernel, the innermost dimension first.
struct Space {
  int dimensions = 0;
  int64_t sizes[most_dimensions] = {};
  int64_t count = 0;
};

// The space of a row of entries.
__host__ __device__ inline Space line(int64_t entries) {
  Space space;
  space.dimensions = 1;
  space.sizes[0] = space.count = entries;
  return space;
}

// A tensor over a space; without data: one that is missing.
struct Operand {
  char* data = nullptr;
  DType dtype = DType::float32;
  int64_t strides[most_dimensions] = {};

  __host__ __device__ explicit operator bool() const { return data != nullptr; }
};

__host__ __device__ inline int bytes_of(DType dtype) {
  return dtype == DType::float32 ? 4 : dtype == DType::uint8 ? 1 : 2;
}

// The tensor from that many elements on.
__host__ __device__ inline Operand moved_by(Operand operand, int64_t elements) {
  operand.data += elements * bytes_of(operand.dtype);
  return operand;
}

// Where in a tensor the index lies, counted in elements.
__host__ __device__ inline int64_t offset_of(const Space& space, const Operand& operand, int64_t index) {
  int64_t offset = 0;
  const bool is_small = space.count <= INT32_MAX;
#pragma unroll
  for (int d = 0; d < most_dimensions; ++d) {
    if (d + 1 < space.dimensions) {
      const int64_t size = space.sizes[d];
      const int64_t outer = is_small ? static_cast<uint32_t>(index) / static_cast<uint32_t>(size) : index / size;
      offset += (index - outer * size) * operand.strides[d];
      index = outer;
    } else if (d + 1 == space.dimensions) {
      offset += index * operand.strides[d];
    }
  }
  return offset;
}

__host__ __device__ inline float to_float(uint32_t bits, DType dtype) {
  if (dtype == DType::float32) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  }
  if (dtype == DType::float16) return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  if (dtype == DType::bfloat16) return __bfloat162float(__ushort_as_bfloat16(static_cast<uint16_t>(bits)));
  return from_byte(bits);  // masks and images of bytes
}

__host__ __device__ inline uint32_t to_bits(float value, DType dtype) {
  if (dtype == DType::float16) return __half_as_ushort(__float2half_rn(value));
  if (dtype == DType::bfloat16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  uint32_t bits;
  memcpy(&bits, &value, sizeof(value));
  return bits;
}

// Rounded once, too.
__host__ __device__ inline uint32_t to_bits(double value, DType dtype) {
  if (dtype == DType::float16) return __half_as_ushort(__double2half(value));
  if (dtype == DType::bfloat16) return __bfloat16_as_ushort(__double2bfloat16(value));
  return to_bits(static_cast<float>(value), DType::float32);
}

// The element at an offset.
__device__ inline float load(const Operand& operand, int64_t offset) {
  switch (operand.dtype) {
    case DType::float32:
      return reinterpret_cast<const float*>(operand.data)[offset];
    case DType::uint8:
      return to_float(reinterpret_cast<const uint8_t*>(operand.data)[offset], operand.dtype);
    default:
      return to_float(reinterpret_cast<const uint16_t*>(operand.data)[offset], operand.dtype);
  }
}

template <typename Number>
__device__ void store(const Operand& operand, int64_t offset, Number value) {
  const uint32_t bits = to_bits(value, operand.dtype);
  if (operand.dtype == DType::float32) {
    reinterpret_cast<uint32_t*>(operand.data)[offset] = bits;
  } else {
    reinterpret_cast<uint16_t*>(operand.data)[offset] = static_cast<uint16_t>(bits);
  }
}

// What a tensor of this dtype keeps of a number.
__host__ __device__ inline float rounded(float value, DType dtype) {
  return dtype == DType::float32 ? value : to_float(to_bits(value, dtype), dtype);
}

// The elements [index, index + width) as they lie in memory.
template <int width>
struct Packed;

template <>
struct Packed<1> {
  uint32_t bits;
};

template <>
struct Packed<four> {
  uint4 low;
};

template <>
struct Packed<eight> {
  uint4 low, high;
};

template <int width>
__device__ Packed<width> fetch(const Operand& operand, const Space& space, int64_t index) {
  Packed<width> packed = {};
  if (!operand) return packed;
  if constexpr (width == 1) {
    const int64_t offset = offset_of(space, operand, index);
    switch (operand.dtype) {
      case DType::float32:
        packed.bits = reinterpret_cast<const uint32_t*>(operand.data)[offset];
        break;
      case DType::uint8:
        packed.bits = reinterpret_cast<const uint8_t*>(operand.data)[offset];
        break;
      default:
        packed.bits = reinterpret_cast<const uint16_t*>(operand.data)[offset];
    }
  } else {
    const char* at = operand.data + index * bytes_of(operand.dtype);
    if constexpr (width == four) {
      if (operand.dtype == DType::float32) {
        packed.low = *reinterpret_cast<const uint4*>(at);
      } else if (operand.dtype == DType::uint8) {
        packed.low.x = *reinterpret_cast<const uint32_t*>(at);
      } else {
        const uint2 words = *reinterpret_cast<const uint2*>(at);
        packed.low.x = words.x;
        packed.low.y = words.y;
      }
    } else if (operand.dtype == DType::uint8) {
      const uint2 bytes = *reinterpret_cast<const uint2*>(at);
      packed.low.x = bytes.x;
      packed.low.y = bytes.y;
    } else {
      packed.low = reinterpret_cast<const uint4*>(at)[0];
      if (operand.dtype == DType::float32) packed.high = reinterpret_cast<const uint4*>(at)[1];
    }
  }
  return packed;
}

template <int width>
__device__ void unpack(const Packed<width>& packed, DType dtype, float (&values)[width]) {
  if constexpr (width == 1) {
    values[0] = to_float(packed.bits, dtype);
  } else {
    uint32_t words[width] = {packed.low.x, packed.low.y, packed.low.z, packed.low.w};
    if constexpr (width == eight) {
      words[4] = packed.high.x, words[5] = packed.high.y, words[6] = packed.high.z, words[7] = packed.high.w;
    }
    const int to_a_word = 4 / bytes_of(dtype);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (to_a_word == 1) values[k] = to_float(words[k], dtype);
      if (to_a_word == 2) values[k] = to_float(words[k / 2] >> 16 * (k % 2) & 0xffff, dtype);
      if (to_a_word == 4) values[k] = to_float(words[k / 4] >> 8 * (k % 4) & 0xff, dtype);
    }
  }
}

// Writes elements, rounded to the tensor's dtype: one of four or of two bytes.
template <int width, typename Number>
__device__ void put(const Operand& operand, const Space& space, int64_t index, const Number (&values)[width]) {
  if (!operand) return;
  if constexpr (width == 1) {
    store(operand, offset_of(space, operand, index), values[0]);
  } else {
    uint32_t bits[width];
#pragma unroll
    for (int k = 0; k < width; ++k) bits[k] = to_bits(values[k], operand.dtype);
    char* at = operand.data + index * bytes_of(operand.dtype);
    uint4* wide = reinterpret_cast<uint4*>(at);
    if (operand.dtype == DType::float32) {
      wide[0] = {bits[0], bits[1], bits[2], bits[3]};
      if constexpr (width == eight) wide[1] = {bits[4], bits[5], bits[6], bits[7]};
    } else if constexpr (width == eight) {
      *wide = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16, bits[6] | bits[7] << 16};
    } else {
      *reinterpret_cast<uint2*>(at) = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
    }
  }
}

// Calls step.at<width>(space, index) for every element once, then step.finish() in every thread.
template <typename Step, int width>
__global__ void __launch_bounds__(elementwise_threads, 4) elementwise(const Space space, Step step) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * elementwise_threads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * elementwise_threads;
  const int64_t whole = space.count / width * width;
  for (int64_t index = thread * width; index < whole; index += threads * width) {
    step.template at<width>(space, index);
  }
  if (width > 1 && thread < space.count - whole) {
    Space line = space;
    line.dimensions = 1;  // which the compiler then knows
    step.template at<1>(line, whole + thread);
  }
  step.finish();
}

// The space and the operands of tensors over the sizes of the first.
template <int count>
struct Elementwise {
  Space space;
  Operand operands[count];
  bool flat;  // all lie in memory alike, and start at multiples of eight elements

  explicit Elementwise(const View* const (&views)[count]) {
    const Layout<count> layout = collapse<count>(views);
    space.dimensions = layout.dimensions;
    space.count = views[0]->count();
    flat = layout.dimensions == 1;
    for (int d = 0; d < layout.dimensions; ++d) space.sizes[d] = layout.sizes[d];
    for (int i = 0; i < count; ++i) {
      Operand& operand = operands[i];
      operand.data = static_cast<char*>(views[i]->data);
      operand.dtype = views[i]->dtype;
      for (int d = 0; d < layout.dimensions; ++d) operand.strides[d] = layout.strides[i][d];
      const int alignment = std::min(16, eight * bytes_of(operand.dtype));
      flat =
          flat && (!operand || (operand.strides[0] == 1 && reinterpret_cast<uintptr_t>(operand.data) % alignment == 0));
    }
  }

  // So many blocks that each processor has a few, whose threads then take several turns.
  template <int most = eight>
  unsigned blocks() const {
    const int64_t of_a_block = elementwise_threads * (flat ? most : 1);
    return static_cast<unsigned>(std::min((space.count + of_a_block - 1) / of_a_block, int64_t{8} * processors()));
  }

  // As many elements at a time as `most` says, where that can be done.
  template <int most = eight, typename Step>
  void run(const Step& step, cudaStream_t stream) const {
    const Launch how = {dim3(blocks<most>()), dim3(elementwise_threads), stream};
    if (flat) {
      launch<elementwise<Step, most>>(how, space, step);
    } else {
      launch<elementwise<Step, 1>>(how, space, step);
    }
  }
};

}  // namespace maskops
