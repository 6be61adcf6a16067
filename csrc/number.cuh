// Numbers of any dtype that lie in memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace maskops {

__host__ __device__ inline double read(const Number& number) {
  switch (number.type) {
    case Number::float64:
      return *static_cast<const double*>(number.data);
    case Number::float32:
      return *static_cast<const float*>(number.data);
    case Number::float16:
      return __half2float(__ushort_as_half(*static_cast<const uint16_t*>(number.data)));
    case Number::bfloat16:
      return __bfloat162float(__ushort_as_bfloat16(*static_cast<const uint16_t*>(number.data)));
    case Number::int64:
      return static_cast<double>(*static_cast<const int64_t*>(number.data));
    case Number::int32:
      return *static_cast<const int32_t*>(number.data);
    case Number::int16:
      return *static_cast<const int16_t*>(number.data);
    case Number::int8:
      return *static_cast<const int8_t*>(number.data);
    default:
      return *static_cast<const uint8_t*>(number.data);
  }
}

__host__ __device__ inline void write(const Number& number, double value) {
  const float single = static_cast<float>(value);
  switch (number.type) {
    case Number::float64:
      *static_cast<double*>(number.data) = value;
      break;
    case Number::float32:
      *static_cast<float*>(number.data) = single;
      break;
    case Number::float16:
      *static_cast<uint16_t*>(number.data) = __half_as_ushort(__float2half_rn(single));
      break;
    case Number::bfloat16:
      *static_cast<uint16_t*>(number.data) = __bfloat16_as_ushort(__float2bfloat16_rn(single));
      break;
    case Number::int64:
      *static_cast<int64_t*>(number.data) = static_cast<int64_t>(value);
      break;
    case Number::int32:
      *static_cast<int32_t*>(number.data) = static_cast<int32_t>(value);
      break;
    case Number::int16:
      *static_cast<int16_t*>(number.data) = static_cast<int16_t>(value);
      break;
    case Number::int8:
      *static_cast<int8_t*>(number.data) = static_cast<int8_t>(value);
      break;
    default:
      *static_cast<uint8_t*>(number.data) = static_cast<uint8_t>(value);
  }
}

// A number as kernels take it: one of the host's is at hand, one of the device's is read where it is needed.
struct Given {
  Number stored;
  float at_hand;

  explicit Given(const Number& number)
      : stored(number), at_hand(number.on_host && number.data ? static_cast<float>(read(number)) : 0.0f) {}

  __device__ float value() const { return stored.on_host ? at_hand : static_cast<float>(read(stored)); }
};

}  // namespace maskops
