// The Python module maskops._C: importing it registers the ops of namespace maskops_cuda.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "The CUDA kernels. Importing it registers the ops of torch.ops.maskops_cuda.";
  module.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = MASKOPS_COMPILER;
        info["architectures"] = MASKOPS_ARCHITECTURES;
        info["flags"] = MASKOPS_FLAGS;
        info["revision"] = MASKOPS_REVISION;
        return info;
      },
      "What the module was built with: compiler, architectures, flags and the revision of the sources.");
  module.def("kernel_names", &maskops::kernel_names, "The names of all kernels.");
  module.def(
      "kernel_attributes",
      [] {
        py::dict kernels;
        for (const maskops::KernelAttributes& kernel : maskops::kernel_attributes()) {
          py::dict attributes;
          attributes["registers"] = kernel.registers;
          attributes["local_bytes"] = kernel.local_bytes;
          attributes["shared_bytes"] = kernel.shared_bytes;
          attributes["threads"] = kernel.threads;
          attributes["blocks_per_processor"] = kernel.blocks_per_processor;
          kernels[kernel.name.c_str()] = attributes;
        }
        return kernels;
      },
      "Each kernel's registers, bytes of spilled registers, static shared memory, threads of a block, and how many of\n"
      "its blocks run at once on one processor of the current device. RuntimeError where there is no device.");
}
