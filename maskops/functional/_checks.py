"""The input checks of the public functions. Every message is one line: the function, what was expected, what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MIXABLE = (torch.float32, torch.float16, torch.bfloat16)
FLOATING = (torch.float64, *_MIXABLE)


def shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def broadcasts(factor: Tensor, to: Tensor) -> bool:
    """Whether ``factor`` broadcasts to the shape of ``to`` without enlarging it."""
    if factor.shape == to.shape:
        return True
    pairs = zip(reversed(factor.shape), reversed(to.shape), strict=False)
    return factor.dim() <= to.dim() and all(size in (1, of) for size, of in pairs)


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be a floating dtype; got {tensor.dtype}")


def check_factor(op: str, name: str, factor: Tensor, of: str, parameter: Tensor, *, bytes_too: bool = False) -> None:
    """A factor is floating and broadcasts to its parameter (of the name ``of``) without enlarging it, on its device."""
    if not (bytes_too and factor.dtype == torch.uint8):
        check_floating(op, name, factor)
    if factor.device != parameter.device:
        raise ValueError(f"{op}: {name} must be on the {of}'s device {parameter.device}; got {factor.device}")
    if not broadcasts(factor, parameter):
        raise ValueError(f"{op}: {name} must broadcast to {of} {shape(parameter)}; got {name} {shape(factor)}")


def check_weight(op: str, weight: Tensor, mask: Tensor, noise: Tensor | None) -> None:
    """What every effective weight asks of its factors."""
    check_floating(op, "weight", weight)
    check_factor(op, "mask", mask, "weight", weight, bytes_too=True)
    if noise is not None:
        check_factor(op, "noise", noise, "weight", weight)


def check_layer(
    op: str, input: Tensor, weight: Tensor, mask: Tensor, noise: Tensor | None, bias: Tensor | None, out_features: int
) -> None:
    """What every masked layer asks of its tensors, besides the sizes of the input."""
    check_floating(op, "input", input)
    check_weight(op, weight, mask, noise)
    _check_computes_with(op, "weight", weight, input)
    if bias is None:
        return
    _check_computes_with(op, "bias", bias, input)
    if bias.shape != (out_features,):
        raise ValueError(f"{op}: bias must have shape ({out_features},); got {shape(bias)}")


def _check_computes_with(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    # 16-bit activations over float32 weights, and 16-bit weights under float32 activations, are what mixed precision
    # and memory-short runs need; float64 is not mixed.
    if tensor.dtype != input.dtype and not (tensor.dtype in _MIXABLE and input.dtype in _MIXABLE):
        raise TypeError(f"{op}: input and {name} must have one dtype; got {input.dtype} and {tensor.dtype}")
    if tensor.device != input.device:
        raise ValueError(f"{op}: {name} must be on the input's device {input.device}; got {tensor.device}")


def expand(op: str, name: str, value: int | Sequence[int], dims: int, least: int) -> tuple[int, ...]:
    """An int, or one int per spatial dimension, as a tuple of ``dims`` ints of at least ``least``."""
    values = (value,) if isinstance(value, int) else value
    if not isinstance(values, (tuple, list)) or len(values) not in (1, dims):
        raise ValueError(f"{op}: {name} must be an int or {dims} ints; got {value!r}")
    if min(values) < least:
        raise ValueError(f"{op}: {name} must be at least {least}; got {value}")
    return tuple(values) if len(values) == dims else tuple(values) * dims


def check_branches(op: str, input: Tensor, perturbed_input: Tensor | None) -> None:
    if perturbed_input is None:
        return
    if perturbed_input.shape != input.shape:
        raise ValueError(
            f"{op}: perturbed_input must have the input's shape {shape(input)}; got {shape(perturbed_input)}"
        )
    if perturbed_input.dtype != input.dtype:
        raise TypeError(f"{op}: perturbed_input must have the input's dtype {input.dtype}; got {perturbed_input.dtype}")
    if perturbed_input.device != input.device:
        raise ValueError(
            f"{op}: perturbed_input must be on the input's device {input.device}; got {perturbed_input.device}"
        )


def check_trigger(op: str, trigger: Tensor, image: tuple[int, ...]) -> None:
    """A trigger is floating, and of the shape of one image (C, H, W), with or without a batch of one."""
    check_floating(op, "trigger", trigger)
    if shape(trigger) not in (image, (1, *image)):
        raise ValueError(f"{op}: trigger must have shape {(1, *image)} or {image}; got {shape(trigger)}")


def check_bounds(op: str, low: float | None, high: float | None) -> None:
    bounds = [bound for bound in (low, high) if bound is not None]
    if not bounds == sorted(bounds) or any(bound != bound for bound in bounds):
        raise ValueError(f"{op}: low must not be above high; got low {low} and high {high}")
