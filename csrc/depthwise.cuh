// What the kernels of depthwise convolutions share: which part of the work a thread does, rows of images in registers,
// effective filters in shared memory.
//
// A thread has a few neighbouring channels of a strip of columns, and walks down the rows; one channel, where channels
// are not innermost in memory or can't be loaded together. Loads stay packed until the row before them has been
// computed. The dtypes are read at run time, once for a row.
#pragma once

#include "elements.cuh"

namespace maskops {

constexpr int depthwise_threads = 128;
constexpr int warps_of_a_block = depthwise_threads / 32;
constexpr int most_channel_groups = 32;

// The images of a batch, (images, channels, rows, columns).
struct Images {
  Operand elements;
  int rows = 0, columns = 0;
  bool packed = false;  // what a thread takes of a row at once lies side by side in memory, and aligned

  __device__ int64_t offset(int image, int channel, int row, int column) const {
    return image * elements.strides[0] + channel * elements.strides[1] + row * elements.strides[2] +
           column * elements.strides[3];
  }
};

// weight * (mask + noise) of shape (channels, rows, columns), or the weight alone; strides of 0 where a factor is
// broadcast.
struct Filter {
  Operand weight, mask, noise;

  __device__ float at(int channel, int row, int column) const {
    const auto value = [&](const Operand& factor) {
      return load(factor, channel * factor.strides[0] + row * factor.strides[1] + column * factor.strides[2]);
    };
    if (!mask) return value(weight);
    const float factor = noise ? __fadd_rn(value(mask), value(noise)) : value(mask);
    return __fmul_rn(value(weight), factor);
  }
};

// Which block and thread does what: a block has 2^group_bits groups of channels, and 128 / 2^group_bits lanes. A lane
// is a strip of columns of an image. Neighbouring threads have neighbouring channels, or neighbouring lanes.
struct Lanes {
  bool channels_first;
  int group_bits, channels, channel_blocks, strips;
  int64_t count;
};

struct Place {
  int group, lane;             // within the block
  int block_channel, channel;  // the first of the block, and of the thread
};

__device__ inline Place place(const Lanes& lanes, int group_channels, int channel_block) {
  const int thread = threadIdx.x, lane_bits = 7 - lanes.group_bits;
  Place at;
  at.group = lanes.channels_first ? thread & ((1 << lanes.group_bits) - 1) : thread >> lane_bits;
  at.lane = lanes.channels_first ? thread >> lanes.group_bits : thread & ((1 << lane_bits) - 1);
  at.block_channel = (channel_block << lanes.group_bits) * group_channels;
  at.channel = at.block_channel + at.group * group_channels;
  return at;
}

// Columns of a row for some channels, as they lie in memory: elements [begin, end) in groups of neighbours, with two of
// 16 bits to a word; the others alone.
template <int columns_, int channels_, int begin_, int end_, int group_>
struct Row {
  static constexpr int columns = columns_, channels = channels_, begin = begin_, end = end_, group = group_;
  static constexpr int count = columns * channels;
  uint32_t words[count];

