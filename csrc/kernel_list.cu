// The list of all kernels, and what the driver says of each.
#include <regex>

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

// "relu_kernel<true>" of "int maskops::enlist_kernel() [with auto kernel = maskops::{anonymous}::relu_kernel<true>]":
// no namespaces, by whatever words the compiler says that one has no name.
std::string name_of(const std::string& signature) {
  const size_t begin = signature.find("kernel = ") + 9;
  const std::string name = signature.substr(begin, signature.rfind(']') - begin);
  return std::regex_replace(name, std::regex(R"(&|(\w+|\{anonymous\}|<unnamed>|\(anonymous namespace\))::)"), "");
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
