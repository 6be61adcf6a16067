"""The ops as CUDA kernels of the compiled module ``maskops._C``, for CUDA devices."""

from __future__ import annotations

from typing import Any

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

effective_weight = _ops.effective_weight.default
effective_weight_backward = _ops.effective_weight_backward.default
effective_weights = _ops.effective_weights.default
effective_weights_backward = _ops.effective_weights_backward.default
arena_effective_weight_ = _ops.arena_effective_weight_.default
arena_mask_grad = _ops.arena_mask_grad.default
mask_adam_step_ = _ops.mask_adam_step_.default
mask_adam8bit_step_ = _ops.mask_adam8bit_step_.default
mask_sgd_step_ = _ops.mask_sgd_step_.default
rescale_to_l1_ball = _ops.rescale_to_l1_ball.default
project_onto_l1_ball = _ops.project_onto_l1_ball.default
noise_step_ = _ops.noise_step_.default
relu_bits = _ops.relu_bits.default
relu_bits_ = _ops.relu_bits_.default
affine_relu_bits_ = _ops.affine_relu_bits_.default
relu_bits_backward = _ops.relu_bits_backward.default
max_pool_winners = _ops.max_pool_winners.default
max_pool_winners_backward = _ops.max_pool_winners_backward.default
prepare_images_backward = _ops.prepare_images_backward.default
trigger_step_ = _ops.trigger_step_.default


def prepare_images(images: Tensor, *arguments: Any) -> Tensor:
    """Computed in float32 and converted where float64 is asked for, as the reference does."""
    *options, dtype = arguments
    if dtype == torch.float64:
        return _ops.prepare_images(images, *options, torch.float32).double()
    return _ops.prepare_images(images, *arguments)


def why_not(op: str, *tensors: Tensor) -> str | None:
    """What the kernels can't compute: float64, tensors that aren't on a CUDA device, more than five dimensions."""
    for tensor in tensors:
        if tensor.dim() == 0 and op.startswith("mask_") and tensor is not tensors[0]:
            continue  # the learning rate, the step count or a bound, of any dtype, and maybe on the CPU
        if op in ("mask_adam_step_", "mask_sgd_step_") and not tensor.dtype.is_floating_point:
            return f"its mask steps take floating dtypes, not {tensor.dtype}"
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
