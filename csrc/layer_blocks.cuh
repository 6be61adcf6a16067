// One launch over many layers: which of its blocks work on which of them, and how their threads share sums.
#pragma once

#include "elements.cuh"
#include "sums.cuh"

namespace maskops {

inline __host__ __device__ int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

template <int most>
struct LayerBlocks {
  int layers = 0;
  unsigned first_block[most + 1] = {};

  void add(int64_t blocks) {
    first_block[layers + 1] = first_block[layers] + static_cast<unsigned>(blocks);
    ++layers;
  }

  unsigned blocks() const { return first_block[layers]; }

  // The layer of this block.
  __device__ int find() const {
    int low = 0, high = layers - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_block[middle] <= blockIdx.x) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

constexpr int sum_threads = 256;
constexpr int64_t terms_of_a_thread = 32;
constexpr int64_t terms_of_a_warp = 2048;
constexpr int64_t terms_of_a_block = 32768;

// A thread's part of the sum that is one entry of a result.
struct Share {
  int64_t entry, begin, end;  // terms
  int lane, lanes;
};

// How sums are divided: few terms are summed by one thread, whose neighbours sum those of neighbouring entries, more by
// a warp or by a block, very many by several blocks, whose parts a second launch adds up. The number of processors has
// no say in it, so that all devices add up in the same order.
struct Division {
  int64_t entries, terms, parts;
  int lanes;

  // Without a workspace each sum has one part.
  __host__ __device__ Division(int64_t entries, int64_t terms, bool has_workspace)
      : entries(entries),
        terms(terms),
        parts(has_workspace && terms > terms_of_a_block ? divide_up(terms, terms_of_a_block) : 1),
        lanes(terms <= terms_of_a_thread ? 1
              : terms <= terms_of_a_warp ? 32
                                         : sum_threads) {}

  int64_t blocks() const { return divide_up(entries * parts, sum_threads / lanes); }

  __device__ Share share(int64_t block) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t sum = block * (sum_threads / lanes) + thread / lanes;
    if (parts == 1) return {sum, 0, terms, thread % lanes, lanes};
    const int64_t entry = sum / parts, begin = (sum - entry * parts) * terms_of_a_block;
    return {entry, begin, min(terms, begin + terms_of_a_block), thread, lanes};
  }
};

// The sum of a thread's terms, which always have the same order. The terms say how some are fetched and how they are
// added to a total: `width` at a time where they lie in a row, else four whose loads are under way together.
template <int width, typename Terms>
__device__ double total_of(const Terms& terms, bool in_a_row, const Share& share) {
  constexpr int loads = 4;
  double total = 0;
  int64_t begin = share.begin;
  if (in_a_row) {
    const int64_t whole = begin + (share.end - begin) / width * width;
    for (int64_t term = begin + share.lane * width; term < whole; term += share.lanes * width) {
      total = terms.add(total, terms.template fetch<width>(term));
    }
    begin = whole;
  }
  int64_t term = begin + share.lane;
  for (; term + (loads - 1) * share.lanes < share.end; term += loads * share.lanes) {
    decltype(terms.template fetch<1>(term)) fetched[loads];
#pragma unroll
    for (int k = 0; k < loads; ++k) fetched[k] = terms.template fetch<1>(term + k * share.lanes);
#pragma unroll
    for (int k = 0; k < loads; ++k) total = terms.add(total, fetched[k]);
  }
#pragma unroll 1
  for (; term < share.end; term += share.lanes) total = terms.add(total, terms.template fetch<1>(term));
  return total;
}

// Adds up the totals of the threads that share a sum: lane 0 has the result.
__device__ inline double over_lanes(double own, int lanes) {
  __shared__ Sum shared[BlockSum::shared_sums];
  if (lanes == 1) return own;
  return lanes == 32 ? over_warp({own, 0}).total : BlockSum(shared)({own, 0}).total;
}

// Adds up the parts of entries, a warp for each in turn: store(entry, total). The workspace has one number for each
// block of the launch before.
template <typename Store>
__device__ void add_parts(const Division& division, const double* workspace, const Store& store) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t entry = warp; entry < division.entries; entry += sum_threads / 32) {
    double total = 0;
    for (int64_t part = lane; part < division.parts; part += 32) total += workspace[entry * division.parts + part];
    total = over_warp({total, 0}).total;
    if (lane == 0) store(entry, total);
  }
}

// An element, or some that lie in a row, at an offset.
template <int width>
__device__ Packed<width> fetch_at(const Operand& operand, int64_t offset) {
  return fetch<width>({operand.data, operand.dtype, {1}}, line(1), offset);
}

inline bool is_aligned(const View& view) { return reinterpret_cast<uintptr_t>(view.data) % 16 == 0; }

}  // namespace maskops
