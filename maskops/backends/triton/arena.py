"""Masks of any granularity over flat buffers, each op in one launch over all layers: the backend's side of the table.

A program finds its layer by counting the blocks of those before it, so a block never spans two layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskops.backends.triton._launch import cdiv, power_of_two, run

_BLOCK = 1024


def arena_effective_weight_(
    effective: Tensor, weight: Tensor, mask: Tensor, noise: Tensor | None, table: Tensor, layers: list[int]
) -> None:
    """``weight * mask``, or ``weight * (mask + noise)``, of every layer in one launch."""
    rows, dims, most = _sizes(table)
    # a layer's last block may be almost empty
    grid = (cdiv(weight.numel(), _BLOCK) + rows if rows else 0,)
    run(_arena_effective_weight, grid, effective, weight, mask, noise, table, rows, dims, most, _index(weight), _BLOCK)


def arena_mask_grad(grad: Tensor, weight: Tensor, mask: Tensor, table: Tensor, layers: list[int]) -> Tensor:
    """``grad * weight``, summed where the mask is broadcast, of every layer in one launch."""
    grads = torch.zeros_like(mask)
    rows, dims, most = _sizes(table)
    terms = power_of_two(cdiv(weight.numel(), max(mask.numel(), 1)), 1, _BLOCK)
    entries = _BLOCK // terms
    grid = (cdiv(mask.numel(), entries) + rows if rows else 0,)
    # where terms are few, it is entries that lie side by side in memory, as the masks of kernels do
    constants = dims, most, _index(weight), entries, terms, terms <= 32
    run(_arena_mask_grad, grid, grads, grad, weight, table, rows, *constants)
    return grads


def _sizes(table: Tensor) -> tuple[int, int, int]:
    """Number of layers, of dimensions, and the power of two that holds the layers."""
    rows, width = table.shape
    return rows, (width - 4) // 2, power_of_two(rows, 1, 1 << 30)


def _index(weight: Tensor) -> tl.dtype:
    """What counts the entries of a layer."""
    return tl.int32 if weight.numel() < 2**31 else tl.int64


@triton.jit
def _arena_effective_weight(
    effective, weight, mask, noise, table, rows,
    DIMS: tl.constexpr, MOST: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer, block = _find(table + 1, rows, 4 + 2 * DIMS, MOST, BLOCK)
    if layer < rows:
        row = table + layer * (4 + 2 * DIMS)
        start, length = tl.multiple_of(tl.load(row), 16), tl.load(row + 1).to(INDEX)
        index = block.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
        # with the zeros up to the next multiple of 16, so that whole vectors are read and written
        padded = index < tl.multiple_of((length + 15) // 16 * 16, 16)
        inside = index < length
        at_mask = tl.load(row + 2) + _offsets(index, row, DIMS)
        factor = tl.load(mask + at_mask, mask=inside, other=0).to(tl.float32)
        if noise is not None:
            factor += tl.load(noise + at_mask, mask=inside, other=0).to(tl.float32)
        value = tl.load(weight + start + index, mask=padded, other=0).to(tl.float32) * factor
        tl.store(effective + start + index, value.to(effective.dtype.element_ty), mask=padded)


@triton.jit
def _arena_mask_grad(
    grads, grad, weight, table, rows,
    DIMS: tl.constexpr, MOST: tl.constexpr, INDEX: tl.constexpr,
    ENTRIES: tl.constexpr, TERMS: tl.constexpr, ENTRIES_INNER: tl.constexpr,
):  # fmt: skip
    layer, block = _find(table + 3, rows, 4 + 2 * DIMS, MOST, ENTRIES)
    if layer < rows:
        row = table + layer * (4 + 2 * DIMS)
        start, length, count = tl.load(row), tl.load(row + 1).to(INDEX), tl.load(row + 3).to(INDEX)
        entry = block.to(INDEX) * ENTRIES + tl.arange(0, ENTRIES)
        at_weight, at_mask = _places(entry, row, True, DIMS)
        terms = length // count
        total = tl.zeros((TERMS, ENTRIES) if ENTRIES_INNER else (ENTRIES, TERMS), tl.float32)
        for first in range(0, terms, TERMS):
            term = first + tl.arange(0, TERMS).to(INDEX)
            at_term, _ = _places(term, row, False, DIMS)
            if ENTRIES_INNER:
                inside = (term < terms)[:, None] & (entry < count)[None, :]
                at = start + at_term[:, None] + at_weight[None, :]
            else:
                inside = (entry < count)[:, None] & (term < terms)[None, :]
                at = start + at_weight[:, None] + at_term[None, :]
            value = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
            total += tl.load(grad + at, mask=inside, other=0).to(tl.float32) * value
        result = tl.sum(total, 0 if ENTRIES_INNER else 1).to(grads.dtype.element_ty)
        tl.store(grads + tl.load(row + 2) + at_mask, result, mask=entry < count)


@triton.jit
def _find(lengths, rows, WIDTH: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """The layer that a program works on, and which of the layer's blocks; past the last layer where there is none."""
    program = tl.program_id(0)
    row = tl.arange(0, MOST)
    blocks = ((tl.load(lengths + row * WIDTH, mask=row < rows, other=0) + BLOCK - 1) // BLOCK).to(tl.int32)
    before = tl.cumsum(blocks, 0) <= program
    return tl.sum(before.to(tl.int32), 0), program - tl.sum(tl.where(before, blocks, 0), 0)


@triton.jit
def _offsets(index, row, DIMS: tl.constexpr):
    """Where in its mask entry ``index`` of a weight has its factor."""
    offset = tl.zeros_like(index)
    for d in tl.static_range(DIMS):
        size = tl.load(row + 4 + 2 * d).to(index.dtype)
        here = index % size if d < DIMS - 1 else index
        offset += here * tl.load(row + 5 + 2 * d).to(index.dtype)
        index = index // size
    return offset


@triton.jit
def _places(index, row, KEPT: tl.constexpr, DIMS: tl.constexpr):
    """Where entry ``index`` lies in weight and mask: over the mask's own dimensions, or over those that are summed."""
    at_weight, at_mask = tl.zeros_like(index), tl.zeros_like(index)
    weight_stride = tl.full((), 1, index.dtype)
    for d in tl.static_range(DIMS):
        size = tl.load(row + 4 + 2 * d).to(index.dtype)
        stride = tl.load(row + 5 + 2 * d).to(index.dtype)
        counted = tl.where((stride != 0) == KEPT, size, 1)
        here = index % counted
        at_weight += here * weight_stride
        at_mask += here * stride
        weight_stride *= size
        index = index // counted
    return at_weight, at_mask
