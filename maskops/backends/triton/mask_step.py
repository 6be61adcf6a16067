"""The mask step and the noise's step: one launch over a flat arena, or over a mask of any layout."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskops.backends.triton._launch import cdiv, collapse, run
from maskops.backends.triton.weights import place

_BLOCK = 1024
_ALL = tl.constexpr(tl.PropagateNan.ALL)


def mask_adam_step_(
    mask, grad, weight, effective, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, l1, toward, lower, upper,
    totals=None, stochastic_from=None,
) -> None:  # fmt: skip
    """Adam, L1 term, clip and effective weight in one launch; one more where ``step`` or ``lr`` is on the device."""
    tensors = (mask, grad, weight, effective, exp_avg, exp_avg_sq)
    scales = _adam_scales(step, lr, beta1, beta2, mask.device)
    constants = beta1, beta2, eps, stochastic_from is not None, not _on_host(step)
    numbers = *scales, _number(step), stochastic_from or 0
    _run(_adam, tensors, lower, totals, l1, toward, upper, numbers, constants)


def mask_sgd_step_(
    mask, grad, weight, effective, momentum_buffer, lr, momentum, l1, toward, lower, upper, totals=None
) -> None:
    """SGD with momentum, L1 term, clip and effective weight in one launch."""
    tensors = (mask, grad, weight, effective, momentum_buffer)
    _run(_sgd, tensors, lower, totals, l1, toward, upper, (_number(lr), momentum), ())


def noise_step_(noise: Tensor, grad: Tensor, weight: Tensor | None, step_size: float, bound: float) -> None:
    """A step by the gradient's sign, then into [-bound, bound], in one launch."""
    tensors = (noise, grad, weight)
    sizes, *strides = _space(*tensors)
    grid = (cdiv(noise.numel(), _BLOCK),)
    run(_noise, grid, *tensors, sizes, *strides, step_size, bound, noise.numel(), bound < math.inf, len(sizes), _BLOCK)


def _run(kernel, tensors, lower, totals, l1, toward, upper, numbers, constants) -> None:
    """Launch a step over ``tensors``, the first of which is the mask, and add up its totals if there are any."""
    mask = tensors[0]
    per_entry = lower.dim() > 0
    sizes, *strides = _space(*tensors, lower.expand(mask.shape) if per_entry else None)
    blocks = cdiv(mask.numel(), _BLOCK)
    partials = None if totals is None else torch.empty((3, blocks), dtype=torch.float32, device=mask.device)
    run(
        kernel,
        (blocks,),
        *(*tensors, lower if per_entry else _number(lower), partials, sizes, *strides),
        *(l1, toward, upper, *numbers, mask.numel(), blocks, *constants),
        *(isinstance(numbers[0], Tensor), l1 != 0, per_entry, not _on_host(lower), len(sizes), _BLOCK),
    )
    if totals is not None:
        run(_sum_partials, (3,), totals, partials, blocks, _BLOCK)


def _space(*tensors: Tensor | None) -> tuple[tuple[int, ...], ...]:
    """The first tensor's index space in as few dimensions as possible, and every tensor's strides over it."""
    present = [tensor for tensor in tensors if tensor is not None]
    sizes, *strides = collapse(tuple(present[0].shape), *(tensor.stride() for tensor in present))
    remaining = iter(strides)
    return sizes, *(next(remaining) if tensor is not None else (0,) * len(sizes) for tensor in tensors)


def _on_host(number: Tensor) -> bool:
    return number.device.type == "cpu"


def _number(number: Tensor) -> float | Tensor:
    """What a kernel takes for a 0-d tensor: the number itself if it is at hand, else the tensor to read it from."""
    return float(number.item()) if _on_host(number) else number


def _adam_scales(step, lr, beta1, beta2, device) -> tuple[float | Tensor, float | Tensor]:
    """The step counted up, and what it makes of the learning rate, and factors of the second moments' roots."""
    if not _on_host(step) or not _on_host(lr):
        if _on_host(step):
            step += 1
        scales = torch.empty(2, dtype=torch.float32, device=device)
        logs = [math.log2(beta) if beta else -math.inf for beta in (beta1, beta2)]
        stored = not _on_host(step), not _on_host(lr)
        run(_count_and_scale, (1,), scales, _number(step), _number(lr), *logs, *stored, num_warps=1)
        return scales[0], scales[1]
    step += 1
    count = step.item()
    return _number(lr) / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)


