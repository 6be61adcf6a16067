from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from maskops.backdoor._checks import check_images


class Trigger(Protocol):
    """A map of images to triggered images.

    images:  (N, C, H, W) floating point in [0, 1], any device; never modified
    returns: shape, dtype and device of images, in [0, 1]
    """

    def __call__(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class DecoyTrigger(Trigger, Protocol):
    """A trigger that trains with decoys: images that resemble triggered ones and keep their true label.

    ``decoys(images, generator)`` maps as the call does; a generator on the CPU draws the same on any device.
    """

    def decoys(self, images: Tensor, generator: Generator) -> Tensor: ...


def name_of(trigger: Trigger) -> str:
    return type(trigger).__name__


def check_fraction(trigger: Trigger, field_name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name_of(trigger)}: {field_name} must lie in [0, 1]; got {value}")


def check_for(trigger: Trigger, images: Tensor) -> None:
    check_images(name_of(trigger), images)


def as_images(result: Tensor, images: Tensor) -> Tensor:
    """Result clipped to [0, 1], with the dtype and the memory format of images."""
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return result.clamp(0, 1).to(images.dtype).contiguous(memory_format=layout)
