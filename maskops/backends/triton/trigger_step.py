"""The step on a trigger: gradient ascent, then into the L1 ball, then into the range of pixels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskops.backends.triton._launch import cdiv, collapse, power_of_two, run
from maskops.backends.triton.images import batch_tile, sum_over_batch
from maskops.backends.triton.weights import place

_WHOLE = 1 << 14
"""Entries of a trigger that one program holds in registers."""
_FEW = 8
"""Gradients that one program sums itself; more of them are read sooner by many programs."""
_BLOCK = 1024


def trigger_step_(
    trigger: Tensor, grad: Tensor, step_size: float, radius: float | None, low: float | None, high: float | None
) -> None:
    """``clamp(rescale(trigger + step_size * sum_over_batch(grad), radius), low, high)``.

    One launch; two where there is a radius and the trigger is large or the gradients are many.
    """
    entries, batch = trigger.numel(), len(grad)
    sizes, trigger_strides, grad_strides = collapse(
        tuple(grad.shape[1:]), trigger.stride()[-3:], tuple(grad.stride()[1:])
    )
    rescale, ball = radius is not None, radius or 0.0
    whole = rescale and entries <= _WHOLE and batch <= _FEW
    rows, block = (1, power_of_two(entries, 32, _WHOLE)) if whole else batch_tile(batch, entries)
    blocks = cdiv(entries, block)
    stepped = partials = None
    if rescale and not whole:
        stepped = torch.empty(entries, dtype=torch.float32, device=trigger.device)
        partials = torch.empty(blocks, dtype=torch.float64, device=trigger.device)
    run(
        _step,
        (blocks,),
        *(trigger, grad, stepped, partials, sizes, trigger_strides, grad_strides, grad.stride(0)),
        *(batch, entries, float(step_size), ball, low, high, rescale, len(sizes), rows, block),
        num_warps=power_of_two(block // 512, 4, 32),
    )
    if partials is not None:
        run(
            _rescale_and_clamp,
            (cdiv(entries, _BLOCK),),
            *(trigger, stepped, partials, sizes, trigger_strides, entries, blocks, ball, low, high),
            *(len(sizes), power_of_two(blocks, 16, _BLOCK), _BLOCK),
        )


@triton.jit
def _clamp(value, low, high):
    # comparisons let NaN pass
    if low is not None:
        value = tl.where(value < low, low, value)
    if high is not None:
        value = tl.where(value > high, high, value)
    return value


@triton.jit
def _into_ball(value, norm, radius):
    """``value * min(1, radius / norm)`` in float64, rounded once; NaN unless the norm is finite."""
    outside = norm > radius
    scale = tl.where(outside, radius / tl.where(outside, norm, 1.0), 1.0)
    scale = tl.where(norm < float("inf"), scale, float("nan"))
    return (value.to(tl.float64) * scale).to(tl.float32)


@triton.jit
def _step(
    trigger, grad, stepped, partials, sizes, trigger_strides, grad_strides, grad_stride,
    batch, entries, step_size, radius: tl.float64, low, high,
    RESCALE: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < entries
    at_grad = place(at.to(tl.int64), sizes, grad_strides, DIMS)
    at_trigger = place(at.to(tl.int64), sizes, trigger_strides, DIMS)
    total = sum_over_batch(grad, batch, grad_stride, at_grad, inside, ROWS, BLOCK)
    value = tl.load(trigger + at_trigger, mask=inside, other=0).to(tl.float32) + step_size * total
    if RESCALE:
        norm = tl.sum(tl.abs(value).to(tl.float64), 0)
        if partials is None:
            value = _into_ball(value, norm, radius)
        else:
            tl.store(partials + tl.program_id(0), norm)
    if partials is None:
        value = _clamp(value, low, high)
        tl.store(trigger + at_trigger, value.to(trigger.dtype.element_ty), mask=inside)
    else:
        tl.store(stepped + at, value, mask=inside)


@triton.jit
def _rescale_and_clamp(
    trigger, stepped, partials, sizes, trigger_strides, entries, count, radius: tl.float64, low, high,
    DIMS: tl.constexpr, PARTIALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    norms = tl.zeros((PARTIALS,), tl.float64)
    for first in range(0, count, PARTIALS):
        part = first + tl.arange(0, PARTIALS)
        norms += tl.load(partials + part, mask=part < count, other=0)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < entries
    value = tl.load(stepped + at, mask=inside, other=0)
    value = _clamp(_into_ball(value, tl.sum(norms, 0), radius), low, high)
    at_trigger = place(at.to(tl.int64), sizes, trigger_strides, DIMS)
    tl.store(trigger + at_trigger, value.to(trigger.dtype.element_ty), mask=inside)
