// Rows moved into the L1 ball: memory is read once and written once where the row fits into a block's registers, or
// into the shared memory of a block, of a cluster or of the whole device.
#include "elements.cuh"
#include "sums.cuh"

namespace maskops {
namespace {

constexpr int octets_of_a_thread = 2;
constexpr int most_threads = 512;  // of up to 128 registers: with fewer of them some would go to memory
constexpr int longest_in_registers = most_threads * octets_of_a_thread * eight;
constexpr int short_rows_of_a_block = 8;
constexpr int least_of_a_block = 4096;
constexpr unsigned largest_cluster = 8;  // every device that knows clusters has them of this size

// The rows of a (rows, entries) tensor as they come and as they go; the second stride is from row to row.
struct Rows {
  Operand input, output;
  int64_t rows, entries;
};

__device__ Operand row_of(const Operand& rows, int64_t row) { return moved_by(rows, row * rows.strides[1]); }

// Which entry the k-th of a thread is, among those that a block takes at a time from the first on.
template <bool flat>
__device__ int64_t place(int64_t first, int k) {
  return first + (flat ? threadIdx.x * eight + k : k * blockDim.x + threadIdx.x);
}

// Eight entries of a row, zeros beyond its end: as they lie in memory, or each in a word of its own.
struct Octet {
  Packed<eight> words;
  bool is_vector;
};

template <bool flat>
__device__ Octet fetch_octet(const Operand& row, int64_t first, int64_t end) {
  const Space space = line(end);
  Octet octet;
  octet.is_vector = flat && place<flat>(first, eight - 1) < end;
  if (octet.is_vector) {
    octet.words = fetch<eight>(row, space, place<flat>(first, 0));
    return octet;
  }
  uint32_t bits[eight];
#pragma unroll
  for (int k = 0; k < eight; ++k) {
    const int64_t at = place<flat>(first, k);
    bits[k] = at < end ? fetch<1>(row, space, at).bits : 0;
  }
  octet.words = {{bits[0], bits[1], bits[2], bits[3]}, {bits[4], bits[5], bits[6], bits[7]}};
  return octet;
}

__device__ void unpack(const Octet& octet, DType dtype, float (&values)[eight]) {
  if (octet.is_vector) {
    unpack(octet.words, dtype, values);
    return;
  }
  const auto& [low, high] = octet.words;
  const uint32_t bits[eight] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int k = 0; k < eight; ++k) values[k] = to_float(bits[k], dtype);
}

template <bool flat>
__device__ void load(const Operand& row, int64_t first, int64_t end, float (&values)[eight]) {
  unpack(fetch_octet<flat>(row, first, end), row.dtype, values);
}

template <bool flat>
__device__ void store(const Operand& row, int64_t first, int64_t end, const double (&values)[eight]) {
  const Space space = line(end);
  if (flat && place<flat>(first, eight - 1) < end) {
    put(row, space, place<flat>(first, 0), values);
    return;
  }
#pragma unroll
  for (int k = 0; k < eight; ++k) {
    const int64_t at = place<flat>(first, k);
    const double one[1] = {values[k]};
    if (at < end) put(row, space, at, one);
  }
}

// Adds the magnitude if it is above the threshold, or NaN.
__device__ void add(Sum& sum, float value, float threshold) {
  const float magnitude = fabsf(value);
  if (!(magnitude <= threshold)) {
    sum.total += magnitude;
    ++sum.count;
  }
}

// How the entries of a row move.
struct Move {
  double factor;  // the scale, or the threshold
  bool project, inside;

  __device__ void operator()(const float (&values)[eight], double (&moved)[eight]) const {
#pragma unroll
    for (int k = 0; k < eight; ++k) {
      const bool stays = project && inside;
      moved[k] = stays ? values[k] : project ? soft_threshold(values[k], factor) : values[k] * factor;
    }
  }
};

// sum_above(t) is the sum of the magnitudes above t over the whole row, and their number. The zero of
// sum(max(|x| - t, 0)) - radius, which falls and is convex in t, is what Newton's steps from below end at: they have
// found it when no entry leaves the sum any more (Michelot 1986).
template <typename SumAbove>
__device__ Move find_move(double norm, double radius, bool project, int64_t entries, SumAbove sum_above) {
  Move move = {rescaling(norm, radius), project, divisor(norm) <= radius};
  if (project && divisor(norm) > radius && norm <= DBL_MAX) {
    double threshold = newton_step(0, norm, entries, radius);
    for (int64_t count = entries, before = count + 1; 0 < count && count < before;) {
      const Sum above = sum_above(round_down(threshold));
      before = count;
      count = above.count;
      threshold = newton_step(threshold, above.total, count, radius);
    }
    move.factor = threshold;
  }
  return move;
}

// A row in the registers of a block, or of one of its warps where the block has several rows.
template <bool flat>
__global__ void __launch_bounds__(most_threads, 1)
    move_rows_in_registers(const Rows rows, double radius, bool project) {
  __shared__ Sum shared[BlockSum::shared_sums];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows.rows) return;  // whole warps, which no other waits for
  const int of_a_turn = static_cast<int>(blockDim.x) * eight;
  const Operand input = row_of(rows.input, row), output = row_of(rows.output, row);
  BlockSum block_sum(shared);
  float values[octets_of_a_thread][eight];
  Octet octets[octets_of_a_thread];
#pragma unroll
  for (int o = 0; o < octets_of_a_thread; ++o) octets[o] = fetch_octet<flat>(input, o * of_a_turn, rows.entries);
#pragma unroll
  for (int o = 0; o < octets_of_a_thread; ++o) unpack(octets[o], input.dtype, values[o]);

