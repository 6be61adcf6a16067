"""Tensors as parts of flat buffers: each with zeros up to the next multiple of 16 entries behind it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from maskops._memory import ALIGNMENT, OnDevice


def pack(
    tensors: Mapping[str, Tensor], memory: OnDevice, dtype: torch.dtype | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The tensors in one flat buffer with zeros between them, and the views of their shapes in it."""
    values = list(tensors.values())
    dtype = _widest(values) if dtype is None else dtype
    flat = memory.zeros(sum(memory.length(value.numel()) for value in values) // memory.parts, dtype)
    if memory.parts > 1:
        return flat, pack_parts(flat, tensors, memory)
    views = views_of(flat, tensors)
    for name, view in views.items():
        view.copy_(tensors[name].detach())
    return flat, views


def pack_parts(flat: Tensor, tensors: Mapping[str, Tensor], memory: OnDevice) -> dict[str, Tensor]:
    """Write this process's part of each tensor, one after the other; returns the views of them."""
    views, start = {}, 0
    for name, tensor in tensors.items():
        whole = torch.zeros(memory.length(tensor.numel()), dtype=flat.dtype, device=tensor.device)
        shaped(whole[: tensor.numel()], tensor.shape).copy_(tensor.detach())
        part = memory.part(whole)
        views[name] = flat[start : start + len(part)].copy_(part)
        start += len(part)
    return views


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors}
    widest = dtypes.pop()
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def views_of(flat: Tensor, like: Mapping[str, Tensor], starts: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """Views with the shapes of these tensors: one after the other, unless it is said where each begins."""
    views, end = {}, 0
    for name, tensor in like.items():
        start = end if starts is None else starts[name]
        views[name] = shaped(flat[start : start + tensor.numel()], tensor.shape)
        end = start + padded_length(tensor)
    return views


def side_by_side(lengths: Mapping[str, int], groups: Collection[Collection[str]]) -> dict[str, int]:
    """Where each piece begins, so that none overlaps with another of one of its groups, and they end early.

    >>> side_by_side({"a": 32, "b": 16, "c": 48}, [{"a", "b"}, {"c"}])
    {'a': 0, 'b': 32, 'c': 0}
    """
    starts: dict[str, int] = {}
    for name, length in lengths.items():
        beside = set().union(*(group for group in groups if name in group)) & starts.keys()
        start = 0
        for other_start, end in sorted((starts[other], starts[other] + lengths[other]) for other in beside):
            if start + length <= other_start:
                break
            start = max(start, end)
        starts[name] = start
    return starts


def place_of(view: Tensor) -> slice:
    """Where a view lies in its flat buffer, with the zeros behind it."""
    return slice(view.storage_offset(), view.storage_offset() + padded_length(view))


def padded_length(tensor: Tensor) -> int:
    return -(-tensor.numel() // ALIGNMENT) * ALIGNMENT


def shaped(segment: Tensor, shape: torch.Size) -> Tensor:
    """The segment as a tensor of this shape: (out, spatial…, in) in memory for convolutions, row by row otherwise."""
    if len(shape) in (4, 5):
        return segment.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return segment.view(shape)


def collapse(weight: Tensor, mask: Tensor) -> list[tuple[int, int]]:
    """Sizes of a dense weight and strides of its mask, innermost first, in as few dimensions as the mask allows.

    >>> collapse(torch.ones(4, 3, 2), torch.ones(4, 1, 1).expand(4, 3, 2))
    [(6, 0), (4, 1)]
    """
    space: list[tuple[int, int]] = []
    for dim in sorted(range(weight.dim()), key=lambda dim: (weight.stride(dim), weight.shape[dim])):
        size, stride = weight.shape[dim], mask.stride(dim)
        if size == 1:
            continue
        if space and stride == math.prod(space[-1]):
            space[-1] = space[-1][0] * size, space[-1][1]
        else:
            space.append((size, stride))
    return space or [(1, 0)]
