// What one thread computes for one element, on the device and on the host.
#pragma once

#include <cmath>

#include <cuda_runtime.h>

namespace maskops {

// 1, 0 or -1; NaN of NaN.
__host__ __device__ inline float sign(float value) {
  return value > 0 ? 1.0f : value < 0 ? -1.0f : value == 0 ? 0.0f : value;
}

// Into [low, high]; NaN stays.
__host__ __device__ inline float clamp(float value, float low, float high) {
  return value < low ? low : value > high ? high : value;
}

__host__ __device__ inline float noise_step(float noise, float grad, float step_size, float bound) {
  return clamp(noise + step_size * sign(grad), -bound, bound);
}

}  // namespace maskops
