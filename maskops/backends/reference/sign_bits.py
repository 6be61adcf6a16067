"""ReLU, also after frozen batch norm, that leaves a bit per element, and max-pooling that leaves a byte per window."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

_GATHER = 0x0102040810204080
"""Multiplying eight bytes of 0 or 1, read as one integer, by this puts the eight bits into the highest byte."""

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers as wide as an element of so many bytes."""


def relu_bits(input: Tensor, upper: float) -> tuple[Tensor, Tensor]:
    """``clamp(input, 0, upper)``, and a bit per element, in the output's memory order: 1 where the gradient passes.

    ``upper`` is infinite, which is plain ReLU, or a positive number that is exact in the input's dtype.
    It stops where the output is 0 or, for a finite ``upper``, is ``upper``; so it passes at NaN (where torch's hardtanh
    stops or passes as its vectors happen to end). Element 8i + j is bit j of byte i; zeros fill up the last byte.
    """
    output = input.relu() if upper == math.inf else aten.hardtanh(input, 0, upper)
    return output, _pack(output, upper)


def relu_bits_(input: Tensor, upper: float) -> Tensor:
    """The bits of ``relu_bits``; the output overwrites the input, which has no gaps in memory."""
    return _pack(input.relu_() if upper == math.inf else aten.hardtanh_(input, 0, upper), upper)


def affine_relu_bits_(
    input: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, upper: float
) -> Tensor:
    """``clamp(scale * input + shift + residual, 0, upper)`` over the input, which has no gaps in memory, and its bits.

    scale and shift have one number per channel. In float32, or in the input's float64, and rounded once.
    """
    input.copy_(affine(input, scale, shift, residual))
    return relu_bits_(input, upper)


def affine(input: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    """``scale * input + shift + residual`` in float32, or in the input's float64."""
    output = input if input.dtype == torch.float64 else input.float()
    per_channel = (-1, *[1] * (input.dim() - 2))
    if scale is not None:
        output = output * scale.view(per_channel).to(output.dtype)
    if shift is not None:
        output = output + shift.view(per_channel).to(output.dtype)
    if residual is not None:
        output = output + residual.to(output.dtype)
    return output


def relu_bits_backward(grad: Tensor, bits: Tensor) -> Tensor:
    """``grad`` where the bit is 1, else 0. ``grad`` has the strides that the output of ``relu_bits`` had."""
    # eight bytes, 0 or -1, for each byte of bits; widened, they are words that leave nothing or all of an element
    table = -(torch.arange(256, device=grad.device).unsqueeze(1) >> torch.arange(8, device=grad.device) & 1)
    eights = table.to(torch.int8).view(torch.int64).view(-1).index_select(0, bits.int())
    word = _WORDS[grad.element_size()]
    result = eights.view(torch.int8).to(word)
    result[: grad.numel()].bitwise_and_(_in_memory_order(grad).view(word))
    return result.view(grad.dtype).as_strided(grad.shape, grad.stride())


def max_pool_winners(input, kernel_size, stride, padding, dilation, ceil_mode) -> tuple[Tensor, Tensor]:
    """``max_pool2d``, and for each window the winner's place in it, row by row, in a byte: at most 256 places."""
    output, indices = aten.max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode)
    rows, columns = (torch.arange(size, device=input.device) for size in input.shape[-2:])
    # a place in the image, on a scale on which a step inside the window is dilation[0] * dilation[1] times its width
    along_rows, along_columns = kernel_size[1] * dilation[1], dilation[0]
    places = (rows.unsqueeze(1) * along_rows + columns * along_columns).view(-1)
    top, left = _corners(indices, stride, padding)
    corners = top * along_rows + left * along_columns
    gaps = dilation[0] * dilation[1]
    if gaps == 1:  # a place in the window is at most 255: of the others bytes, which wrap around, are enough
        places, corners = places.bitwise_and(255).to(torch.uint8), corners.bitwise_and(255).to(torch.uint8)
    place = _look_up(places, indices).sub_(corners)
    return output, place if gaps == 1 else place.floor_divide_(gaps).to(torch.uint8)


def max_pool_winners_backward(grad, winners, input_size, kernel_size, stride, padding, dilation) -> Tensor:
    """Each window's gradient, added where its winner was; differentiable, and laid out as the winners are."""
    rows, columns = (
        torch.arange(size, device=grad.device) * step for size, step in zip(kernel_size, dilation, strict=True)
    )
    offsets = (rows.unsqueeze(1) * input_size[-1] + columns).view(-1)
    top, left = _corners(winners, stride, padding)
    indices = _look_up(offsets, winners.int()).add_(top * input_size[-1] + left)
    input = grad.new_empty(input_size)
    if winners.dim() == 4 and winners.is_contiguous(memory_format=torch.channels_last) and not winners.is_contiguous():
        input = torch.empty_like(input, memory_format=torch.channels_last)
    # the op below checks the output's size, which only one of the two modes may explain
    sizes = zip(input_size[-2:], kernel_size, stride, padding, dilation, strict=True)
    floor = [(size + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, gap in sizes]
    ceil_mode = floor != list(winners.shape[-2:])
    return aten.max_pool2d_with_indices_backward(
        grad, input, kernel_size, stride, padding, dilation, ceil_mode, indices
    )


def _pack(output: Tensor, upper: float) -> Tensor:
    passes = output.bool()  # true at NaN, and several times as fast as a comparison on the CPU
    if upper < math.inf:
        passes.logical_and_(output != upper)
    passes = _in_memory_order(passes)
    if passes.numel() % 8:
        passes = F.pad(passes, (0, -passes.numel() % 8))
    return passes.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def _in_memory_order(dense: Tensor) -> Tensor:
    return dense.as_strided((dense.numel(),), (1,))


def _look_up(table: Tensor, indices: Tensor) -> Tensor:
    """``table[indices]``, laid out as ``indices``, which has no gaps in memory."""
    return table.index_select(0, _in_memory_order(indices)).as_strided(indices.shape, indices.stride())


def _corners(windows: Tensor, stride: list[int], padding: list[int]) -> tuple[Tensor, Tensor]:
    """The upper left corner of each window in the unpadded image: rows as (height, 1), columns as (width,)."""
    top, left = (
        torch.arange(size, device=windows.device) * step - pad
        for size, step, pad in zip(windows.shape[-2:], stride, padding, strict=True)
    )
    return top.unsqueeze(1), left
