// The ops as torch sees them, by the source that has them: outputs are allocated, kernels are launched on the current
// stream of the tensors' device. Python has checked shapes and dtypes.
#pragma once

#include <vector>

#include <torch/csrc/stable/library.h>

namespace maskops::binding {

struct Op {
  const char* schema;
  void (*call)(StableIValue*, uint64_t, uint64_t);
};

std::vector<Op> mask_ops();
std::vector<Op> image_ops();
std::vector<Op> layer_ops();

}  // namespace maskops::binding
