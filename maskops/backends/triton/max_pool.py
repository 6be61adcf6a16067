"""Max-pooling that leaves one byte per window, and its gradient as a gather, which adds in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskops.backends._outputs import outputs
from maskops.backends.triton._launch import cdiv, run

_BLOCK = 1024


def max_pool_winners(
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """``max_pool2d``, and for each window the winner's place in it, row by row, in a byte: at most 256 places."""
    output, winners = outputs("max_pool_winners", input, kernel_size, stride, padding, dilation, ceil_mode)
    run(
        _max_pool,
        (cdiv(output.numel(), _BLOCK),),
        *(output, winners, input, _strides(input)),
        *(*input.shape[-3:], *output.shape[-2:], output.numel()),
        *(*kernel_size, *stride, *padding, *dilation),
        *(_channels_are_innermost(output), _is_wide(input, output), _BLOCK),
    )
    return output, winners


def max_pool_winners_backward(
    grad: Tensor,
    winners: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """For each pixel, the gradients of the windows that it won, summed in float32; laid out as the winners are."""
    channels_last = _channels_are_innermost(winners)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    result = torch.empty(input_size, dtype=grad.dtype, device=grad.device, memory_format=layout)
    run(
        _max_pool_backward,
        (cdiv(result.numel(), _BLOCK),),
        *(result, grad, winners, _strides(grad), _strides(winners)),
        *(*result.shape[-3:], *grad.shape[-2:], result.numel()),
        *(*kernel_size, *stride, *padding, *dilation),
        *(channels_last, _is_wide(result, grad, winners), _BLOCK),
    )
    return result


def _strides(images: Tensor) -> tuple[int, ...]:
    """Those of (batch, channels, rows, columns); an image without a batch is the only one of its batch."""
    return tuple(images.stride()) if images.dim() == 4 else (0, *images.stride())


def _channels_are_innermost(dense: Tensor) -> bool:
    return not dense.is_contiguous() and dense.is_contiguous(memory_format=torch.channels_last)


def _is_wide(*tensors: Tensor) -> bool:
    """Whether a place in one of them, or a block past its end, needs 64 bits."""
    extents = (
        sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors if t.numel()
    )
    return max(extents, default=0) + _BLOCK >= 2**31


@triton.jit
def _coordinates(index, channels, rows, columns, CHANNELS_LAST: tl.constexpr):
    """Image, channel, row and column of an element of dense memory."""
    if CHANNELS_LAST:
        channel = index % channels
        pixel = index // channels
        column = pixel % columns
        row = pixel // columns % rows
        image = pixel // columns // rows
    else:
        column = index % columns
        row = index // columns % rows
        plane = index // columns // rows
        channel = plane % channels
        image = plane // channels
    return image, channel, row, column


@triton.jit
def _max_pool(
    output, winners, input, strides, channels, rows, columns, output_rows, output_columns, count,
    KERNEL_ROWS: tl.constexpr, KERNEL_COLUMNS: tl.constexpr, STRIDE_ROWS: tl.constexpr, STRIDE_COLUMNS: tl.constexpr,
    PAD_ROWS: tl.constexpr, PAD_COLUMNS: tl.constexpr, STEP_ROWS: tl.constexpr, STEP_COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK + tl.arange(0, BLOCK)
    image, channel, row, column = _coordinates(index, channels, output_rows, output_columns, CHANNELS_LAST)
    top = row * STRIDE_ROWS - PAD_ROWS
    left = column * STRIDE_COLUMNS - PAD_COLUMNS
    plane = input + image * strides[0] + channel * strides[1]
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    # where all is -inf, the first place inside the image wins
    first_row = (tl.maximum(-top, 0) + STEP_ROWS - 1) // STEP_ROWS
    winner = first_row * KERNEL_COLUMNS + (tl.maximum(-left, 0) + STEP_COLUMNS - 1) // STEP_COLUMNS
    for place in tl.range(KERNEL_ROWS * KERNEL_COLUMNS, loop_unroll_factor=4):
        y = top + place // KERNEL_COLUMNS * STEP_ROWS
        x = left + place % KERNEL_COLUMNS * STEP_COLUMNS
        inside = (index < count) & (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
        value = tl.load(plane + y * strides[2] + x * strides[3], mask=inside, other=float("-inf")).to(tl.float32)
        wins = (value > best) | (value != value)  # of several NaN the last wins, as in torch
        best = tl.where(wins, value, best)
        winner = tl.where(wins, place, winner)
    tl.store(output + index, best.to(output.dtype.element_ty), mask=index < count)
    tl.store(winners + index, winner.to(tl.uint8), mask=index < count)


@triton.jit
def _max_pool_backward(
    output, grad, winners, grad_strides, winners_strides, channels, rows, columns, grad_rows, grad_columns, count,
    KERNEL_ROWS: tl.constexpr, KERNEL_COLUMNS: tl.constexpr, STRIDE_ROWS: tl.constexpr, STRIDE_COLUMNS: tl.constexpr,
    PAD_ROWS: tl.constexpr, PAD_COLUMNS: tl.constexpr, STEP_ROWS: tl.constexpr, STEP_COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK + tl.arange(0, BLOCK)
    image, channel, row, column = _coordinates(index, channels, rows, columns, CHANNELS_LAST)
    grad += image * grad_strides[0] + channel * grad_strides[1]
    winners += image * winners_strides[0] + channel * winners_strides[1]
    # how many windows may reach a pixel, along each side; the last of them begins at the pixel or before it
    REACH_ROWS: tl.constexpr = ((KERNEL_ROWS - 1) * STEP_ROWS + STRIDE_ROWS) // STRIDE_ROWS
    REACH_COLUMNS: tl.constexpr = ((KERNEL_COLUMNS - 1) * STEP_COLUMNS + STRIDE_COLUMNS) // STRIDE_COLUMNS
    first_row = (row + PAD_ROWS) // STRIDE_ROWS - (REACH_ROWS - 1)
    first_column = (column + PAD_COLUMNS) // STRIDE_COLUMNS - (REACH_COLUMNS - 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for window in tl.range(REACH_ROWS * REACH_COLUMNS, loop_unroll_factor=4):
        y = first_row + window // REACH_COLUMNS
        x = first_column + window % REACH_COLUMNS
        down = row + PAD_ROWS - y * STRIDE_ROWS
        right = column + PAD_COLUMNS - x * STRIDE_COLUMNS
        inside = (index < count) & (y >= 0) & (y < grad_rows) & (x >= 0) & (x < grad_columns)
        place = down // STEP_ROWS * KERNEL_COLUMNS + right // STEP_COLUMNS
        winner = tl.load(winners + y * winners_strides[2] + x * winners_strides[3], mask=inside, other=0).to(tl.int32)
        value = tl.load(grad + y * grad_strides[2] + x * grad_strides[3], mask=inside, other=0).to(tl.float32)
        won = inside & (winner == place) & (right // STEP_COLUMNS < KERNEL_COLUMNS)
        won = won & (down % STEP_ROWS == 0) & (right % STEP_COLUMNS == 0)
        total += tl.where(won, value, 0)
    tl.store(output + index, total.to(output.dtype.element_ty), mask=index < count)
