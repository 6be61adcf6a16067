"""The two ways to compute a layer, and which of them an op takes.

fused:        the mask is applied inside the kernel, and no effective weight is ever in memory
materialised: one launch writes the effective weight, then torch's own layer runs

A frozen layer, whose weight is the effective one already, has the same two ways: one Triton kernel, or torch's layer.

For a dense layer and a training batch the libraries' kernels win, and the effective weight is a small part of what
moves. The fused kernels win on depthwise layers, where the weight is read by so few pixels that its own bytes decide,
and wherever memory is what is short. MASKOPS_LAYERS=fused or =materialised pins one of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from maskops.backends import reference
from maskops.backends.reference.layers import Weighting
from maskops.backends.triton import depthwise, tuning
from maskops.backends.triton._launch import INTERPRETED
from maskops.backends.triton.weights import effective_weight, effective_weight_backward

FUSED, MATERIALISED = "fused", "materialised"
_PIN = "MASKOPS_LAYERS"
_KERNELS = Weighting(effective_weight, effective_weight_backward)
_WEIGHT_AT = {"masked": 1, "masked_backward": 2, "dual": 2, "dual_backward": 5}
_FROZEN = ("conv_relu", "conv_input_grad")
"""The ops without a mask; their weight comes second, and no number after the groups but the ReLU's upper bound."""
OPS: list[str] = []
"""The ops that have two ways."""
_RIDGE = 184
"""Pixels per weight of two bytes at which a matrix unit (790 TFLOP/s) takes as long as the memory (4.3 TB/s)."""


def either_way(fused: Callable[..., Any]) -> Callable[..., Any]:
    """The op of the function's name, computed by the function or materialised."""
    return either_way_or(partial(getattr(reference, fused.__name__), weighting=_KERNELS))(fused)


def either_way_or(materialised: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The op of a function's name, computed by the function, fused, or by the other one."""

    def decorated(fused: Callable[..., Any]) -> Callable[..., Any]:
        name = fused.__name__
        ways = {FUSED: fused, MATERIALISED: materialised}
        OPS.append(name)

        @wraps(fused)
        def op(*arguments: Any) -> Any:
            way, _ = choose(name, *arguments, start=lambda way: ways[way](*arguments))
            return ways[way](*arguments)

        return op

    return decorated


def choose(op: str, *arguments: Any, start: Callable[[str], object] | None = None) -> tuple[str, str]:
    """The way that an op takes, and why. ``start`` computes it in a given way, where that may be measured."""
    weight = _weight(op, arguments)
    pinned = os.environ.get(_PIN)
    if pinned not in (None, "", FUSED, MATERIALISED):
        raise ValueError(f"{_PIN}: expected {FUSED} or {MATERIALISED}; got {pinned!r}")
    if weight.dim() == 5:
        return MATERIALISED, "there is no kernel for three dimensions"
    if pinned:
        return pinned, f"{_PIN} pins it"
    if INTERPRETED:
        return FUSED, "the interpreter is there to test it"
    expected, reason = _expected(op, weight, arguments)
    if not tuning.is_used(weight.device):
        return expected, reason
    other = MATERIALISED if expected == FUSED else FUSED
    precision = (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    key = (op, *map(_described, arguments), *precision)
    if start is not None or tuning.was_measured(key, weight.device):
        way = tuning.best(key, (expected, other), start, weight.device)
        if tuning.was_measured(key, weight.device):
            return way, "it was measured to be the faster one"
    return expected, reason


def _weight(op: str, arguments: tuple[Any, ...]) -> Tensor:
    if op in _FROZEN:
        return arguments[1]
    kind = ("dual" if op.startswith("dual") else "masked") + ("_backward" if op.endswith("_backward") else "")
    return arguments[_WEIGHT_AT[kind]]


def _expected(op: str, weight: Tensor, arguments: tuple[Any, ...]) -> tuple[str, str]:
    """The way that arithmetic expects to be the faster one, and why."""
    activation = next(argument for argument in arguments if isinstance(argument, Tensor))
    pixels = activation.numel() // max(activation.shape[-1 if "linear" in op else 1], 1)
    if weight.dim() == 4 and depthwise.serves(weight, *_groups(op, arguments)):
        return FUSED, "a depthwise layer has a kernel of its own"
    if pixels < _RIDGE:
        return FUSED, f"{pixels} pixels are so few that the bytes of the weight decide"
    if op in _FROZEN:
        return MATERIALISED, f"with {pixels} pixels torch's own convolution is expected to be the faster one"
    return MATERIALISED, f"with {pixels} pixels the effective weight is a small part of what moves"


def _groups(op: str, arguments: tuple[Any, ...]) -> tuple[int, bool]:
    """How many groups a convolution has, and whether it is transposed."""
    if op in _FROZEN:
        return arguments[-2], False
    *_, transposed, _, groups = arguments[:-1] if op.endswith("_backward") else arguments
    return groups, transposed


def _described(argument: Any) -> Hashable:
    if not isinstance(argument, Tensor):
        return tuple(argument) if isinstance(argument, list) else argument
    channels_last = argument.dim() == 4 and argument.is_contiguous(memory_format=torch.channels_last)
    return argument.dtype, tuple(argument.shape), channels_last
