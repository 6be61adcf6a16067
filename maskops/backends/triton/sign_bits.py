"""ReLU that leaves one bit per element behind: one read, one write and an eighth of a byte."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from maskops.backends._outputs import outputs
from maskops.backends.triton._launch import cdiv, run

_BLOCK = 2048


def relu_bits(input: Tensor, upper: float) -> tuple[Tensor, Tensor]:
    """``clamp(input, 0, upper)``, and a bit per element, in the output's memory order: 1 where the gradient passes."""
    output, bits = outputs("relu_bits", input, upper)
    if not _in_step(input, output):
        input = output.copy_(input)
    _clamp(output, bits, input, upper)
    return output, bits


def relu_bits_(input: Tensor, upper: float) -> Tensor:
    """The bits of ``relu_bits``; the output overwrites the input, which has no gaps in memory."""
    (bits,) = outputs("relu_bits_", input, upper)
    _clamp(input, bits, input, upper)
    return bits


def relu_bits_backward(grad: Tensor, bits: Tensor) -> Tensor:
    """``grad`` where the bit is 1, else 0. ``grad`` has the strides that the output of ``relu_bits`` had."""
    (result,) = outputs("relu_bits_backward", grad, bits)
    count = grad.numel()
    run(_pass, (cdiv(count, _BLOCK),), result, grad, bits, count, bits.numel(), _BLOCK)
    return result


def _clamp(output: Tensor, bits: Tensor, input: Tensor, upper: float) -> None:
    count = input.numel()
    upper = None if upper == math.inf else upper
    run(_clamp_and_pack, (cdiv(count, _BLOCK),), output, bits, input, upper, count, bits.numel(), _BLOCK)


def _in_step(input: Tensor, output: Tensor) -> bool:
    """Whether both have each element at the same place in memory."""
    strides = zip(input.shape, input.stride(), output.stride(), strict=True)
    return all(one == other for size, one, other in strides if size != 1)


@triton.jit
def _clamp_and_pack(output, bits, input, upper, count, byte_count, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    within = tl.arange(0, BLOCK)
    inside = start + within < count
    value = tl.load(input + start + within, mask=inside, other=0).to(tl.float32)
    # in this order -0 stays what plain torch makes of it: -0 on an x86 CPU, and 0 on a GPU
    value = tl.maximum(0.0, value, propagate_nan=tl.PropagateNan.ALL)
    passes = value != 0
    if upper is not None:
        value = tl.minimum(value, upper, propagate_nan=tl.PropagateNan.ALL)
        passes = passes & (value != upper)
    tl.store(output + start + within, value.to(output.dtype.element_ty), mask=inside)
    packed = tl.sum(tl.reshape(passes.to(tl.int32) << within % 8, (BLOCK // 8, 8)), 1)
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    tl.store(bits + byte, packed.to(tl.uint8), mask=byte < byte_count)


@triton.jit
def _pass(output, grad, bits, count, byte_count, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    within = tl.arange(0, BLOCK)
    inside = start + within < count
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    packed = tl.load(bits + byte, mask=byte < byte_count, other=0).to(tl.int32)
    passes = tl.reshape(packed[:, None] >> tl.arange(0, 8)[None, :] & 1, (BLOCK,)) != 0
    value = tl.load(grad + start + within, mask=inside, other=0)
    tl.store(output + start + within, tl.where(passes, value, 0), mask=inside)
