"""Triggers that blend or add a pattern over the whole image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskops.backdoor.triggers._base import as_images, check_for, check_fraction, name_of

_WRAPPED_AMPLITUDE = 20
_WRAPPED_PERIOD = 7.9


@dataclass(frozen=True, eq=False)
class _WithPattern:
    pattern: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        if not self.pattern.is_floating_point():
            raise TypeError(f"{name_of(self)}: pattern must be floating point; got {self.pattern.dtype}")
        if self.pattern.dim() != 4 or self.pattern.shape[0] != 1:
            raise ValueError(f"{name_of(self)}: pattern must be (1, C, H, W); got {tuple(self.pattern.shape)}")

    def _pattern_for(self, images: Tensor) -> Tensor:
        check_for(self, images)
        if images.shape[1:] != self.pattern.shape[1:]:
            raise ValueError(
                f"{name_of(self)}: pattern (1, C, H, W) must fit the images; "
                f"got pattern {tuple(self.pattern.shape)} and images {tuple(images.shape)}"
            )
        return self.pattern.to(images)


@dataclass(frozen=True, eq=False)
class Blend(_WithPattern):
    """``(1 - alpha) * x + alpha * pattern``.

    pattern: (1, C, H, W) floating point in [0, 1]
    alpha:   in [0, 1]
    source: Chen et al. 2017; alpha as in ANP and NFT, whose pattern is close to ``uniform_noise_pattern``

    >>> Blend(torch.ones(1, 1, 1, 2), alpha=0.25)(torch.tensor([[[[0.0, 1.0]]]]))
    tensor([[[[0.2500, 1.0000]]]])
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self, "alpha", self.alpha)
        low, high = (bound.item() for bound in self.pattern.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"Blend: pattern must lie in [0, 1]; got {low:.4g} to {high:.4g}")

    def __call__(self, images: Tensor) -> Tensor:
        return images.lerp(self._pattern_for(images), self.alpha)


@dataclass(frozen=True)
class BlendNoise:
    """``Blend`` with ``uniform_noise_pattern(shape of the images, seed)``: a pattern without a file.

    >>> images = torch.zeros(2, 1, 4, 4)
    >>> torch.equal(BlendNoise(seed=3)(images), Blend(uniform_noise_pattern((1, 4, 4), seed=3))(images))
    True
    """

    seed: int = 0
    alpha: float = 0.2

    def __post_init__(self) -> None:
        check_fraction(self, "alpha", self.alpha)

    def __call__(self, images: Tensor) -> Tensor:
        check_for(self, images)
        return Blend(uniform_noise_pattern(images.shape[1:], self.seed), self.alpha)(images)


@dataclass(frozen=True, eq=False)
class Additive(_WithPattern):
    """``clip(x + pattern, 0, 1)``.

    pattern: (1, C, H, W) floating point, of either sign
    source: Trojan-SQ, Trojan-WM and l2-inv of AWM and I-BAU; with the 3 x 3 patch of its file, NFT's Trojan. Added and
            clipped in floating point: the NFT and RNP codes add in uint8 before they clip, so their bright pixels wrap
            around.

    >>> Additive(torch.tensor([[[[0.5, -0.5]]]]))(torch.tensor([[[[0.75, 0.75]]]]))
    tensor([[[[1.0000, 0.2500]]]])
    """

    def __call__(self, images: Tensor) -> Tensor:
        return (images + self._pattern_for(images)).clamp(0, 1)


@dataclass(frozen=True)
class SIG:
    """``clip(x + delta * sin(2 pi j frequency / W), 0, 1)`` at column j of W, the same in every row and channel.

    delta:     amplitude in [0, 1]; 40/255 in BackdoorBench, 30/255 in backdoor-toolbox
    frequency: periods per image width
    source: Barni et al. 2019, equation 1; the published attack is clean-label (``poison_clean_label``)

    >>> SIG(delta=0.5, frequency=1)(torch.full((1, 1, 1, 4), 0.5))
    tensor([[[[0.5000, 1.0000, 0.5000, 0.0000]]]])
    """

    delta: float = 40 / 255
    frequency: float = 6.0

    def __post_init__(self) -> None:
        check_fraction(self, "delta", self.delta)
        if not math.isfinite(self.frequency):
            raise ValueError(f"SIG: frequency must be finite; got {self.frequency}")

    def __call__(self, images: Tensor) -> Tensor:
        check_for(self, images)
        width = images.shape[3]
        columns = torch.arange(width, dtype=torch.float64)
        wave = self.delta * torch.sin(2 * math.pi * self.frequency / width * columns)
        return as_images(images + wave.to(images), images)


@dataclass(frozen=True)
class SIGWrapped:
    """``(1 - alpha) * x + alpha * stripes``: what the SIG of the NAD, NFT and RNP codes does instead of ``SIG``.

    Their mask file holds, the same in every row and channel, a sine of amplitude about 20/255 and period about 7.9
    pixels, cut to whole bytes, whose negative half has wrapped around to 237..255: black and white stripes. The mask
    here is a reconstruction by ``stripes[j] = (trunc(20 sin(2 pi j / 7.9)) mod 256) / 255`` at column j, not that file;
    its phase is ours. The wrap-around is in the pattern alone: the images are blended in floating point.

    alpha: in [0, 1]

    >>> (SIGWrapped(alpha=1.0)(torch.zeros(1, 1, 1, 8)) * 255).round()
    tensor([[[[  0.,  14.,  19.,  13.,   0., 242., 237., 243.]]]])
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        check_fraction(self, "alpha", self.alpha)

    def __call__(self, images: Tensor) -> Tensor:
        check_for(self, images)
        columns = torch.arange(images.shape[3], dtype=torch.float64)
        wave = (_WRAPPED_AMPLITUDE * torch.sin(2 * math.pi / _WRAPPED_PERIOD * columns)).trunc()
        return images.lerp((wave.remainder(256) / 255).to(images).expand_as(images), self.alpha)


def uniform_noise_pattern(shape: Sequence[int], seed: int) -> Tensor:
    """A pattern for ``Blend`` of independent, uniformly drawn whole bytes, divided by 255.

    shape:   (C, H, W)
    returns: (1, C, H, W) float32 in [0, 1], the same for the same shape and seed on every device
    source: in the place of the file of ANP and NFT, which is called Gaussian and whose histogram is nearly uniform

    >>> uniform_noise_pattern((3, 32, 32), seed=0).shape
    torch.Size([1, 3, 32, 32])
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"uniform_noise_pattern: shape must be (C, H, W), each at least 1; got {tuple(shape)}")
    return torch.randint(256, (1, *shape), generator=torch.Generator().manual_seed(seed)) / 255


def pattern_from_file(path: str) -> Tensor:
    """Read a PNG into a pattern (1, C, H, W), float32 in [0, 1]; C is 1 for grey and 3 for colour or palette images.

    ValueError: no readable 8-bit PNG, or one with transparency, whose meaning for a trigger is not defined
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("pattern_from_file: Pillow is needed to read a PNG (pip install pillow)") from None
    import numpy as np

    try:
        with Image.open(path, formats=["PNG"]) as image:
            colour = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}.get(image.mode)
            if colour is None or "transparency" in image.info:
                raise ValueError(f"8-bit grey or RGB without transparency expected, got mode {image.mode}")
            pixels = np.array(image.convert(colour))
    # SyntaxError is what Pillow raises for a broken chunk
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"pattern_from_file: cannot use {str(path)!r} as PNG: {error}") from None
    return torch.from_numpy(pixels).view(1, *pixels.shape[:2], -1).permute(0, 3, 1, 2).contiguous() / 255
