"""Masks of any granularity over flat buffers: effective weights, and the gradients of the masks.

The table of layers has one row per layer, ``[start, length, mask_start, mask_length, size, stride, size, stride, …]``:
where its weight and its mask lie in their buffers; then, from the innermost dimension to the outermost, the sizes of
the weight and the strides of the mask over them, 0 where it is broadcast. The weight itself is dense. A start is a
multiple of 16, and so is the length of a buffer; what lies between two layers is theirs to write zeros to. ``layers``
are the table's numbers once more, at hand without waiting for a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class _Layer(NamedTuple):
    start: int
    length: int
    mask_start: int
    mask_length: int
    sizes: list[int]
    strides: list[int]

    def weight(self, flat: Tensor) -> Tensor:
        """The layer's weights in a flat buffer."""
        return flat.narrow(0, self.start, self.length).view(self.sizes)

    def mask(self, flat: Tensor) -> Tensor:
        """The layer's masks in a flat buffer, in the weight's shape."""
        return flat.narrow(0, self.mask_start, self.mask_length).as_strided(self.sizes, self.strides)


def arena_effective_weight_(
    effective: Tensor, weight: Tensor, mask: Tensor, noise: Tensor | None, table: Tensor, layers: list[int]
) -> None:
    """``weight * mask``, or ``weight * (mask + noise)``, of every layer."""
    factor = mask if noise is None else mask + noise
    for layer in _rows(table, layers):
        torch.mul(layer.weight(weight), layer.mask(factor), out=layer.weight(effective))


def arena_mask_grad(grad: Tensor, weight: Tensor, mask: Tensor, table: Tensor, layers: list[int]) -> Tensor:
    """``grad * weight``, summed where the mask is broadcast; zeros between the layers."""
    dtype = torch.promote_types(torch.promote_types(grad.dtype, weight.dtype), mask.dtype)
    grads = torch.zeros_like(mask)
    for layer in _rows(table, layers):
        product = layer.weight(grad).to(dtype) * layer.weight(weight)
        kept = [size if stride else 1 for size, stride in zip(layer.sizes, layer.strides, strict=True)]
        target = layer.mask(grads).as_strided(kept, layer.strides)
        target.copy_(product.sum_to_size(kept))
    return grads


def _rows(table: Tensor, layers: list[int]) -> Iterator[_Layer]:
    width = table.shape[1]
    for at in range(0, len(layers), width):
        row = layers[at : at + width]
        # the sizes stand innermost first, a tensor's outermost first
        yield _Layer(*row[:4], row[4::2][::-1], row[5::2][::-1])