  const auto sum_above = [&](float threshold) {
    Sum own = {0, 0};
#pragma unroll
    for (int o = 0; o < octets_of_a_thread; ++o) {
#pragma unroll
      for (int k = 0; k < eight; ++k) add(own, values[o][k], threshold);
    }
    return block_sum(own);
  };
  const Move move = find_move(sum_above(-1).total, radius, project, rows.entries, sum_above);
#pragma unroll
  for (int o = 0; o < octets_of_a_thread; ++o) {
    double moved[eight];
    move(values[o], moved);
    store<flat>(output, o * of_a_turn, rows.entries, moved);
  }
}

// A row in the shared memory of a block or of several together. Each has a slice of it, and keeps as many entries of
// that as it can: the others it reads in every pass.
struct Slices {
  Together how;
  unsigned blocks;  // of a row
  int64_t entries;  // of a slice, in eights
  int kept;         // entries of a slice, in eights
  Sum* workspace;
};

template <bool flat>
__global__ void __launch_bounds__(most_threads, 1)
    move_rows_in_shared_memory(const Rows rows, const Slices slices, double radius, bool project) {
  Sum* const shared = reinterpret_cast<Sum*>(dynamic_shared());
  float* const kept = reinterpret_cast<float*>(shared + TeamSum::shared_sums);
  TeamSum team_sum(slices.how, shared, slices.workspace);
  constexpr int of_a_turn = most_threads * eight;
  const int64_t begin = blockIdx.x % slices.blocks * slices.entries;
  const int64_t end = begin + slices.entries < rows.entries ? begin + slices.entries : rows.entries;
  const int64_t end_of_kept = begin + slices.kept < end ? begin + slices.kept : end;
  const int used = end_of_kept > begin ? static_cast<int>(end_of_kept - begin + eight - 1) / eight * eight : 0;

  for (int64_t row = blockIdx.x / slices.blocks; row < rows.rows; row += gridDim.x / slices.blocks) {
    const Operand input = row_of(rows.input, row), output = row_of(rows.output, row);
    const auto add_others = [&](Sum& own, float threshold) {
      for (int64_t first = begin + slices.kept; first < end; first += of_a_turn) {
        float values[eight];
        load<flat>(input, first, end, values);
#pragma unroll
        for (int k = 0; k < eight; ++k) {
          if (place<flat>(first, k) < end) add(own, values[k], threshold);
        }
      }
    };
    const auto sum_above = [&](float threshold) {
      Sum own = {0, 0};
      for (int at = 4 * threadIdx.x; at < used; at += 4 * most_threads) {
        const float4 four = *reinterpret_cast<const float4*>(kept + at);
        add(own, four.x, threshold);
        add(own, four.y, threshold);
        add(own, four.z, threshold);
        add(own, four.w, threshold);
      }
      add_others(own, threshold);
      return team_sum(own);
    };

    Sum own = {0, 0};
    for (int start = 0; start < used; start += octets_of_a_thread * of_a_turn) {
      Octet octets[octets_of_a_thread];
#pragma unroll
      for (int o = 0; o < octets_of_a_thread; ++o) {
        octets[o] = fetch_octet<flat>(input, begin + start + o * of_a_turn, end_of_kept);
      }
#pragma unroll
      for (int o = 0; o < octets_of_a_thread; ++o) {
        float values[eight];
        unpack(octets[o], input.dtype, values);
#pragma unroll
        for (int k = 0; k < eight; ++k) {
          add(own, values[k], -1);
          const int at = static_cast<int>(place<flat>(start + o * of_a_turn, k));
          if (at < used) kept[at] = values[k];
        }
      }
    }
    add_others(own, -1);
    const Move move = find_move(team_sum(own).total, radius, project, rows.entries, sum_above);

    for (int first = 0; first < used; first += of_a_turn) {
      float values[eight];
      double moved[eight];
#pragma unroll
      for (int k = 0; k < eight; ++k) {
        const int at = static_cast<int>(place<flat>(first, k));
        values[k] = at < used ? kept[at] : 0;
      }
      move(values, moved);
      store<flat>(output, begin + first, end_of_kept, moved);
    }
    for (int64_t first = begin + slices.kept; first < end; first += of_a_turn) {
      float values[eight];
      double moved[eight];
      load<flat>(input, first, end, values);
      move(values, moved);
      store<flat>(output, first, end, moved);
    }
  }
  team_sum.finish();
}

