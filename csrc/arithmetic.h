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

// Into [0, upper] as torch does it: NaN stays, and -0 becomes 0 on the device, while the host keeps it.
__host__ __device__ inline float relu(float value, float upper) {
#ifdef __CUDA_ARCH__
  return value != value ? value : fminf(fmaxf(value, 0.0f), upper);
#else
  return clamp(value, 0.0f, upper);
#endif
}

// Whether the gradient of a ReLU passes at its output: not at 0, and not at stop, the upper bound, or NaN without one.
__host__ __device__ inline bool passes(float output, float stop) { return output != 0 && output != stop; }

// Whether a value becomes the maximum of a window: of several equal ones the first does, of several NaN the last.
__host__ __device__ inline bool wins(float value, float best) { return value > best || value != value; }

}  // namespace maskops
