"""The two ways into the L1 ball: one program for each row, with sums in float64."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from maskops.backends._outputs import outputs
from maskops.backends.triton._launch import power_of_two, run

_LONGEST_HELD = 16384
"""The longest row whose magnitudes a program holds; a longer one it reads in every pass, block after block."""


def rescale_to_l1_ball(input: Tensor, radius: float) -> Tensor:
    """``input * min(1, radius / sum|input|)``."""
    return _into_ball("rescale_to_l1_ball", input, radius)


def project_onto_l1_ball(input: Tensor, radius: float) -> Tensor:
    """``sign(input) * max(|input| - t, 0)`` with the smallest ``t >= 0`` for which the result is inside the ball.

    t is the zero of sum(max(|input| - t, 0)) - radius, which falls and is convex: Newton's steps (Michelot 1986) begin
    below it, never pass it, and have found it when no entry leaves the support any more.
    """
    return _into_ball("project_onto_l1_ball", input, radius)


def _into_ball(op: str, input: Tensor, radius: float) -> Tensor:
    (output,) = outputs(op, input, radius)
    rows, entries = input.shape
    held = entries <= _LONGEST_HELD
    block = power_of_two(entries, 16, _LONGEST_HELD) if held else _LONGEST_HELD // 4
    grid = (rows if entries else 0,)
    strides = *output.stride(), *input.stride()
    project = op == "project_onto_l1_ball"
    warps = power_of_two(block // 256, 1, 16)
    run(_move_into_ball, grid, output, input, *strides, entries, radius, project, held, block, num_warps=warps)
    return output


@triton.jit
def _load(row, stride, place, entries):
    return tl.load(row + place * stride, mask=place < entries, other=0)


@triton.jit
def _sum_over(row, stride, entries, held, threshold, HELD: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the magnitudes that aren't below or at the threshold, so of NaN too, and their number."""
    if HELD:
        over = ~(held <= threshold)
        totals = tl.where(over, held, 0)
        counts = over.to(tl.int32)
    else:
        totals = tl.zeros((BLOCK,), tl.float64)
        counts = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, entries, BLOCK):
            place = start + tl.arange(0, BLOCK).to(tl.int64)
            magnitude = tl.abs(_load(row, stride, place, entries)).to(tl.float64)
            over = ~(magnitude <= threshold)
            totals += tl.where(over, magnitude, 0)
            counts += over.to(tl.int32)
    return tl.sum(totals), tl.sum(counts)


@triton.jit
def _moved(value, factor, inside, PROJECT: tl.constexpr):
    """Entries times the scale, or nearer to zero by the threshold."""
    if PROJECT:
        excess = tl.abs(value).to(tl.float64) - factor
        excess = tl.where(excess < 0, 0, excess)  # a comparison keeps NaN
        moved = (tl.where(value < 0, -1.0, 1.0).to(tl.float64) * excess).to(value.dtype)
        moved = tl.where(inside, value, moved)
    else:
        moved = (value.to(tl.float64) * factor).to(value.dtype)
    return moved


@triton.jit
def _move_into_ball(
    output, input, output_rows, output_entries, input_rows, input_entries, entries, radius: tl.float64,
    PROJECT: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    output += row * output_rows
    input += row * input_rows
    radius = tl.full((), radius, tl.float64)
    first = tl.arange(0, BLOCK).to(tl.int64)
    held = tl.abs(_load(input, input_entries, first, entries)).to(tl.float64) if HELD else None
    total, _ = _sum_over(input, input_entries, entries, held, -1.0, HELD, BLOCK)
    norm = tl.where(total < 2.2250738585072014e-308, 2.2250738585072014e-308, total)
    if PROJECT:
        factor = (total - radius) / entries
        count = tl.full((), entries, tl.int32)
        before = tl.where(norm > radius, count + 1, 0)
        while count < before:
            before = count
            total, count = _sum_over(input, input_entries, entries, held, factor, HELD, BLOCK)
            # none is over a threshold that is the largest magnitude
            factor = tl.where(count > 0, (total - radius) / tl.maximum(count, 1), factor)
    else:
        factor = radius / tl.where(norm < radius, radius, norm)
    factor += norm - norm  # NaN unless finite: one entry that isn't makes its whole row NaN
    # the row is read again, which its cache still holds: its magnitudes alone fill the registers
    for start in range(0, entries, BLOCK):
        place = start + first
        moved = _moved(_load(input, input_entries, place, entries), factor, norm <= radius, PROJECT)
        tl.store(output + place * output_entries, moved, mask=place < entries)