  __host__ __device__ static constexpr bool alone(int e) { return e < begin || e >= end; }
  __host__ __device__ static constexpr bool leads(int e) { return alone(e) || (e - begin) % group == 0; }
  __host__ __device__ static constexpr int leader(int e) { return alone(e) ? e : e - (e - begin) % group; }
  // the word of a 16-bit element, and which half of it
  __host__ __device__ static constexpr int word(int e) { return leader(e) + (e - leader(e)) / 2; }
  __host__ __device__ static constexpr int half(int e) { return (e - leader(e)) % 2; }
};

// A row of channels_last images: all of a thread's channels are a group; else groups of four columns, from the first
// that is a multiple of four.
template <int columns, int channels, int begin, int length>
using RowOf = Row<columns, channels, channels == 1 ? begin : 0,
                  channels == 1 ? (begin + length < columns ? begin + length : columns) : columns * channels,
                  channels == 1 ? 4 : channels>;

// The value, of which the compiler doesn't know that it is always the same: else it keeps all multiples of it that a
// loop needs in registers.
__device__ inline int hidden(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The columns from `column` on; column 0 is at `offset`. Zeros outside.
template <typename Row>
__device__ void fetch_row(Row& row, const Images& images, int64_t offset, int column, bool inside) {
#pragma unroll
  for (int e = 0; e < Row::count; ++e) row.words[e] = 0;
  if (!inside) return;
  const int step = hidden(static_cast<int>(images.elements.strides[3]));
  offset += static_cast<int64_t>(column) * step;
  const auto is_inside = [&](int e) {
    return static_cast<unsigned>(column + e / Row::channels) < static_cast<unsigned>(images.columns);
  };
  if (Row::channels > 1 || images.packed) {
    if (images.elements.dtype == DType::float32) {
      const float* from = reinterpret_cast<const float*>(images.elements.data) + offset;
#pragma unroll
      for (int e = 0; e < Row::count; ++e) {
        if (!Row::leads(e) || !is_inside(e)) continue;
        const float* at = from + e / Row::channels * step;
        if (Row::alone(e)) {
          row.words[e] = __float_as_uint(*at);
        } else if constexpr (Row::group == 4) {
          const uint4 four = *reinterpret_cast<const uint4*>(at);
          row.words[e] = four.x, row.words[e + 1] = four.y, row.words[e + 2] = four.z, row.words[e + 3] = four.w;
        } else {
          const uint2 two = *reinterpret_cast<const uint2*>(at);
          row.words[e] = two.x, row.words[e + 1] = two.y;
        }
      }
    } else {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(images.elements.data) + offset;
#pragma unroll
      for (int e = 0; e < Row::count; ++e) {
        if (!Row::leads(e) || !is_inside(e)) continue;
        const uint16_t* at = from + e / Row::channels * step;
        if (Row::alone(e)) {
          row.words[e] = *at;
        } else if constexpr (Row::group == 4) {
          const uint2 two = *reinterpret_cast<const uint2*>(at);
          row.words[e] = two.x, row.words[e + 1] = two.y;
        } else {
          row.words[e] = *reinterpret_cast<const uint32_t*>(at);
        }
      }
    }
    return;
  }
  if constexpr (Row::channels == 1) {
    if (images.elements.dtype == DType::float32) {
      const uint32_t* from = reinterpret_cast<const uint32_t*>(images.elements.data) + offset;
#pragma unroll
      for (int e = 0; e < Row::count; ++e) {
        if (is_inside(e)) row.words[e] = from[e * step];
      }
    } else {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(images.elements.data) + offset;
#pragma unroll
      for (int e = 0; e < Row::count; ++e) {
        if (is_inside(e)) row.words[Row::word(e)] |= uint32_t{from[e * step]} << 16 * Row::half(e);
      }
    }
  }
}

template <typename Row>
__device__ void unpack_row(const Row& row, DType dtype, float (&values)[Row::count]) {
  if (dtype == DType::float32) {
#pragma unroll
    for (int e = 0; e < Row::count; ++e) values[e] = __uint_as_float(row.words[e]);
  } else if (dtype == DType::bfloat16) {
#pragma unroll
    for (int e = 0; e < Row::count; ++e) {
      const uint32_t word = row.words[Row::word(e)];
      values[e] = __uint_as_float(Row::half(e) ? word & 0xffff0000u : word << 16);
    }
  } else {
#pragma unroll
    for (int e = 0; e < Row::count; ++e) {
      const uint32_t word = row.words[Row::word(e)];
      values[e] = __half2float(__ushort_as_half(static_cast<uint16_t>(Row::half(e) ? word >> 16 : word)));
    }
  }
}

// Writes the columns from `column` on that are inside.
template <typename Row>
__device__ void put_row(const float (&values)[Row::count], const Images& images, int64_t offset, int column) {
  const DType dtype = images.elements.dtype;
  const int step = hidden(static_cast<int>(images.elements.strides[3]));
  offset += static_cast<int64_t>(column) * step;
  const auto is_inside = [&](int e) {
    return static_cast<unsigned>(column + e / Row::channels) < static_cast<unsigned>(images.columns);
  };
  Row row;
  if (dtype == DType::float32) {
#pragma unroll
    for (int e = 0; e < Row::count; ++e) row.words[e] = __float_as_uint(values[e]);
  } else {
    __half2 halves;
    __nv_bfloat162 brains;
#pragma unroll
    for (int e = 0; e < Row::count; e += 2) {
      if (dtype == DType::float16) {
        halves = __floats2half2_rn(values[e], values[e + 1]);
        memcpy(&row.words[Row::word(e)], &halves, 4);
      } else {
        brains = __floats2bfloat162_rn(values[e], values[e + 1]);
        memcpy(&row.words[Row::word(e)], &brains, 4);
      }
    }
  }
  if (Row::channels > 1 || images.packed) {
#pragma unroll
    for (int e = 0; e < Row::count; e += Row::group) {
      if (!is_inside(e)) continue;
      const int64_t at = offset + e / Row::channels * step;
      if (dtype == DType::float32) {
        float* to = reinterpret_cast<float*>(images.elements.data) + at;
        if constexpr (Row::group == 4) {
          *reinterpret_cast<uint4*>(to) = {row.words[e], row.words[e + 1], row.words[e + 2], row.words[e + 3]};
        } else {
          *reinterpret_cast<uint2*>(to) = {row.words[e], row.words[e + 1]};
        }
      } else {
        uint16_t* to = reinterpret_cast<uint16_t*>(images.elements.data) + at;
        if constexpr (Row::group == 4) {
          *reinterpret_cast<uint2*>(to) = {row.words[e], row.words[e + 1]};
        } else {
          *reinterpret_cast<uint32_t*>(to) = row.words[e];
        }
      }
    }
    return;
  }
  if constexpr (Row::channels == 1) {
#pragma unroll
    for (int e = 0; e < Row::count; ++e) {
      if (!is_inside(e)) continue;
      if (dtype == DType::float32) {
        reinterpret_cast<uint32_t*>(images.elements.data)[offset + e * step] = row.words[e];
      } else {
        reinterpret_cast<uint16_t*>(images.elements.data)[offset + e * step] =
            static_cast<uint16_t>(row.words[Row::word(e)] >> 16 * Row::half(e));
      }
    }
  }
}

inline bool channels_innermost(const View& images) { return images.strides[1] < images.strides[3]; }

// `group` neighbours along a dimension, channels or columns, are taken at once where memory allows it.
inline Images images_of(const View& view, int dimension, int group) {
  Images images;
  images.elements.data = static_cast<char*>(view.data);
  images.elements.dtype = view.dtype;
  images.rows = static_cast<int>(view.sizes[2]);
  images.columns = static_cast<int>(view.sizes[3]);
  images.packed = view.strides[dimension] == 1 && view.sizes[dimension] % group == 0 &&
                  reinterpret_cast<uintptr_t>(view.data) % (group * bytes_of(view.dtype)) == 0;
  for (int d = 0; d < 4; ++d) {
    images.elements.strides[d] = view.strides[d];
    images.packed = images.packed && (d == dimension || view.sizes[d] == 1 || view.strides[d] % group == 0);
  }
  return images;
}

// Whether a walk can count its way along a row in 32 bits.
inline bool can_walk(const View& images) { return images.strides[3] < 1 << 26; }

inline int64_t blocks_for(int64_t count, int64_t of_a_block) { return (count + of_a_block - 1) / of_a_block; }

// The smallest power of two that holds count, at most 2^most.
inline int bits_for(int64_t count, int most) {
  int bits = 0;
  while (bits < most && int64_t{1} << bits < count) ++bits;
  return bits;
}

// Lanes for strips of so many columns.
inline Lanes lanes_of(const View& images, bool channels_first, int group_channels, int columns, int least_lane_bits) {
  Lanes lanes;
  const int64_t groups = blocks_for(images.sizes[1], group_channels);
  lanes.channels_first = channels_first;
  lanes.channels = static_cast<int>(images.sizes[1]);
  lanes.strips = static_cast<int>(blocks_for(images.sizes[3], columns));
  lanes.count = images.sizes[0] * lanes.strips;
  if (channels_first) {
    lanes.group_bits = bits_for(groups, 5);
    // few threads for channels that aren't there
    while (lanes.group_bits > 2 && blocks_for(groups, 1 << lanes.group_bits) * 8 << lanes.group_bits > groups * 9) {
      --lanes.group_bits;
    }
  } else {
    lanes.group_bits = 7 - std::max(bits_for(lanes.count, 7), least_lane_bits);
  }
  lanes.channel_blocks = static_cast<int>(blocks_for(groups, 1 << lanes.group_bits));
  return lanes;
}

// So many blocks that each processor has four; a block takes at least so many of the rows.
inline int64_t rows_of_a_block(int64_t rows, int64_t blocks, int64_t least) {
  const int64_t wanted = blocks_for(4 * processors(), std::max<int64_t>(blocks, 1));
  return blocks_for(rows, std::max<int64_t>(std::min(wanted, rows / least), 1));
}

}  // namespace maskops
