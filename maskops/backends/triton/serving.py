"""What the Triton backend serves, and how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskops.backends.triton import ways
from maskops.backends.triton._launch import INTERPRETED


def why_not(op: str, *tensors: Tensor) -> str | None:
    """What the kernels can't compute: float64, tensors that aren't on a CUDA device, what the interpreter can't."""
    if torch.version.hip:
        return "its tiles are made for NVIDIA's GPUs"
    for tensor in tensors:
        if tensor.dim() == 0 and op.startswith("mask_") and tensor is not tensors[0]:
            continue  # the learning rate, the step count or a bound, of any dtype, and maybe on the CPU
        if tensor.dtype == torch.float64:
            return "Triton kernels compute in float32"
        if tensor.device.type == "cpu" and not INTERPRETED:
            return "the tensors are on the CPU, and TRITON_INTERPRET=1 was not set when it was loaded"
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            return f"the tensors are on {tensor.device.type}"
        if tensor.dtype == torch.bfloat16 and INTERPRETED:
            return "Triton's interpreter does not round to bfloat16"
        if tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return "it needs compute capability 8.0"
    return None


def describe(op: str, *arguments: Any) -> str | None:
    """How an op would be computed on these arguments, where there is a choice and all of them are given."""
    if op not in ways.OPS or len(arguments) < len(getattr(torch.ops.maskops, op).default._schema.arguments) - 1:
        return None
    return ": ".join(ways.choose(op, *arguments))


def unless_asked(op: str, *tensors: Tensor) -> str | None:
    """Under the interpreter it serves tests alone."""
    return "Triton's interpreter is for tests" if INTERPRETED else None
