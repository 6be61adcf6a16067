"""ReLU that leaves one bit per element behind: one read, one write and an eighth of a byte. ReLU backwards, too."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskops.backends._outputs import outputs
from maskops.backends.triton._launch import cdiv, run

_BLOCK = 2048


class Finish(NamedTuple):
    """What becomes of a layer's sums before they are written: plus the addend, then through a ReLU, or back through it.

    addend: in memory as the result
    gate:   a ReLU's output, in memory as the result, or its bits, in the result's memory order; it lets gradients pass
    upper:  of the ReLU; None where there is none
    """

    addend: Tensor | None = None
    gate: Tensor | None = None
    upper: float | None = None
    relu: bool = False


NOTHING = Finish()


def relu_bits(input: Tensor, upper: float) -> tuple[Tensor, Tensor]:
    """``clamp(input, 0, upper)``, and a bit per element, in the output's memory order: 1 where the gradient passes."""
    output, bits = outputs("relu_bits", input, upper)
    if not _is_in_step(input, output):
        input = output.copy_(input)
    _clamp(output, bits, input, None, upper)
    return output, bits


def relu_bits_(input: Tensor, upper: float) -> Tensor:
    """The bits of ``relu_bits``; the output overwrites the input, which has no gaps in memory."""
    (bits,) = outputs("relu_bits_", input, upper)
    _clamp(input, bits, input, None, upper)
    return bits


def relu_bits_backward(grad: Tensor, bits: Tensor) -> Tensor:
    """``grad`` where the bit is 1, else 0. ``grad`` has the strides that the output of ``relu_bits`` had."""
    (result,) = outputs("relu_bits_backward", grad, bits)
    _write(result, grad, bits, None, math.inf)
    return result


def relu_backward(grad: Tensor, gate: Tensor, addend: Tensor | None, upper: float) -> Tensor:
    """``grad + addend`` where the gate, bits or a ReLU's output, lets it pass, else 0: one launch."""
    (result,) = outputs("relu_backward", grad, gate, addend, upper)
    _write(result, grad, gate, addend, upper)
    return result


def relu_backward_(grad: Tensor, gate: Tensor, addend: Tensor | None, upper: float) -> Tensor:
    """``relu_backward``, over ``grad``, which has no gaps in memory, where the result has its dtype."""
    if addend is not None and torch.promote_types(grad.dtype, addend.dtype) != grad.dtype:
        return relu_backward(grad, gate, addend, upper)
    _write(grad, grad, gate, addend, upper)
    return grad


def add_relu_(input: Tensor, residual: Tensor | None, upper: float) -> Tensor:
    """``clamp(input + residual, 0, upper)`` over the input, which has no gaps in memory."""
    if residual is None:
        return input.relu_() if upper == math.inf else input.clamp_(0, upper)
    _clamp(input, None, input, in_step(residual, input), upper)
    return input


def _clamp(output: Tensor, bits: Tensor | None, input: Tensor, residual: Tensor | None, upper: float) -> None:
    count = input.numel()
    byte_count = 0 if bits is None else bits.numel()
    arguments = output, bits, input, residual, finite(upper), count, byte_count
    run(_clamp_and_pack, (cdiv(count, _BLOCK),), *arguments, _BLOCK)


def _write(result: Tensor, grad: Tensor, gate: Tensor, addend: Tensor | None, upper: float) -> None:
    count = result.numel()
    tensors = [result, in_step(grad, result), None if addend is None else in_step(addend, result)]
    tensors.append(in_step(gate, result) if gate.dtype.is_floating_point else gate)
    run(_pass, (cdiv(count, _BLOCK),), *tensors, finite(upper), count, gate.numel(), _BLOCK)


def finite(upper: float) -> float | None:
    """An upper bound as the kernels take it: None where it is infinite."""
    return None if upper == math.inf else upper


def in_step(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, or else a copy of it, with each element where ``like``, which has no gaps, has it in memory."""
    if _is_in_step(tensor, like):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _is_in_step(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(first == second for size, first, second in strides if size != 1)


@triton.jit
def lets_pass(output, upper):
    """Whether the gradient of a ReLU passes at its output: not at 0 and not at the upper bound; at NaN it does."""
    passes = output != 0
    if upper is not None:
        passes = passes & (output != upper)
    return passes


@triton.jit
def clamped(value, upper):
    # in this order -0 stays what plain torch makes of it: -0 on an x86 CPU, and 0 on a GPU
    value = tl.maximum(0.0, value, propagate_nan=tl.PropagateNan.ALL)
    if upper is not None:
        value = tl.minimum(value, upper, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def finished(total, at, inside, addend, gate, upper, RELU: tl.constexpr):
    """What ``Finish`` says, for a tile that is then written ``at`` these places."""
    if addend is not None:
        total += tl.load(addend + at, mask=inside, other=0).to(tl.float32)
    if RELU:
        total = clamped(total, upper)
    if gate is not None:
        if gate.dtype.element_ty == tl.uint8:
            byte = tl.load(gate + at // 8, mask=inside, other=0).to(tl.int32)
            passes = (byte >> (at % 8).to(tl.int32) & 1) != 0
        else:
            passes = lets_pass(tl.load(gate + at, mask=inside, other=0).to(tl.float32), upper)
        total = tl.where(passes, total, 0.0)
    return total


@triton.jit
def _clamp_and_pack(output, bits, input, residual, upper, count, byte_count, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    within = tl.arange(0, BLOCK)
    inside = start + within < count
    value = tl.load(input + start + within, mask=inside, other=0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + start + within, mask=inside, other=0).to(tl.float32)
    value = clamped(value, upper)
    tl.store(output + start + within, value.to(output.dtype.element_ty), mask=inside)
    if bits is not None:
        passes = lets_pass(value, upper).to(tl.int32)
        packed = tl.sum(tl.reshape(passes << within % 8, (BLOCK // 8, 8)), 1)
        byte = start // 8 + tl.arange(0, BLOCK // 8)
        tl.store(bits + byte, packed.to(tl.uint8), mask=byte < byte_count)


@triton.jit
def _pass(output, grad, addend, gate, upper, count, byte_count, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    within = tl.arange(0, BLOCK)
    inside = start + within < count
    value = tl.load(grad + start + within, mask=inside, other=0)
    if addend is not None:
        value = value.to(tl.float32) + tl.load(addend + start + within, mask=inside, other=0).to(tl.float32)
    if gate.dtype.element_ty == tl.uint8:
        byte = start // 8 + tl.arange(0, BLOCK // 8)
        packed = tl.load(gate + byte, mask=byte < byte_count, other=0).to(tl.int32)
        passes = tl.reshape(packed[:, None] >> tl.arange(0, 8)[None, :] & 1, (BLOCK,)) != 0
    else:
        passes = lets_pass(tl.load(gate + start + within, mask=inside, other=0).to(tl.float32), upper)
    tl.store(output + start + within, tl.where(passes, value, 0).to(output.dtype.element_ty), mask=inside)
