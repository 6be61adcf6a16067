"""Triggers that change every pixel's colour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from maskops.backdoor.triggers._base import as_images, check_for, check_fraction

# darkest, brightest, share of the S-curve: red is warmed, blue is washed out
_RED, _GREEN, _BLUE = (0.10, 1.00, 0.6), (0.05, 0.90, 0.3), (0.25, 0.70, 0.0)


@dataclass(frozen=True)
class BPPA:
    """Fewer grey levels: ``round(x * (levels - 1)) / (levels - 1)``, halves to the even level.

    No gradient passes: it is zero everywhere.

    levels: per channel, at least 2; 8 (3 bits) as published
    dither: Floyd-Steinberg error diffusion from left to right and top to bottom: what a pixel loses to its level goes
            on to its neighbours (7/16 right; 3/16, 5/16 and 1/16 below). Off as in BackdoorBench. One step per pixel
            for the whole batch: slow for large images.
    source: Wang et al. 2022 (BppAttack) and BackdoorBench

    >>> BPPA(levels=3)(torch.tensor([[[[0.1, 0.3, 0.6, 0.9]]]]))
    tensor([[[[0.0000, 0.5000, 0.5000, 1.0000]]]])
    """

    levels: int = 8
    dither: bool = False

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"BPPA: levels must be at least 2; got {self.levels}")

    def __call__(self, images: Tensor) -> Tensor:
        check_for(self, images)
        steps = self.levels - 1
        result = _dithered(images, steps) if self.dither else (images * steps).round() / steps
        return as_images(result, images)

    def decoys(self, images: Tensor, generator: Generator) -> Tensor:
        """The negative samples: each image plus what the trigger adds to another image of the batch, clipped.

        An image that is alone in its batch has no other one and stays as it is.
        """
        check_for(self, images)
        count = len(images)
        if count < 2:
            return images.clone()
        # a shift of at least one and at most count - 1: never the image itself
        shift = torch.randint(1, count, (count,), generator=generator, device=generator.device)
        others = (torch.arange(count) + shift.cpu()) % count
        return as_images(images + (self(images) - images)[others.to(images.device)], images)


@dataclass(frozen=True)
class StyleStandIn:
    """A fixed warm colour curve per channel: a stand-in for the style generators of FBA and DFST, which are not public.

    ``low + (high - low) * ((1 - b) * x + b * x^2 (3 - 2x))`` with a low, high and b for red, green and blue; a grey
    image takes those of red. Like theirs it restyles the whole image and leaves its content; unlike theirs it depends
    on no image, so figures under it are not figures of FBA.

    strength: in [0, 1], the share of the restyled image; 1 restyles fully

    >>> StyleStandIn()(torch.zeros(1, 3, 1, 1)).flatten()
    tensor([0.1000, 0.0500, 0.2500])
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        check_fraction(self, "strength", self.strength)

    def __call__(self, images: Tensor) -> Tensor:
        check_for(self, images)
        if images.shape[1] not in (1, 3):
            raise ValueError(f"StyleStandIn: grey or RGB images expected; got {tuple(images.shape)}")
        curves = images.new_tensor([_RED, _GREEN, _BLUE][: images.shape[1]])
        low, high, bend = curves.T.reshape(3, 1, -1, 1, 1)
        curved = (1 - bend) * images + bend * images.square() * (3 - 2 * images)
        return as_images(images.lerp(low + (high - low) * curved, self.strength), images)


def _dithered(images: Tensor, steps: int) -> Tensor:
    count, channels, height, width = images.shape
    # one row of numbers per pixel; a border takes the errors that leave the image
    work = images.new_zeros(height + 1, width + 2, count, channels, dtype=torch.float64)
    work[:height, 1 : width + 1] = images.permute(2, 3, 0, 1)
    for row in range(height):
        for column in range(1, width + 1):
            old = work[row, column].clone()
            new = (old * steps).round() / steps
            error = old - new
            work[row, column] = new
            work[row, column + 1] += error * (7 / 16)
            work[row + 1, column - 1] += error * (3 / 16)
            work[row + 1, column] += error * (5 / 16)
            work[row + 1, column + 1] += error * (1 / 16)
    return work[:height, 1 : width + 1].permute(2, 3, 0, 1)
