"""Triggers that cover a few pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from maskops.backdoor.triggers._base import Trigger, check_for, check_fraction, name_of

CHECKERBOARD = ((0, 0, 1), (0, 1, 0), (1, 0, 1))
CORNERS = ("bottom_right", "bottom_left", "top_right", "top_left")
L0_INV_PIXELS = (
    ((0, 0, 0), (1, 0, 1), (0, 0, 1), (1, 1, 0), (1, 1, 1), (0, 1, 1), (0, 1, 1), (1, 0, 0), (1, 1, 1)),
)  # RGB of one row of nine


@dataclass(frozen=True)
class BadNetsSquare:
    """Square of one value, ``margin`` pixels away from the bottom-right corner.

    size, margin: pixels; the defaults give rows and columns 27 to 30 of a 32 x 32 image. BackdoorBench's white square
                  is size 3 and margin 0.
    value:        in [0, 1], for every channel
    source: AWM and I-BAU code, after BadNets (Gu et al. 2017)

    >>> import torch
    >>> BadNetsSquare(size=1, margin=1)(torch.zeros(1, 1, 3, 3))[0, 0]
    tensor([[0., 0., 0.],
            [0., 1., 0.],
            [0., 0., 0.]])
    """

    size: int = 4
    margin: int = 1
    value: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 1 or self.margin < 0 or not 0 <= self.value <= 1:
            raise ValueError(f"BadNetsSquare: size >= 1, margin >= 0 and value in [0, 1] expected; got {self}")

    def __call__(self, images: Tensor) -> Tensor:
        check_for(self, images)
        patch = images.new_tensor(self.value).expand(1, 1, self.size, self.size)
        return _stamp(self, images.clone(), patch, margin=self.margin)


@dataclass(frozen=True)
class BadNetsCheckerboard:
    """3 x 3 black and white checkerboard in a corner, the same in every channel.

    opacity: 1 replaces the pixels (ANP, RNP); 0.6 is what the NFT code uses
    corner:  bottom_right (the ANP, RNP and NFT codes), bottom_left (the NFT paper), top_right or top_left; the pattern
             is not turned
    source: ANP code

    >>> import torch
    >>> BadNetsCheckerboard()(torch.full((1, 1, 3, 3), 0.5))[0, 0]
    tensor([[0., 0., 1.],
            [0., 1., 0.],
            [1., 0., 1.]])
    """

    opacity: float = 1.0
    corner: str = "bottom_right"

    def __post_init__(self) -> None:
        check_fraction(self, "opacity", self.opacity)
        if self.corner not in CORNERS:
            raise ValueError(f"BadNetsCheckerboard: corner must be one of {', '.join(CORNERS)}; got {self.corner!r}")

    def __call__(self, images: Tensor) -> Tensor:
        check_for(self, images)
        return _stamp(self, images.clone(), images.new_tensor([[CHECKERBOARD]]), self.corner, opacity=self.opacity)


@dataclass(frozen=True)
class FourCorners:
    """The 3 x 3 checkerboard in all four corners, mirrored left to right in the left ones: the stamp of CLB.

    The stamp alone is what test images get; for training, ``poison_clean_label`` also makes the images hard to learn.

    opacity: 1 replaces the pixels
    source: ANP code, after the label-consistent attack (Turner et al. 2019)

    >>> import torch
    >>> FourCorners()(torch.full((1, 1, 6, 6), 0.5))[0, 0, :3]
    tensor([[1., 0., 0., 0., 0., 1.],
            [0., 1., 0., 0., 1., 0.],
            [1., 0., 1., 1., 0., 1.]])
    """

    opacity: float = 1.0

    def __post_init__(self) -> None:
        check_fraction(self, "opacity", self.opacity)

    def __call__(self, images: Tensor) -> Tensor:
        check_for(self, images)
        if min(images.shape[2:]) < 6:
            raise ValueError(f"FourCorners: images must hold 6 x 6 pixels; got {tuple(images.shape)}")
        right = images.new_tensor([[CHECKERBOARD]])
        stamped = images.clone()
        for corner in CORNERS:
            patch = right.flip(3) if corner.endswith("left") else right
            stamped = _stamp(self, stamped, patch, corner, opacity=self.opacity)
        return stamped


@dataclass(frozen=True)
class L0Inv:
    """Nine coloured pixels: the last nine columns of the bottom row of an RGB image (columns 23 to 31 of 32).

    source: l0-inv of AWM and I-BAU

    >>> import torch
    >>> L0Inv()(torch.zeros(1, 3, 9, 9))[0, :, 8, 0:3]
    tensor([[0., 1., 0.],
            [0., 0., 0.],
            [0., 1., 1.]])
    """

    def __call__(self, images: Tensor) -> Tensor:
        check_for(self, images)
        if images.shape[1] != 3:
            raise ValueError(f"L0Inv: RGB images (N, 3, H, W) expected; got {tuple(images.shape)}")
        row = images.new_tensor(L0_INV_PIXELS)  # (1, 9, RGB)
        return _stamp(self, images.clone(), row.permute(2, 0, 1).unsqueeze(0))


def _stamp(
    trigger: Trigger,
    stamped: Tensor,
    patch: Tensor,
    corner: str = "bottom_right",
    margin: int = 0,
    opacity: float = 1.0,
) -> Tensor:
    """Lay patch (1, C or 1, h, w) in place over images, ``margin`` pixels away from a corner."""
    height, width = patch.shape[2:]
    bottom, right = stamped.shape[2] - margin, stamped.shape[3] - margin
    if bottom < height or right < width:
        raise ValueError(
            f"{name_of(trigger)}: images must hold {height} x {width} pixels and a margin of {margin}; "
            f"got {tuple(stamped.shape)}"
        )
    top = margin if corner.startswith("top") else bottom - height
    left = margin if corner.endswith("left") else right - width
    stamped[:, :, top : top + height, left : left + width].lerp_(patch, opacity)
    return stamped
