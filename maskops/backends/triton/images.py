"""A batch of clean images from storage to the input of a network, and the gradient of the trigger in it."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskops.backends._outputs import outputs
from maskops.backends.triton._launch import cdiv, collapse, power_of_two, run
from maskops.backends.triton.weights import place

_BLOCK = 1024
_TILE = 2048
"""Elements of the batch that a program of a sum over the batch takes at a time."""


def prepare_images(
    images: Tensor,
    index: Tensor | None,
    trigger: Tensor | None,
    low: float | None,
    high: float | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``(clamp(decode(images[index]) + trigger, low, high) - mean) / std``: one launch."""
    # described without the index, whose values decide nothing about the result's layout
    batch = images if index is None else images[:1].expand(len(index), -1, -1, -1)
    (output,) = outputs("prepare_images", batch, None, trigger, low, high, mean, std, dtype)
    channels = output.shape[1]
    entries = math.prod(output.shape[1:])
    block = power_of_two(entries, 32, _BLOCK)
    blocks = cdiv(entries, block)
    space = _one_image(output, images, trigger)
    run(
        _prepare_images,
        (len(output) * blocks,),
        *(output, images, _dense(index), trigger, _dense(mean), _dense(std), *space, images.stride(0)),
        *(entries, blocks, output.stride(1), low, high, channels, len(space[0]), block),
        num_warps=max(1, block // 256),
    )
    return output


def prepare_images_backward(
    grad: Tensor,
    images: Tensor | None,
    index: Tensor | None,
    trigger: Tensor,
    low: float | None,
    high: float | None,
    std: Tensor | None,
) -> Tensor:
    """``grad``, where the clamp let it pass, summed over the batch, over ``std``: one launch."""
    (output,) = outputs("prepare_images_backward", grad, None, None, trigger, None, None, std)
    if low is None and high is None:
        images = None
    space = _one_image(output, grad, images, trigger)
    rows, block = batch_tile(len(grad), output.numel())
    run(
        _trigger_grad,
        (cdiv(output.numel(), block),),
        *(output, grad, images, _dense(index), trigger, _dense(std), *space),
        *(grad.stride(0), 0 if images is None else images.stride(0), len(grad), output.numel()),
        *(output.stride(-3), low, high, grad.shape[1], len(space[0]), rows, block),
    )
    return output


def batch_tile(batch: int, entries: int) -> tuple[int, int]:
    """How many images and how many entries of each a program that sums over the batch takes at a time."""
    block = power_of_two(cdiv(entries, 256), 32, 128 if batch > 1 else _BLOCK)
    return power_of_two(batch, 1, _TILE // block), block


def _one_image(output: Tensor, *tensors: Tensor | None) -> tuple[tuple[int, ...], ...]:
    """The index space of one image in the memory order of ``output``, and the strides of the others over it."""
    strides = [(0, 0, 0) if tensor is None else tensor.stride()[-3:] for tensor in (output, *tensors)]
    sizes, _, *strides = collapse(tuple(output.shape[-3:]), *strides)
    return sizes, *strides


def _dense(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


@triton.jit
def _pixels(pointer, inside):
    """Pixels as float32; bytes count in steps of 1/255."""
    value = tl.load(pointer, mask=inside, other=0)
    if pointer.dtype.element_ty.is_int():
        # 1/255 in two parts: of bytes the first product is exact, so their sum is the quotient rounded once
        byte = value.to(tl.float32)
        return byte * 0.00390625 + byte * 1.5318628356908448e-05
    return value.to(tl.float32)


@triton.jit
def _prepare_images(
    output, images, index, trigger, mean, std, sizes, image_strides, trigger_strides, image_stride,
    entries, blocks, channel_stride, low, high, CHANNELS: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < entries
    image = row.to(tl.int64)
    start = image * entries
    if index is not None:
        image = tl.load(index + row)
    value = _pixels(images + image * image_stride + place(at.to(tl.int64), sizes, image_strides, DIMS), inside)
    if trigger is not None:
        at_trigger = place(at.to(tl.int64), sizes, trigger_strides, DIMS)
        value += tl.load(trigger + at_trigger, mask=inside, other=0).to(tl.float32)
    # comparisons let NaN pass
    if low is not None:
        value = tl.where(value < low, low, value)
    if high is not None:
        value = tl.where(value > high, high, value)
    channel = at // channel_stride % CHANNELS
    if mean is not None:
        value -= tl.load(mean + channel, mask=inside, other=0).to(tl.float32)
    if std is not None:
        value = tl.div_rn(value, tl.load(std + channel, mask=inside, other=1).to(tl.float32))
    tl.store(output + start + at, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def sum_over_batch(pointer, batch, batch_stride, at, inside, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The entries ``at`` of the images from ``pointer`` on, summed in float32, always in the same order."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, batch, ROWS):
        row = first + tl.arange(0, ROWS)
        here = (row < batch)[:, None] & inside[None, :]
        images = pointer + row.to(tl.int64)[:, None] * batch_stride
        total += tl.load(images + at[None, :], mask=here, other=0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def _trigger_grad(
    output, grad, images, index, trigger, std, sizes, grad_strides, image_strides, trigger_strides,
    grad_stride, image_stride, batch, entries, channel_stride, low, high,
    CHANNELS: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < entries
    at_grad = place(at.to(tl.int64), sizes, grad_strides, DIMS)
    if images is None:
        total = sum_over_batch(grad, batch, grad_stride, at_grad, inside, ROWS, BLOCK)
    else:
        at_image = place(at.to(tl.int64), sizes, image_strides, DIMS)
        at_trigger = place(at.to(tl.int64), sizes, trigger_strides, DIMS)
        change = tl.load(trigger + at_trigger, mask=inside, other=0).to(tl.float32)
        passed = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, batch, ROWS):
            row = first + tl.arange(0, ROWS)
            here = (row < batch)[:, None] & inside[None, :]
            image = row.to(tl.int64)
            value = tl.load(grad + image[:, None] * grad_stride + at_grad[None, :], mask=here, other=0).to(tl.float32)
            if index is not None:
                image = tl.load(index + row, mask=row < batch, other=0)
            pixel = _pixels(images + image[:, None] * image_stride + at_image[None, :], here) + change[None, :]
            if low is not None:
                value = tl.where(pixel >= low, value, 0.0)
            if high is not None:
                value = tl.where(pixel <= high, value, 0.0)
            passed += value
        total = tl.sum(passed, 0)
    if std is not None:
        channel = at // channel_stride % CHANNELS
        total = tl.div_rn(total, tl.load(std + channel, mask=inside, other=1).to(tl.float32))
    tl.store(output + at, total.to(output.dtype.element_ty), mask=inside)
