"""Effective weights, and the gradients of the factors that they are made of."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskops.backends._outputs import outputs
from maskops.backends.triton._launch import cdiv, collapse, power_of_two, run

_BLOCK = 1024


def effective_weight(weight: Tensor, mask: Tensor, noise: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``weight * mask``, or ``weight * (mask + noise)``: one launch."""
    (output,) = outputs("effective_weight", weight, mask, noise, dtype)
    factors = [spread(factor, weight) for factor in (mask, noise)]
    strides = [tensor.stride() if tensor is not None else (0,) * weight.dim() for tensor in (output, weight, *factors)]
    sizes, *strides = collapse(tuple(weight.shape), *strides)
    grid = (cdiv(output.numel(), _BLOCK),)
    run(_effective_weight, grid, output, weight, *factors, sizes, *strides, output.numel(), len(sizes), _BLOCK)
    return output


def effective_weight_backward(
    grad: Tensor, weight: Tensor, mask: Tensor, noise: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    """``grad * (mask + noise)`` for the weight; ``grad * weight``, summed where broadcast, for mask and noise."""
    grads = outputs("effective_weight_backward", grad, weight, mask, noise, needs)
    write_factor_grads(grads, grad.unsqueeze(0), grad.unsqueeze(0), weight, mask, noise, needs)
    return grads


def write_factor_grads(
    grads: list[Tensor],
    total: Tensor,
    perturbed: Tensor | None,
    weight: Tensor,
    mask: Tensor,
    noise: Tensor | None,
    needs: list[bool],
) -> None:
    """The gradients of weight, mask and noise that ``needs`` asks for, from those of the effective weights.

    total:     (parts, *weight) parts whose sum is the gradient over both branches, with and without noise
    perturbed: the same of the branch with noise alone; None where nothing asks for it
    """
    remaining = iter(grads)
    grad_weight, grad_mask, grad_noise = (next(remaining) if need else None for need in needs)
    elementwise = []
    for factor_grad, parts in ((grad_mask, total), (grad_noise, perturbed)):
        summed = factor_grad is not None and factor_grad.shape != weight.shape
        if summed:
            _write_summed(factor_grad, parts, weight)
        elementwise.append(None if summed else factor_grad)
    if grad_weight is None and elementwise == [None, None]:
        return
    perturbed = perturbed if noise is not None and perturbed is not None else total
    factors = [spread(factor, weight) for factor in (mask, noise)]
    tensors = [weight, total[0], perturbed[0], *factors, grad_weight, *elementwise]
    strides = [tensor.stride() if tensor is not None else (0,) * weight.dim() for tensor in tensors]
    sizes, *strides = collapse(tuple(weight.shape), *strides)
    parts = total.shape[0], total.stride(0), perturbed.stride(0)
    grid = (cdiv(weight.numel(), _BLOCK),)
    run(_factor_grads, grid, *tensors, sizes, *strides, *parts, weight.numel(), len(sizes), _BLOCK)


def _write_summed(factor_grad: Tensor, parts: Tensor, weight: Tensor) -> None:
    """The sum of ``parts * weight`` over the parts and over the dimensions in which the factor is broadcast."""
    shape = (1,) * (weight.dim() - factor_grad.dim()) + tuple(factor_grad.shape)
    kept = [i for i, size in enumerate(shape) if size == weight.shape[i]]
    summed = [i for i in range(weight.dim()) if i not in kept]
    target = factor_grad.view(shape)

    def over(dims: list[int], *tensors: Tensor) -> tuple:
        return collapse(tuple(weight.shape[i] for i in dims), *(tuple(t.stride(i) for i in dims) for t in tensors))

    count = factor_grad.numel()
    terms = weight.numel() // count if count else 0
    block = power_of_two(terms, 1, _BLOCK)
    rows = _BLOCK // block
    kept_space, summed_space = over(kept, weight, parts[0], target), over(summed, weight, parts[0])
    run(
        _summed_factor_grad,
        (cdiv(count, rows),),
        *(factor_grad, weight, parts, *kept_space, *summed_space, parts.shape[0], parts.stride(0), count, terms),
        *(len(kept_space[0]), len(summed_space[0]), rows, block),
    )


def spread(factor: Tensor | None, weight: Tensor) -> Tensor | None:
    """The factor in the weight's shape, with strides of 0 where it is broadcast, on the weight's device."""
    return None if factor is None else factor.to(weight.device).expand(weight.shape)


@triton.jit
def place(index, sizes, strides, DIMS: tl.constexpr):
    """Where in memory a tensor has entry ``index`` of a collapsed index space."""
    offset = tl.zeros_like(index)
    for d in tl.static_range(DIMS):
        here = index % sizes[d] if d < DIMS - 1 else index
        offset += here * strides[d]
        index = index // sizes[d]
    return offset


@triton.jit
def only_if(inside, condition):
    """``inside`` where a condition on the whole program holds: the interpreter's ``&`` would make integers of both."""
    return (inside.to(tl.int32) & condition) != 0


@triton.jit
def load_factor(pointer, inside):
    """A mask's or noise's entries as float32; bytes count in steps of 1/255."""
    value = tl.load(pointer, mask=inside, other=0)
    if pointer.dtype.element_ty.is_int():
        return tl.div_rn(value.to(tl.float32), 255.0)
    return value.to(tl.float32)


@triton.jit
def _effective_weight(
    output, weight, mask, noise,
    sizes, output_strides, weight_strides, mask_strides, noise_strides,
    count, DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    factor = load_factor(mask + place(index, sizes, mask_strides, DIMS), inside)
    if noise is not None:
        factor += load_factor(noise + place(index, sizes, noise_strides, DIMS), inside)
    value = tl.load(weight + place(index, sizes, weight_strides, DIMS), mask=inside, other=0).to(tl.float32)
    at = place(index, sizes, output_strides, DIMS)
    tl.store(output + at, (value * factor).to(output.dtype.element_ty), mask=inside)


@triton.jit
def _factor_grads(
    weight, total, perturbed, mask, noise, grad_weight, grad_mask, grad_noise,
    sizes, weight_strides, total_strides, perturbed_strides, mask_strides, noise_strides,
    grad_weight_strides, grad_mask_strides, grad_noise_strides,
    parts, total_part, perturbed_part, count, DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    at_total = place(index, sizes, total_strides, DIMS)
    at_perturbed = place(index, sizes, perturbed_strides, DIMS)
    total_grad = tl.zeros((BLOCK,), tl.float32)
    perturbed_grad = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total_grad += tl.load(total + part * total_part + at_total, mask=inside, other=0).to(tl.float32)
        if grad_noise is not None or (grad_weight is not None and noise is not None):
            at = part * perturbed_part + at_perturbed
            perturbed_grad += tl.load(perturbed + at, mask=inside, other=0).to(tl.float32)
    value = tl.load(weight + place(index, sizes, weight_strides, DIMS), mask=inside, other=0).to(tl.float32)
    if grad_mask is not None:
        at = place(index, sizes, grad_mask_strides, DIMS)
        tl.store(grad_mask + at, (total_grad * value).to(grad_mask.dtype.element_ty), mask=inside)
    if grad_noise is not None:
        at = place(index, sizes, grad_noise_strides, DIMS)
        tl.store(grad_noise + at, (perturbed_grad * value).to(grad_noise.dtype.element_ty), mask=inside)
    if grad_weight is not None:
        product = total_grad * load_factor(mask + place(index, sizes, mask_strides, DIMS), inside)
        if noise is not None:
            product += perturbed_grad * load_factor(noise + place(index, sizes, noise_strides, DIMS), inside)
        at = place(index, sizes, grad_weight_strides, DIMS)
        tl.store(grad_weight + at, product.to(grad_weight.dtype.element_ty), mask=inside)


@triton.jit
def _summed_factor_grad(
    output, weight, grad,
    kept_sizes, kept_weight_strides, kept_grad_strides, kept_output_strides,
    summed_sizes, summed_weight_strides, summed_grad_strides,
    parts, part_stride, count, terms,
    KEPT: tl.constexpr, SUMMED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_weight = weight + place(row, kept_sizes, kept_weight_strides, KEPT)[:, None]
    row_grad = grad + place(row, kept_sizes, kept_grad_strides, KEPT)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, terms, BLOCK):
        term = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = (row[:, None] < count) & (term[None, :] < terms)
        at_grad = place(term, summed_sizes, summed_grad_strides, SUMMED)[None, :]
        at_weight = place(term, summed_sizes, summed_weight_strides, SUMMED)[None, :]
        product = tl.zeros((ROWS, BLOCK), tl.float32)
        for part in range(parts):
            product += tl.load(row_grad + part * part_stride + at_grad, mask=inside, other=0).to(tl.float32)
        total += product * tl.load(row_weight + at_weight, mask=inside, other=0).to(tl.float32)
    at_output = place(row, kept_sizes, kept_output_strides, KEPT)
    summed = tl.sum(total.to(tl.float64), 1)  # once per row: what the lanes have summed may be large and cancel
    tl.store(output + at_output, summed.to(output.dtype.element_ty), mask=row < count)
