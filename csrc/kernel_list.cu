// The list of all kernels, and what the driver says of each.
#include "launch.cuh"

namespace maskops {
namespace {

struct Entry {
  const void* kernel;
  std::string name;
};

std::vector<Entry>& entries() {
  static std::vector<Entry> list;
  return list;
}

// "noise_kernel" of "int maskops::enlist_kernel() [with auto kernel = maskops::{anonymous}::noise_kernel]"
std::string name_of(const std::string& signature) {
  const size_t begin = signature.find("kernel = ") + 9, end = signature.rfind(']');
  std::string name = signature.substr(begin, end - begin);
  for (const char* prefix : {"&", "maskops::", "{anonymous}::", "<unnamed>::", "(anonymous namespace)::"}) {
    for (size_t at; (at = name.find(prefix)) != std::string::npos;) name.erase(at, std::string(prefix).size());
  }
  return name;
}

}  // namespace

int enlist(const void* kernel, const char* signature) {
  entries().push_back({kernel, name_of(signature)});
  return static_cast<int>(entries().size());
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const Entry& entry : entries()) names.push_back(entry.name);
  return names;
}

std::vector<KernelAttributes> kernel_attributes() {
  std::vector<KernelAttributes> all;
  for (const Entry& entry : entries()) {
    cudaFuncAttributes found = {};
    check(cudaFuncGetAttributes(&found, entry.kernel), "kernel_attributes");
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, entry.kernel, found.maxThreadsPerBlock, 0),
          "kernel_attributes");
    all.push_back({entry.name, found.numRegs, static_cast<int>(found.localSizeBytes),
                   static_cast<int>(found.sharedSizeBytes), found.maxThreadsPerBlock, blocks});
  }
  return all;
}

}  // namespace maskops
