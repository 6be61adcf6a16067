"""The compiled module, whose import registers the kernels as ops of ``maskops_cuda``."""

from __future__ import annotations

import torch

try:
    import maskops._C as _C
except ModuleNotFoundError as error:
    raise ImportError("this installation was built without nvcc") from error

build_info = _C.build_info
kernel_attributes = _C.kernel_attributes

EMULATED = _C.build_info()["architectures"] == "emulated"
"""Whether the kernels were built for the CPU, where tests run them in an emulator."""

ops = torch.ops.maskops_cuda
