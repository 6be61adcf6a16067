"""Layers whose weights are as they are, by torch's own convolutions: what the GPU backends share.

Where cuDNN computes convolution, bias, residual and ReLU at once, it does; else all but the convolution is one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskops.backends._outputs import layouts
from maskops.backends.reference.frozen import input_gradient

aten = torch.ops.aten

_without_cudnn: set[tuple] = set()
"""The layers for which cuDNN has no fused kernel; it doesn't say so beforehand."""


def conv_relu(
    input, weight, bias, residual, stride, padding, dilation, groups, upper, add_relu_: Callable[..., Tensor]
) -> Tensor:
    """``clamp(conv2d(input, weight, bias) + residual, 0, upper)``; ``add_relu_`` does all but the convolution."""
    geometry = stride, padding, dilation, groups
    output = cudnn_conv_relu(input, weight, bias, residual, *geometry)
    if output is not None:
        output = output if upper == math.inf else output.clamp_(max=upper)
        return _laid_out(output, "conv_relu", input, weight, bias, residual, *geometry, upper)
    output = aten.convolution(input, weight, bias, stride, padding, dilation, False, [0, 0], groups)
    return add_relu_(output, residual, upper)


def conv_input_grad(
    grad, weight, gate, addend, input_size, *geometry_and_upper,
    relu_backward_: Callable[..., Tensor], gradient: Callable[..., Tensor] = input_gradient,
) -> Tensor:  # fmt: skip
    """The gradient of a convolution's input, plus ``addend``, where the ReLU before let it pass: in one pass more.

    relu_backward_: of ``(grad, gate, addend, upper)``, over the gradient that ``gradient`` has made
    """
    *geometry, upper = geometry_and_upper
    result = gradient(grad, weight, input_size, *geometry)
    if gate is not None:
        result = relu_backward_(result, gate, addend, upper)
    elif addend is not None:
        result.add_(addend)
    return _laid_out(result, "conv_input_grad", grad, weight, gate, addend, input_size, *geometry_and_upper)


def _laid_out(result: Tensor, op: str, *arguments: Any) -> Tensor:
    """The result, or else a copy, laid out as the reference's, whose layout a gate or an addend may decide."""
    ((size, stride, *_),) = layouts(op, *arguments)
    if result.stride() == stride:
        return result
    if all(one == other for entries, one, other in zip(size, result.stride(), stride, strict=True) if entries != 1):
        return result.as_strided(size, stride)
    return torch.empty_strided(size, stride, dtype=result.dtype, device=result.device).copy_(result)


def cudnn_conv_relu(input, weight, bias, residual, *geometry) -> Tensor | None:
    """``relu(conv2d(input, weight, bias) + residual)`` in cuDNN's fused kernel; None where it has none."""
    if not may_be_cudnns(input, weight, residual, *geometry):
        return None
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.to(input.dtype)
    try:
        if residual is None:
            return torch.cudnn_convolution_relu(input, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(input, weight, residual, 1.0, bias, *geometry)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        _without_cudnn.add(_layer(input, weight, residual, *geometry))
        return None


def may_be_cudnns(input: Tensor, weight: Tensor, residual: Tensor | None, *geometry) -> bool:
    """Whether cuDNN may have a fused kernel: for layers in channels_last, all in the dtype of the input."""
    cudnn = torch.backends.cudnn
    if input.device.type != "cuda" or not (cudnn.enabled and cudnn.is_available()) or weight.shape[1] == 1:
        return False
    tensors = [input] if residual is None else [input, residual]
    if not all(t.dtype == input.dtype and t.is_contiguous(memory_format=torch.channels_last) for t in tensors):
        return False
    return _layer(input, weight, residual, *geometry) not in _without_cudnn


def _layer(input, weight, residual, stride, padding, dilation, groups) -> tuple:
    geometry = tuple(map(tuple, (stride, padding, dilation)))
    return input.shape, weight.shape, input.dtype, geometry, groups, residual is None
