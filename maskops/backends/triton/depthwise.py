"""Masked depthwise convolution, its gradients, and both branches of the dual one, in one launch and not as a GEMM."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskops.backends.triton import _depthwise_kernels as kernels
from maskops.backends.triton._launch import cdiv, power_of_two, run
from maskops.backends.triton.blocks import processors, registers
from maskops.backends.triton.sign_bits import NOTHING, Finish
from maskops.backends.triton.weights import spread

_WARPS = 4
_UNROLLED = 49
"""Filters of up to so many taps have their loops unrolled and their effective weights in registers."""
_TAPS = 9
"""For how many taps one program gathers the gradient."""
_ELEMENTS = 32
"""Elements of a gradient whose parts one program sums."""


def serves(weight: Tensor, groups: int, transposed: bool) -> bool:
    """Whether it is a depthwise convolution over images, with one output channel per input channel."""
    return weight.dim() == 4 and weight.shape[1] == 1 and groups == weight.shape[0] and not transposed


def forward(
    outputs: list[Tensor],
    inputs: list[Tensor],
    weight: Tensor,
    mask: Tensor | None,
    noise: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    finish: Finish = NOTHING,
) -> None:
    """Write the convolution of one input, or of two (or one for both): the first without noise, the second with it."""
    inputs = inputs[:1] if inputs[0] is inputs[-1] else inputs
    geometry = tuple((stride[i], dilation[i], -padding[i], 1) for i in range(2))
    _convolve(outputs, inputs, weight, mask, noise, bias, geometry, False, finish)


def input_grad(
    grad_inputs: list[Tensor],
    grads: list[Tensor],
    weight: Tensor,
    mask: Tensor | None,
    noise: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    finish: Finish = NOTHING,
) -> None:
    """Write the gradient of each input, or that of the one input of both branches: their sum."""
    # a convolution with the filter turned round, over gradients that lie ``stride`` apart
    first = [padding[i] - dilation[i] * (weight.shape[2 + i] - 1) for i in range(2)]
    geometry = tuple((1, dilation[i], first[i], stride[i]) for i in range(2))
    _convolve(grad_inputs, grads, weight, mask, noise, None, geometry, True, finish)


def weight_grad(
    grads: list[Tensor],
    inputs: list[Tensor],
    weight_shape: tuple[int, ...],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    separate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Parts of the effective weight's gradient over all branches and, if ``separate``, of the second one's alone.

    Each is (parts, *weight_shape) in float32; the gradient is the sum of the parts. One branch is never separate.
    So that whoever sums them need not wait for hundreds of loads, a second launch leaves one part.
    """
    kernel = tuple(weight_shape[2:])
    separate = separate and len(grads) == 2
    if grads[0].numel() == 0 or inputs[0].numel() == 0:
        zeros = torch.zeros((1, *weight_shape), dtype=torch.float32, device=grads[0].device)
        return zeros, torch.zeros_like(zeros) if separate else None
    # two gradients over one input count as one, unless one of them is wanted alone
    added = len(grads) == 2 and not separate and inputs[0] is inputs[-1]
    if added:
        branches = [(grads[0], grads[1], inputs[0])]
    else:
        branches = [(grad, None, input) for grad, input in zip(grads, inputs, strict=True)]
    geometry = tuple((stride[i], dilation[i], -padding[i], 1) for i in range(2))
    parts = _weight_grad_parts(branches, kernel, geometry, _channels_innermost(inputs[0]))
    total = torch.empty((1, *weight_shape), dtype=torch.float32, device=parts.device)
    second = torch.empty_like(total) if separate else None
    sizes = parts.shape[1], weight_shape[0], kernel[0] * kernel[1]
    grid = (cdiv(total.numel(), _ELEMENTS),)
    run(_sum_parts, grid, total, second, parts, *sizes, len(branches), 1024 // _ELEMENTS, _ELEMENTS)
    return total, second


def _convolve(targets, sources, weight, mask, noise, bias, geometry, flipped, finish=NOTHING) -> None:
    """``targets[t, c] = bias[c] + sum over r of (weight * (mask + noise))[c, r] * sources[(t*A + r*B + C) / D, c]``.

    geometry: (A, B, C, D) of the rows and of the columns; a term whose quotient isn't whole is none
    """
    if targets[0].numel() == 0:
        return
    branches = 2 if len(targets) == len(sources) == 2 else 1
    layouts = [{tensor.stride() for tensor in tensors} for tensors in (targets, sources)]
    if len(layouts[0]) == 2 or (branches == 2 and len(layouts[1]) == 2):
        _convolve(targets[:1], sources[:1], weight, mask, None, bias, geometry, flipped)
        _convolve(targets[1:], sources[-1:], weight, mask, noise, bias, geometry, flipped)
        return
    kernel = tuple(weight.shape[2:])
    pair = len(targets) + len(sources) > 2 and branches == 1
    factors = [weight, *(spread(factor, weight) for factor in (mask, noise))]
    tensors = targets[0], targets[-1], sources[0], sources[-1]
    strides = targets[0].stride(), sources[0].stride(), sources[-1].stride()
    factor_strides = [(0, 0, 0) if factor is None else (factor.stride(0), *factor.stride()[2:]) for factor in factors]
    arguments = *tensors, *factors, bias, *finish[:3], *strides, *factor_strides, 0 if bias is None else bias.stride(0)
    counts = len(targets) if branches == 1 else 1, len(sources) if branches == 1 else 1, branches
    images, channels, *size = targets[0].shape
    innermost = _channels_innermost(sources[0])
    if _walks(kernel, geometry):
        taps = kernel[0] * kernel[1] * (1 + pair)
        columns, channel_block, lane_block = _strip_blocks(taps, size[1], channels, innermost, 25)
        strips = cdiv(size[1], columns)
        channel_blocks = cdiv(channels, channel_block)
        programs = cdiv(images * strips, lane_block) * channel_blocks
        rows = _rows(size[0], 2 * kernel[0], programs * branches, weight.device)
        run(
            kernels.walk, (programs, cdiv(size[0], rows), branches), *arguments,
            images * strips, strips, channels, channel_blocks, tuple(size), tuple(sources[0].shape[2:]),
            (geometry[0][2], geometry[1][2]), rows,
            flipped, finish.relu, *kernel, columns, *counts, lane_block, channel_block, num_warps=_WARPS,
        )  # fmt: skip
        return
    channel_block, lane_block = _blocks(channels, innermost, 4, 2)
    pixels = images * size[0] * size[1]
    channel_blocks = cdiv(channels, channel_block)
    run(
        kernels.gather, (cdiv(pixels, lane_block) * channel_blocks, 1, branches), *arguments,
        pixels, channels, channel_blocks, tuple(size), tuple(sources[0].shape[2:]), *geometry,
        flipped, finish.relu, *kernel, kernel[0] * kernel[1] <= _UNROLLED, *counts, lane_block, channel_block,
        num_warps=_WARPS,
    )  # fmt: skip


def _weight_grad_parts(branches, kernel, geometry, innermost) -> Tensor:
    """(branches, slices, R, S, C): what each slice of the pixels adds to the gradient of each branch's weight."""
    (grad, added, source), second = branches[0], branches[-1]
    if any(a.stride() != b.stride() for a, b in ((grad, second[0]), (source, second[2]))):
        return torch.cat([_weight_grad_parts([branch], kernel, geometry, innermost) for branch in branches])
    images, channels, *size = grad.shape
    walks = _walks(kernel, geometry)
    if walks:
        columns, channel_block, lane_block = _strip_blocks(kernel[0] * kernel[1], size[1], channels, innermost, 50)
        strips = cdiv(size[1], columns)
        lanes, rows, groups = images * strips, source.shape[2], 1
    else:
        channel_block, lane_block = _blocks(channels, innermost, 8)
        lanes, rows, groups = images * size[0] * size[1], 1, cdiv(kernel[0] * kernel[1], _TAPS)
    channel_blocks, lane_blocks = cdiv(channels, channel_block), cdiv(lanes, lane_block)
    wanted = cdiv(4 * processors(grad.device), channel_blocks * groups * len(branches))
    per_slice = cdiv(lane_blocks, min(lane_blocks, wanted))
    slices = cdiv(lane_blocks, per_slice)
    row_block = _rows(rows, 2 * kernel[0], slices * channel_blocks * len(branches), grad.device)
    splits = cdiv(rows, row_block)
    parts = torch.empty((len(branches), slices * splits, *kernel, channels), dtype=torch.float32, device=grad.device)
    tensors = parts, grad, added, second[0], source, second[2]
    added_strides = (0, 0, 0, 0) if added is None else added.stride()
    arguments = *tensors, grad.stride(), added_strides, source.stride(), parts.stride(0), lanes
    sizes = channels, tuple(size), tuple(source.shape[2:])
    if walks:
        run(
            kernels.walk_weight_grad, (channel_blocks, slices * splits, len(branches)), *arguments, strips, *sizes,
            (geometry[0][2], geometry[1][2]), per_slice * lane_block, row_block, splits,
            *kernel, columns, len(branches), lane_block, channel_block,
            num_warps=_WARPS, maxnreg=registers(3 if 9 < kernel[0] * kernel[1] <= 25 else None, _WARPS),
        )  # fmt: skip
    else:
        run(
            kernels.gather_weight_grad, (channel_blocks * groups, slices, len(branches)), *arguments, *sizes,
            *(direction[:3] for direction in geometry), per_slice * lane_block, groups,
            *kernel, min(_TAPS, kernel[0] * kernel[1]), len(branches), lane_block, channel_block, num_warps=_WARPS,
        )  # fmt: skip
    return parts


def _channels_innermost(tensor: Tensor) -> bool:
    return tensor.stride(1) < tensor.stride(3)


def _walks(kernel: tuple[int, int], geometry: tuple) -> bool:
    """Whether neighbouring outputs need neighbouring inputs, and the effective weights fit in registers."""
    unit = all(direction[0] == direction[1] == direction[3] == 1 for direction in geometry)
    return unit and kernel[0] * kernel[1] <= _UNROLLED


@lru_cache(maxsize=4096)
def _strip_blocks(taps: int, width: int, channels: int, innermost: bool, most: int) -> tuple[int, int, int]:
    """The columns of a strip, the channels and the lanes of a program that keeps ``taps`` tiles in registers.

    most: how many taps at most allow two channels to a thread without more registers than there are
    """
    if not innermost:
        return 1, *_blocks(channels, False, 1)
    per_thread = 4 if taps <= 9 else 2 if taps <= most else 1
    columns = 8 if most < taps <= 50 else 4
    return cdiv(width, cdiv(width, columns)), *_blocks(channels, True, per_thread)


def _blocks(channels: int, innermost: bool, per_thread: int, lanes_per_thread: int = 1) -> tuple[int, int]:
    """The channels and the lanes of a program, of which few lie outside of the tensor."""
    if not innermost:
        return 1, 32 * _WARPS * lanes_per_thread
    block = power_of_two(channels, 1, 32 * per_thread)
    while block > 16 and cdiv(channels, block) * block * 8 > channels * 9:
        block //= 2
    return block, 32 * _WARPS * per_thread * lanes_per_thread // block


def _rows(height: int, least: int, programs: int, device: torch.device) -> int:
    """The rows that a program walks down: all, or fewer where there are too few programs for the processors."""
    splits = min(cdiv(4 * processors(device), programs), max(1, height // least))
    return cdiv(height, splits)


@triton.jit
def _sum_parts(
    total, second, parts, count, channels, taps,
    BRANCHES: tl.constexpr, PARTS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Sum (branches, count, taps, channels) over the branches and the parts, into (channels, taps)."""
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < channels * taps
    sums = ()
    for branch in tl.static_range(BRANCHES):
        partial = tl.zeros((PARTS, ELEMENTS), tl.float32)
        for start in range(0, count, PARTS):
            part = start + tl.arange(0, PARTS)
            row = (branch * count + part).to(tl.int64) * (channels * taps)
            here = (part < count)[:, None] & inside[None, :]
            partial += tl.load(parts + row[:, None] + element[None, :], mask=here, other=0)
        sums += (tl.sum(partial, 0),)
    at = element % channels * taps + element // channels
    result = sums[0]
    if BRANCHES == 2:
        result += sums[1]
        if second is not None:
            tl.store(second + at, sums[1], mask=inside)
    tl.store(total + at, result, mask=inside)
