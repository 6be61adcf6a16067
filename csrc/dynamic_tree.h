// Numbers of eight bits: dynamic tree quantisation (Dettmers et al. 2022, 8-bit Optimizers via Block-wise
// Quantization).
//
// A code stands for a magnitude in [0, 1]: for 0, for 1, or for the middle of one of the equal pieces into which a
// decade is cut. There are seven decades, from 1e-7 to 1; each has twice as many pieces as the one below. Signed codes
// spend their first bit on the sign, unsigned ones on twice as many pieces.
#pragma once

#include <cstdint>
#include <cstring>

#include <cuda_runtime.h>

namespace maskops {

constexpr int tree_codes = 256;

// What a code is looked up in: half as many magnitudes where codes have a sign.
//
// The code of a magnitude is the number of midpoints between codes' values below it; of those without a sign the first
// is 0, because no second moment above 0 may become 0. The leading bits of the float say all of these but for two at
// most, with which it is compared.
template <bool is_signed>
struct DynamicTree {
  static constexpr int magnitudes = is_signed ? 129 : 256;
  static constexpr int zero = is_signed ? 127 : 0;      // the code of 0
  static constexpr int bits = is_signed ? 5 : 6;        // of a float's fraction that tell its bin
  static constexpr int lowest = is_signed ? -22 : -23;  // the exponent of the first bin
  static constexpr int bins = (-lowest << bits) + 1;    // up to 1
  static constexpr uint32_t first_bin = static_cast<uint32_t>(127 + lowest) << bits;

  float values[tree_codes];
  float midpoints[magnitudes + 1];
  uint8_t starts[(bins + 3) / 4 * 4];  // the number of midpoints below each bin

  static constexpr DynamicTree make() {
    DynamicTree tree = {};
    double above[magnitudes] = {};
    constexpr double powers[] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
    int pieces = is_signed ? 1 : 2, m = 1;
    for (int decade = 0; decade < 7; ++decade, pieces *= 2) {
      for (int piece = 0; piece < pieces; ++piece, ++m) {
        const double fraction = (pieces + piece + 0.5) / pieces - 1;
        above[m] = static_cast<float>(powers[decade] * (0.1 + 0.9 * fraction));
      }
    }
    above[m] = 1;
    for (int i = 0; i < magnitudes; ++i) tree.values[zero + i] = static_cast<float>(above[i]);
    for (int i = 1; i <= zero; ++i) tree.values[zero - i] = static_cast<float>(-above[i]);
    for (int i = 0; i + 1 < magnitudes; ++i) tree.midpoints[i] = static_cast<float>((above[i] + above[i + 1]) / 2);
    if (!is_signed) tree.midpoints[0] = 0;
    tree.midpoints[magnitudes - 1] = tree.midpoints[magnitudes] = 4;  // above all magnitudes
    int below = 0;
    double power = 1;
    for (int exponent = lowest; exponent < 0; ++exponent) power /= 2;
    for (int bin = 0; bin < bins; ++bin) {
      const double start = power * (1 + bin % (1 << bits) / static_cast<double>(1 << bits));
      while (tree.midpoints[below] < start) ++below;
      tree.starts[bin] = static_cast<uint8_t>(bin > 0 ? below : 0);  // what is below the first bin is taken for in it
      if ((bin + 1) % (1 << bits) == 0) power *= 2;
    }
    return tree;
  }

  // Whether no bin holds more midpoints than a magnitude is compared with.
  constexpr bool is_sound() const {
    for (int bin = 0; bin + 1 < bins; ++bin) {
      if (starts[bin + 1] - starts[bin] > 2) return false;
    }
    return magnitudes - 1 - starts[bins - 1] <= 2;
  }

  // The code of the nearest value, and the lower one of two as near. -1 is as good as the value next to it.
  __host__ __device__ int code(float value) const {
    uint32_t all;
    memcpy(&all, &value, sizeof(all));
    const uint32_t negative = is_signed ? all >> 31 : 0, magnitude = all & 0x7fffffffu;
    const int bin = static_cast<int>(magnitude >> (23 - bits)) - static_cast<int>(first_bin);
    const int start = starts[bin < 0 ? 0 : bin < bins ? bin : bins - 1];
    // at a midpoint the lower value is the larger magnitude of two negative ones: of a float the next one is above it
    const uint32_t bits_above = magnitude + negative;
    float compared;
    memcpy(&compared, &bits_above, sizeof(compared));
    const int above = start + (compared > midpoints[start]) + (compared > midpoints[start + 1]);
    return negative ? zero - (above < zero ? above : zero) : zero + above;
  }
};

}  // namespace maskops
