// Registers all ops with torch.
#include <string>

#include "torch_ops.h"

using maskops::binding::Op;

namespace {

std::vector<Op> all_ops() {
  std::vector<Op> all = maskops::binding::mask_ops();
  for (const auto& more : {maskops::binding::image_ops(), maskops::binding::layer_ops()}) {
    all.insert(all.end(), more.begin(), more.end());
  }
  return all;
}

}  // namespace

STABLE_TORCH_LIBRARY(maskops_cuda, library) {
  for (const Op& op : all_ops()) library.def(op.schema);
}

STABLE_TORCH_LIBRARY_IMPL(maskops_cuda, MASKOPS_DISPATCH_KEY, library) {
  for (const Op& op : all_ops()) {
    const std::string schema = op.schema;
    library.impl(schema.substr(0, schema.find('(')).c_str(), op.call);
  }
}
