// The fibers behind cuda_runtime.h, and as much of the CUDA runtime as the launchers call.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

constexpr size_t stack_bytes = 128 << 10;
constexpr size_t shared_bytes = 227 << 10;
constexpr int processors = 2;

struct Block {
  Barrier barrier;
  int counted = 0, votes = 0;
  unsigned threads = 0, rank = 0;
  std::vector<Warp> warps;
  std::vector<uint4> shared;
};

namespace {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Thread thread;
  bool done = true;
};

ucontext_t scheduler;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<std::unique_ptr<Block>> together;
Fiber* running = nullptr;
Barrier cluster_barrier;
bool progressed;
const std::function<void()>* body;

void enter() {
  (*body)();
  running->done = true;
  progressed = true;
  swapcontext(&running->context, &scheduler);
}

void start(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[stack_bytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = &scheduler;
  fiber.done = false;
  makecontext(&fiber.context, enter, 0);
}

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "CUDA emulator: %s\n", why);
  std::abort();
}

bool reversed() {
  const char* value = std::getenv("CUDA_EMULATOR_REVERSED");
  return value && *value == '1';
}

uint3 place(unsigned index, dim3 size) { return {index % size.x, index / size.x % size.y, index / size.x / size.y}; }

// Runs the blocks [first, first + count) of the grid together.
void run_together(const cudaLaunchConfig_t& config, unsigned first, unsigned count) {
  const dim3 size = config.blockDim;
  const unsigned threads = size.x * size.y * size.z;
  together.clear();
  cluster_barrier = {};
  while (fibers.size() < static_cast<size_t>(count) * threads) fibers.emplace_back(new Fiber);
  for (unsigned b = 0; b < count; ++b) {
    together.emplace_back(new Block);
    Block& block = *together.back();
    block.threads = threads;
    block.rank = b;
    block.warps.resize((threads + 31) / 32);
    block.shared.resize(config.dynamicSmemBytes / 16 + 1);
    std::memset(block.shared.data(), 0xff, block.shared.size() * 16);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = *fibers[b * threads + t];
      fiber.thread = {place(t, size), place(first + b, config.gridDim), &block, &block.warps[t / 32], t % 32};
      start(fiber);
    }
  }
  const unsigned all = count * threads;
  const bool backwards = reversed();
  for (unsigned left = all; left > 0;) {
    progressed = false;
    left = 0;
    for (unsigned i = 0; i < all; ++i) {
      Fiber& fiber = *fibers[backwards ? all - 1 - i : i];
      if (fiber.done) continue;
      running = &fiber;
      threadIdx = fiber.thread.index;
      blockIdx = fiber.thread.block_index;
      swapcontext(&scheduler, &fiber.context);
      left += !fiber.done;
    }
    if (left > 0 && !progressed) fail("all threads wait at barriers that not all of them reach");
  }
}

}  // namespace

Thread& self() { return running->thread; }

void wait_for(Barrier& barrier, unsigned threads) {
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    progressed = true;
    return;
  }
  for (const unsigned generation = barrier.generation; barrier.generation == generation;) {
    swapcontext(&running->context, &scheduler);
  }
}

void wait_for_block() { wait_for(self().block->barrier, self().block->threads); }

void wait_for_cluster() { wait_for(cluster_barrier, static_cast<unsigned>(together.size()) * self().block->threads); }

char* dynamic_shared() { return reinterpret_cast<char*>(self().block->shared.data()); }
unsigned cluster_rank() { return self().block->rank; }
unsigned cluster_size() { return static_cast<unsigned>(together.size()); }

bool is_device_memory(const void* at) {
  const char* value = std::getenv("CUDA_EMULATOR_DEVICE_MEMORY");
  return value && (!std::strcmp(value, "all") || std::strtoull(value, nullptr, 10) == reinterpret_cast<uintptr_t>(at));
}

char* shared_of(unsigned rank, const void* own) {
  const ptrdiff_t offset = static_cast<const char*>(own) - dynamic_shared();
  return reinterpret_cast<char*>(together[rank]->shared.data()) + offset;
}

void run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const unsigned blocks = config.gridDim.x * config.gridDim.y * config.gridDim.z;
  const unsigned threads = config.blockDim.x * config.blockDim.y * config.blockDim.z;
  if (threads == 0 || threads > 1024 || threads % 32) fail("a block has 32 to 1024 threads, in whole warps");
  if (config.dynamicSmemBytes > shared_bytes) fail("a block asks for more shared memory than there is");
  unsigned count = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) count = config.attrs[i].val.clusterDim.x;
    if (config.attrs[i].id == cudaLaunchAttributeCooperative) count = blocks;
  }
  if (blocks % count) fail("the grid is not a multiple of its clusters");
  body = &kernel;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  for (unsigned i = 0; i < blocks; i += count) run_together(config, reversed() ? blocks - count - i : i, count);
}

}  // namespace emulator

int __syncthreads_count(int predicate) {
  emulator::Block& block = *emulator::self().block;
  block.votes += predicate != 0;
  emulator::wait_for_block();
  const int votes = block.votes;
  emulator::wait_for_block();
  block.votes = 0;
  emulator::wait_for_block();
  return votes;
}

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::processors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = std::getenv("CUDA_EMULATOR_SM80") ? 8 : 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulator::shared_bytes;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "emulated error"; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  attributes->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}

}  // extern "C"
