"""What the CUDA backend serves, and what it leaves to others."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from maskops.backends._frozen import may_be_cudnns
from maskops.backends.cuda._module import EMULATED, kernel_attributes
from maskops.backends.cuda.layers import is_depthwise

_MOST_DIMENSIONS = 5


def why_not(op: str, *tensors: Tensor) -> str | None:
    """What the kernels can't compute: float64, tensors that aren't on one CUDA device, more than five dimensions."""
    devices = set()
    for at, tensor in enumerate(tensors):
        # the learning rate, the step count or a bound, of any dtype, and maybe on the CPU
        is_number = tensor.dim() == 0 and op.startswith("mask_") and at > 0
        if is_number and tensor.device.type == "cpu":
            continue
        devices.add(tensor.device)
        if is_number:
            continue
        # of eight bits are the moments alone
        may_be_codes = op == "mask_adam8bit_step_" and at > 1
        if op.startswith("mask_") and not tensor.dtype.is_floating_point and not may_be_codes:
            return f"its mask steps take floating dtypes, not {tensor.dtype}"
        if tensor.dtype == torch.float64:
            return "CUDA kernels compute in float32"
        if tensor.dim() > _MOST_DIMENSIONS:
            return f"its kernels take at most {_MOST_DIMENSIONS} dimensions"
    reasons = [reason for device in devices if (reason := _why_not_on(device))]
    if reasons:
        return reasons[0]
    return "the tensors are on several devices" if len(devices) > 1 else None


@cache
def _why_not_on(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None if EMULATED and device.type == "cpu" else f"the tensors are on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    try:
        with torch.cuda.device(device):
            kernel_attributes()
    except RuntimeError as error:
        return f"its kernels don't run on {torch.cuda.get_device_name(device)}: {error}"
    return None


def describe(op: str, *arguments: Any) -> str | None:
    """How a frozen layer would be computed on these arguments, where all of them are given."""
    if op not in ("conv_relu", "conv_input_grad") or len(arguments) < 9:
        return None
    if is_depthwise(arguments[1], arguments[-2]):
        return "direct: a depthwise layer has a kernel of its own"
    if op == "conv_input_grad":
        return "materialised: torch's own convolution, and one pass for the rest"
    input, weight, _, residual, *geometry = arguments[:-1]
    how = "with bias, residual and ReLU" if may_be_cudnns(input, weight, residual, *geometry) else "and one pass"
    return f"materialised: torch's own convolution {how}"


def unless_asked(op: str, *tensors: Tensor) -> str | None:
    """The emulator serves tests alone; dense layers are left to Triton's backend where that can serve."""
    if EMULATED:
        return "the CUDA emulator is for tests"
    is_layer = op.startswith(("masked_", "dual_masked_", "conv_")) and not (tensors and _may_be_depthwise(*tensors))
    if is_layer and _triton() is not None and _triton().why_not(op, *tensors) is None:
        return "Triton's backend chooses between fused and materialised"
    return None


def _may_be_depthwise(activation: Tensor, *others: Tensor) -> bool:
    """Whether there is a weight of one filter per channel. Masks look like that only where they have one pixel."""
    shapes = (other.shape for other in others if other.dim() == activation.dim() == 4)
    return any(shape[:2] == (activation.shape[1], 1) and shape[2:] != (1, 1) for shape in shapes)


@cache
def _triton() -> ModuleType | None:
    try:
        from maskops.backends import triton
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None
    return triton