Operand operand_of(const View& view) {
  Operand operand;
  operand.data = static_cast<char*>(view.data);
  operand.dtype = view.dtype;
  operand.strides[0] = view.strides[1];
  operand.strides[1] = view.strides[0];
  return operand;
}

bool is_flat(const View& view) {
  const int64_t row_bytes = view.strides[0] * bytes_of(view.dtype);
  return (view.strides[1] == 1 || view.sizes[1] == 1) && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
         (row_bytes % 16 == 0 || view.sizes[0] == 1);
}

// Together so that as much of a row as possible is kept, and enough processors work.
Slices slices_of(int64_t rows, int64_t entries) {
  const int bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int capacity = (bytes - TeamSum::shared_sums * static_cast<int>(sizeof(Sum))) / 4 / eight * eight;
  const int64_t all = processors();
  const auto slices = [&](Together how, int64_t blocks) {
    const int64_t of_a_slice = ((entries + blocks - 1) / blocks + eight - 1) / eight * eight;
    return Slices{how, static_cast<unsigned>(blocks), of_a_slice,
                  static_cast<int>(std::min(of_a_slice, int64_t{capacity})), nullptr};
  };
  if (has_clusters<move_rows_in_shared_memory<true>>() && entries <= int64_t{largest_cluster} * capacity) {
    unsigned blocks = 1;
    const auto is_worth_it = [&] {
      return 2 * rows * blocks <= all && entries > int64_t{2} * least_of_a_block * blocks;
    };
    while (blocks < largest_cluster && (entries > int64_t{blocks} * capacity || is_worth_it())) blocks *= 2;
    return slices(blocks > 1 ? Together::cluster : Together::alone, blocks);
  }
  // what the blocks of a grid wait for each other is about what one of them needs for as many entries as it keeps
  if (entries <= rows * capacity) return slices(Together::alone, 1);
  return slices(Together::grid, std::min(all, (entries + least_of_a_block - 1) / least_of_a_block));
}

}  // namespace

int64_t l1_ball_workspace(int64_t rows, int64_t entries) {
  if (rows == 0 || entries <= longest_in_registers) return 0;
  const Slices slices = slices_of(rows, entries);
  return slices.how == Together::grid ? 2 * slices.blocks * static_cast<int64_t>(sizeof(Sum)) : 0;
}

void l1_ball(const View& output, const View& input, void* workspace, double radius, bool project, cudaStream_t stream) {
  const Rows rows = {operand_of(input), operand_of(output), input.sizes[0], input.sizes[1]};
  if (rows.rows == 0 || rows.entries == 0) return;
  const bool flat = is_flat(input) && is_flat(output);
  if (rows.entries <= longest_in_registers) {
    const int64_t of_a_thread = octets_of_a_thread * eight;
    const unsigned warps = static_cast<unsigned>((rows.entries + 32 * of_a_thread - 1) / (32 * of_a_thread));
    const unsigned together = warps == 1 ? short_rows_of_a_block : 1;
    const dim3 grid(static_cast<unsigned>((rows.rows + together - 1) / together)), block(32 * warps, together);
    if (flat) {
      launch<move_rows_in_registers<true>>({grid, block, stream}, rows, radius, project);
    } else {
      launch<move_rows_in_registers<false>>({grid, block, stream}, rows, radius, project);
    }
    return;
  }
  Slices slices = slices_of(rows.rows, rows.entries);
  slices.workspace = static_cast<Sum*>(workspace);
  Launch how = {dim3(slices.blocks), dim3(most_threads), stream};
  how.shared = TeamSum::shared_sums * sizeof(Sum) + slices.kept * sizeof(float);
  how.cooperative = slices.how == Together::grid;
  how.cluster = slices.how == Together::cluster ? slices.blocks : 1;
  if (!how.cooperative) how.grid.x = static_cast<unsigned>(rows.rows * slices.blocks);
  if (flat) {
    launch<move_rows_in_shared_memory<true>>(how, rows, slices, radius, project);
  } else {
    launch<move_rows_in_shared_memory<false>>(how, rows, slices, radius, project);
  }
}

}  // namespace maskops