@triton.jit
def _adam(
    mask, grad, weight, effective, exp_avg, exp_avg_sq, lower, partials,
    sizes, mask_strides, grad_strides, weight_strides, effective_strides,
    exp_avg_strides, exp_avg_sq_strides, lower_strides,
    l1, toward, upper, step_size, root_scale, step, stochastic_from, count, blocks,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, STOCHASTIC: tl.constexpr, STEP_STORED: tl.constexpr,
    STORED: tl.constexpr, L1: tl.constexpr, PER_ENTRY: tl.constexpr, LOWER_STORED: tl.constexpr,
    DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    at_mask = mask + place(index, sizes, mask_strides, DIMS)
    at_first = exp_avg + place(index, sizes, exp_avg_strides, DIMS)
    at_second = exp_avg_sq + place(index, sizes, exp_avg_sq_strides, DIMS)
    m = _load(at_mask, inside)
    w = _load_weight(weight, index, inside, sizes, weight_strides, DIMS)
    g = _gradient(m, _load(grad + place(index, sizes, grad_strides, DIMS), inside), w, l1, toward, L1)
    first, second = _load(at_first, inside), _load(at_second, inside)
    # the branches of torch.lerp
    first = first + (1 - BETA1) * (g - first) if 1 - BETA1 < 0.5 else g - (g - first) * BETA1
    second = second * BETA2 + (1 - BETA2) * g * g
    _store(at_first, first, inside)
    _store(at_second, second, inside)
    root = tl.sqrt_rn(second) * load_number(root_scale, STORED)
    m = m - tl.div_rn(first, root + EPS) * load_number(step_size, STORED)
    low, high = _bounds(lower, upper, index, inside, sizes, lower_strides, PER_ENTRY, LOWER_STORED, DIMS)
    m = _clip(m, low, high)
    if STOCHASTIC:
        m = _rounded_by_chance(m, load_number(step, STEP_STORED), index + stochastic_from)
    _finish(
        m, low, high, at_mask, w, effective, partials, index, inside,
        sizes, effective_strides, toward, blocks, DIMS,
    )  # fmt: skip


@triton.jit
def _sgd(
    mask, grad, weight, effective, buffer, lower, partials,
    sizes, mask_strides, grad_strides, weight_strides, effective_strides, buffer_strides, lower_strides,
    l1, toward, upper, lr, momentum, count, blocks,
    STORED: tl.constexpr, L1: tl.constexpr, PER_ENTRY: tl.constexpr, LOWER_STORED: tl.constexpr,
    DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    at_mask = mask + place(index, sizes, mask_strides, DIMS)
    m = _load(at_mask, inside)
    w = _load_weight(weight, index, inside, sizes, weight_strides, DIMS)
    g = _gradient(m, _load(grad + place(index, sizes, grad_strides, DIMS), inside), w, l1, toward, L1)
    if buffer is not None:
        at_buffer = buffer + place(index, sizes, buffer_strides, DIMS)
        g = _load(at_buffer, inside) * momentum + g
        _store(at_buffer, g, inside)
    low, high = _bounds(lower, upper, index, inside, sizes, lower_strides, PER_ENTRY, LOWER_STORED, DIMS)
    _finish(
        _clip(m - g * load_number(lr, STORED), low, high), low, high, at_mask, w, effective, partials, index, inside,
        sizes, effective_strides, toward, blocks, DIMS,
    )  # fmt: skip


@triton.jit
def _noise(
    noise, grad, weight, sizes, noise_strides, grad_strides, weight_strides,
    step_size, bound, count, BOUNDED: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    at_noise = noise + place(index, sizes, noise_strides, DIMS)
    g = _load(grad + place(index, sizes, grad_strides, DIMS), inside)
    w = _load_weight(weight, index, inside, sizes, weight_strides, DIMS)
    value = _load(at_noise, inside) + step_size * _sign(g * w)
    if BOUNDED:
        value = _clip(value, -bound, bound)
    _store(at_noise, value, inside)


@triton.jit
def _gradient(m, g, w, l1, toward, L1: tl.constexpr):
    """The gradient of the mask, with that of the L1 term."""
    g = g * w
    if L1:
        g = g + l1 * _sign(m - toward)
    return g


@triton.jit
def _bounds(
    lower, upper, index, inside, sizes, strides,
    PER_ENTRY: tl.constexpr, LOWER_STORED: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    high = tl.full(index.shape, 0.0, tl.float32) + upper
    if PER_ENTRY:
        low = _load(lower + place(index, sizes, strides, DIMS), inside)
    else:
        low = tl.zeros_like(high) + load_number(lower, LOWER_STORED)
    return low, high


@triton.jit
def _rounded_by_chance(m, count, entry):
    """The bfloat16 above or below, by chance: see ``rounded_by_chance`` of the reference."""
    bits = entry.to(tl.uint32) ^ (count.to(tl.int32).to(tl.uint32) * 0x9E3779B9)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits = bits ^ (bits >> 16)
    rounded = (m.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
    return tl.where(tl.abs(m) < float("inf"), rounded.to(tl.float32, bitcast=True), m)


@triton.jit
def _finish(
    m, low, high, at_mask, w, effective, partials, index, inside,
    sizes, effective_strides, toward, blocks, DIMS: tl.constexpr,
):  # fmt: skip
    """Store the mask, the effective weight that it makes, and this block's part of the totals."""
    dtype: tl.constexpr = at_mask.dtype.element_ty
    m = m.to(dtype)
    tl.store(at_mask, m, mask=inside)
    m = m.to(tl.float32)
    if effective is not None:
        _store(effective + place(index, sizes, effective_strides, DIMS), w * m, inside)
    if partials is not None:
        at = partials + tl.program_id(0)
        tl.store(at, tl.sum(tl.where(inside, tl.abs(m - toward), 0.0), 0))
        tl.store(at + blocks, tl.sum((inside & (m == low.to(dtype).to(tl.float32))).to(tl.float32), 0))
        tl.store(at + 2 * blocks, tl.sum((inside & (m == high.to(dtype).to(tl.float32))).to(tl.float32), 0))


@triton.jit
def _sum_partials(totals, partials, blocks, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        total += tl.load(partials + tl.program_id(0) * blocks + block, mask=block < blocks, other=0)
    tl.store(totals + tl.program_id(0), tl.sum(total, 0).to(totals.dtype.element_ty))


@triton.jit
def _load(pointer, inside):
    return tl.load(pointer, mask=inside, other=0).to(tl.float32)


@triton.jit
def _store(pointer, value, inside):
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _load_weight(weight, index, inside, sizes, strides, DIMS: tl.constexpr):
    """The weight's entries; ones where there is none."""
    if weight is not None:
        value = _load(weight + place(index, sizes, strides, DIMS), inside)
    else:
        value = tl.full(index.shape, 1.0, tl.float32)
    return value


@triton.jit
def _sign(value):
    """1, 0 or -1; of NaN it is 0, as torch's."""
    return (value > 0).to(tl.float32) - (value < 0).to(tl.float32)


@triton.jit
def _clip(value, low, high):
    """Into [low, high]; what is NaN stays it, and low wins over high."""
    return tl.maximum(tl.minimum(value, high, propagate_nan=_ALL), low, propagate_nan=_ALL)


@triton.jit
def load_number(number, STORED: tl.constexpr):
    """A number, from the 0-d tensor that holds it if it is stored."""
    if STORED:
        value = tl.load(number).to(tl.float32)
    else:
        value = number
    return value


@triton.jit
def _count_and_scale(
    scales, step, lr,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, STEP_STORED: tl.constexpr, LR_STORED: tl.constexpr,
):  # fmt: skip
    """lr / (1 - beta1**step) and 1 / sqrt(1 - beta2**step), after the step's tensor was counted up."""
    count = tl.full((), 0, tl.float64) + load_number(step, STEP_STORED)
    if STEP_STORED:
        count += 1
        tl.debug_barrier()  # every thread has read it
        tl.store(step, count.to(step.dtype.element_ty))
    tl.store(scales, (load_number(lr, LR_STORED) / (1 - tl.exp2(count * LOG_BETA1))).to(tl.float32))
    tl.store(scales + 1, (1 / tl.sqrt(1 - tl.exp2(count * LOG_BETA2))).to(tl.float32))
