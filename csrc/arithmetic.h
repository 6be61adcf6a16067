// What one thread computes for one element, on the device and on the host.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <cuda_runtime.h>

namespace maskops {

// 1, 0 or -1; 0 of NaN, as torch has it.
__host__ __device__ inline float sign(float value) { return value > 0 ? 1.0f : value < 0 ? -1.0f : 0.0f; }

// Into [low, high]; NaN stays.
__host__ __device__ inline float clamp(float value, float low, float high) {
  return value < low ? low : value > high ? high : value;
}

// Into [low, high]; NaN stays, and low wins over high.
__host__ __device__ inline float into_bounds(float value, float low, float high) {
  value = value > high ? high : value;
  return value >= low || value != value ? value : low;
}

// The mask's gradient with that of l1 * |mask - toward|.
__host__ __device__ inline float mask_gradient(float mask, float grad, float l1, float toward) {
  return l1 == 0 ? grad : grad + l1 * sign(mask - toward);
}

// Adam's numbers, the complements of the betas rounded once.
struct Adam {
  float beta1, beta2, complement1, complement2, eps;

  Adam(double beta1, double beta2, double eps)
      : beta1(static_cast<float>(beta1)),
        beta2(static_cast<float>(beta2)),
        complement1(static_cast<float>(1 - beta1)),
        complement2(static_cast<float>(1 - beta2)),
        eps(static_cast<float>(eps)) {}
};

// What a step's count makes of the learning rate and of the second moments' roots: the bias corrections.
struct AdamScales {
  float step_size, root_scale;
  uint32_t count;
};

__host__ __device__ inline AdamScales adam_scales(double count, double lr, double beta1, double beta2) {
  return {static_cast<float>(lr / (1 - pow(beta1, count))), static_cast<float>(1 / sqrt(1 - pow(beta2, count))),
          static_cast<uint32_t>(count)};
}

// 16 bits that a hash (lowbias32) makes of an entry's place and a step's count.
__host__ __device__ inline uint32_t chance(uint32_t entry, uint32_t count) {
  uint32_t bits = entry ^ (count * 0x9e3779b9u);
  bits = (bits ^ (bits >> 16)) * 0x7feb352du;
  bits = (bits ^ (bits >> 15)) * 0x846ca68bu;
  return (bits ^ (bits >> 16)) & 0xffffu;
}

// The bfloat16 above or below: the nearer it is, the more of all chances lead to it.
__host__ __device__ inline float rounded_by(uint32_t chance, float value) {
  if (!(fabsf(value) <= FLT_MAX)) return value;
  uint32_t bits;
  memcpy(&bits, &value, sizeof(value));
  bits = (bits + chance) & 0xffff0000u;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

__host__ __device__ inline void average_moments(float grad, const Adam& adam, float& first, float& second) {
  // the branches of torch.lerp
  first = adam.complement1 < 0.5f ? first + adam.complement1 * (grad - first) : grad - (grad - first) * adam.beta1;
  second = second * adam.beta2 + adam.complement2 * grad * grad;
}

__host__ __device__ inline float adam_step(float mask, float first, float second, float eps, AdamScales scales) {
  return mask - first / (sqrtf(second) * scales.root_scale + eps) * scales.step_size;
}

__host__ __device__ inline float momentum_step(float buffer, float grad, float momentum) {
  return buffer * momentum + grad;
}

__host__ __device__ inline float sgd_step(float mask, float step, float lr) { return mask - step * lr; }

__host__ __device__ inline float noise_step(float noise, float grad, float step_size, float bound) {
  return clamp(noise + step_size * sign(grad), -bound, bound);
}

// The largest float that isn't above the value: a float is above the one where it is above the other.
__host__ __device__ inline float round_down(double value) {
  const float nearest = static_cast<float>(value);
  return nearest > value ? nextafterf(nearest, -FLT_MAX) : nearest;
}

// An L1 norm by which one can divide: of zeros the smallest normal number.
__host__ __device__ inline double divisor(double norm) { return norm < DBL_MIN ? DBL_MIN : norm; }

// What brings a vector of this norm into the ball. NaN unless the norm is finite.
__host__ __device__ inline double rescaling(double norm, double radius) {
  norm = divisor(norm);
  return radius / (norm < radius ? radius : norm) + (norm - norm);
}

// From a threshold to the next by Newton's method, where the entries above it have this sum: never past the one at
// which what is above it sums to the radius.
__host__ __device__ inline double newton_step(double threshold, double total, int64_t count, double radius) {
  const double next = count > 0 ? (total - radius) / static_cast<double>(count) : threshold;
  return next > threshold ? next : threshold;
}

// Nearer to zero by the threshold, and no farther than zero, whose sign then is the value's. NaN where either is.
__host__ __device__ inline double soft_threshold(float value, double threshold) {
  double excess = fabs(static_cast<double>(value)) - threshold;
  excess = excess < 0 ? 0 : excess;
  return value < 0 ? -excess : excess;
}

// A byte in steps of 1/255, rounded once: 1/255 in two parts, of which the first product is exact.
__host__ __device__ inline float from_byte(uint32_t byte) {
  const float value = static_cast<float>(byte);
  return fmaf(value, 1.5318628356908448e-05f, value * 0.00390625f);
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
