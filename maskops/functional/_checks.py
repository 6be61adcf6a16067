"""The input checks of the public functions. Every message is one line: the function, what was expected, what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
FLOATING = (torch.float64, torch.float32, *_HALF)


def shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def broadcasts(factor: Tensor, to: Tensor) -> bool:
    """Whether ``factor`` broadcasts to the shape of ``to`` without enlarging it."""
    pairs = zip(reversed(factor.shape), reversed(to.shape), strict=False)
    return factor.dim() <= to.dim() and all(size in (1, of) for size, of in pairs)


def check_factors(op: str, weight: Tensor, mask: Tensor, noise: Tensor | None) -> None:
    """The mask and the noise are floating and broadcast to the weight without enlarging it, all on one device."""
    for name, factor in (("mask", mask), ("noise", noise)):
        if factor is None:
            continue
        if factor.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} must be a floating dtype; got {factor.dtype}")
        if factor.device != weight.device:
            raise ValueError(f"{op}: {name} must be on the weight's device {weight.device}; got {factor.device}")
        if not broadcasts(factor, weight):
            raise ValueError(f"{op}: {name} must broadcast to weight {shape(weight)}; got {name} {shape(factor)}")


def check_weight(op: str, weight: Tensor) -> None:
    if weight.dtype not in FLOATING:
        raise TypeError(f"{op}: weight must be a floating dtype; got {weight.dtype}")


def check_layer(
    op: str, input: Tensor, weight: Tensor, mask: Tensor, noise: Tensor | None, bias: Tensor | None, out_features: int
) -> None:
    """What every masked layer asks of its tensors, besides the sizes of the input."""
    if input.dtype not in FLOATING:
        raise TypeError(f"{op}: input must be a floating dtype; got {input.dtype}")
    check_weight(op, weight)
    # 16-bit activations over float32 weights, and 16-bit weights under float32 activations, are what mixed precision
    # and memory-short runs need; float64 is not mixed.
    mixed = {input.dtype, weight.dtype} <= {torch.float32, *_HALF}
    if input.dtype != weight.dtype and not mixed:
        raise TypeError(f"{op}: input and weight must have one dtype; got {input.dtype} and {weight.dtype}")
    if input.device != weight.device:
        raise ValueError(f"{op}: input must be on the weight's device {weight.device}; got {input.device}")
    check_factors(op, weight, mask, noise)
    if bias is None:
        return
    if shape(bias) != (out_features,):
        raise ValueError(f"{op}: bias must have shape ({out_features},); got {shape(bias)}")
    if bias.dtype not in (input.dtype, weight.dtype):
        raise TypeError(f"{op}: bias must have the dtype of input or weight; got {bias.dtype}")
    if bias.device != weight.device:
        raise ValueError(f"{op}: bias must be on the weight's device {weight.device}; got {bias.device}")


def expand(op: str, name: str, value: int | Sequence[int], dims: int, least: int) -> tuple[int, ...]:
    """An int, or one int per spatial dimension, as a tuple of ``dims`` ints of at least ``least``."""
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= dims
    if len(values) != dims:
        raise ValueError(f"{op}: {name} must be an int or {dims} ints; got {value}")
    if any(v < least for v in values):
        raise ValueError(f"{op}: {name} must be at least {least}; got {value}")
    return values


def check_branches(op: str, input: Tensor, perturbed_input: Tensor | None) -> None:
    if perturbed_input is None:
        return
    if perturbed_input.shape != input.shape:
        raise ValueError(
            f"{op}: perturbed_input must have the input's shape {shape(input)}; got {shape(perturbed_input)}"
        )
    if perturbed_input.dtype != input.dtype:
        raise TypeError(f"{op}: perturbed_input must have the input's dtype {input.dtype}; got {perturbed_input.dtype}")
