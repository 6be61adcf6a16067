"""The ops as CUDA kernels of the compiled module ``maskops._C``, for CUDA devices."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import maskops._C as _C
except ModuleNotFoundError as error:
    raise ImportError("this installation was built without nvcc") from error

EMULATED = _C.build_info()["architectures"] == "emulated"
"""Whether the kernels were built for the CPU, where tests run them in an emulator."""

_MOST_DIMENSIONS = 5

_ops = torch.ops.maskops_cuda

noise_step_ = _ops.noise_step_.default
relu_bits = _ops.relu_bits.default
relu_bits_ = _ops.relu_bits_.default
affine_relu_bits_ = _ops.affine_relu_bits_.default
relu_bits_backward = _ops.relu_bits_backward.default
max_pool_winners = _ops.max_pool_winners.default
max_pool_winners_backward = _ops.max_pool_winners_backward.default


def why_not(op: str, *tensors: Tensor) -> str | None:
    """What the kernels can't compute: float64, tensors that aren't on a CUDA device, more than five dimensions."""
    for tensor in tensors:
        if tensor.dim() == 0 and op.startswith("mask_") and tensor is not tensors[0]:
            continue  # the learning rate, the step count or a bound, of any dtype, and maybe on the CPU
        if tensor.dtype == torch.float64:
            return "CUDA kernels compute in float32"
        if tensor.dim() > _MOST_DIMENSIONS:
            return f"its kernels take at most {_MOST_DIMENSIONS} dimensions"
        if tensor.device.type != "cuda" and not (EMULATED and tensor.device.type == "cpu"):
            return f"the tensors are on {tensor.device.type}"
        if tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return "it needs compute capability 8.0"
    return None


def unless_asked(op: str, *tensors: Tensor) -> str | None:
    """The emulator serves tests alone."""
    return "the CUDA emulator is for tests" if EMULATED else None
