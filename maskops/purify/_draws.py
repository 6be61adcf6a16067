"""What the steps of a phase draw: all at once and on the host, so that no step waits for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Drawn = dict[str, Tensor]
"""Fields of :class:`Batch` by name, with the steps of a phase as first dimension."""

Mix = Callable[[tuple[int, ...], Generator], Drawn]
"""Draws for a batch of this shape with which images its images are mixed."""


@dataclass(frozen=True)
class Batch:
    """What one step draws; what it has no use for is None.

    index:    (B,) the clean images that it takes
    corners:  (2, B, 1) of their windows in the padded images
    mirrored: (B,) bool, which of them are mirrored
    partners: (B,) the place in the batch of the image that each is mixed with
    weight:   (), the share of its own in a mixed image
    box:      (4,) where mixed images are their partners': top, bottom, left, right
    """

    index: Tensor
    corners: Tensor | None = None
    mirrored: Tensor | None = None
    partners: Tensor | None = None
    weight: Tensor | None = None
    box: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)


def stacked(batches: list[Drawn]) -> Drawn:
    """The draws of several steps."""
    return {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}


def batch_at(step: Tensor, drawn: Mapping[str, Tensor]) -> Batch:
    """The draws of one step, whose number (1,) is on the device and isn't waited for."""
    return Batch(**{name: tensor.index_select(0, step).squeeze(0) for name, tensor in drawn.items()})
