"""Triggers: transforms of images in pixel space, each a frozen dataclass that is called with a batch.

``TRIGGERS`` names them; ``parse`` makes one from a command-line text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from maskops.backdoor._checks import check_images

CHECKERBOARD = ((0, 0, 1), (0, 1, 0), (1, 0, 1))
L0_INV_PIXELS = (
    ((0, 0, 0), (1, 0, 1), (0, 0, 1), (1, 1, 0), (1, 1, 1), (0, 1, 1), (0, 1, 1), (1, 0, 0), (1, 1, 1)),
)  # RGB of one row of nine


class Trigger(Protocol):
    """A map of images to triggered images.

    images:  (N, C, H, W) floating point in [0, 1], any device; never modified
    returns: shape, dtype and device of images, in [0, 1]
    """

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class BadNetsSquare:
    """Square of one value, ``margin`` pixels away from the bottom-right corner.

    size, margin: pixels; the defaults give rows and columns 27 to 30 of a 32 x 32 image
    value:        in [0, 1], for every channel
    source: AWM and I-BAU code, after BadNets (Gu et al. 2017)

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
        return _stamp(self, images, images.new_tensor(self.value).expand(1, 1, self.size, self.size), self.margin)


@dataclass(frozen=True)
class BadNetsCheckerboard:
    """3 x 3 black and white checkerboard in the bottom-right corner, the same in every channel.

    opacity: 1 replaces the pixels (ANP, RNP); 0.6 is what the NFT code uses
    source: ANP code. The NFT paper places it bottom-left, its code bottom-right as here.

    >>> BadNetsCheckerboard()(torch.full((1, 1, 3, 3), 0.5))[0, 0]
    tensor([[0., 0., 1.],
            [0., 1., 0.],
            [1., 0., 1.]])
    """

    opacity: float = 1.0

    def __post_init__(self) -> None:
        _check_fraction(self, "opacity", self.opacity)

    def __call__(self, images: Tensor) -> Tensor:
        return _stamp(self, images, images.new_tensor([[CHECKERBOARD]]), opacity=self.opacity)


@dataclass(frozen=True)
class L0Inv:
    """Nine coloured pixels: the last nine columns of the bottom row of an RGB image (columns 23 to 31 of 32).

    source: l0-inv of AWM and I-BAU
    """

    def __call__(self, images: Tensor) -> Tensor:
        check_images("L0Inv", images)
        if images.shape[1] != 3:
            raise ValueError(f"L0Inv: RGB images (N, 3, H, W) expected; got {tuple(images.shape)}")
        row = images.new_tensor(L0_INV_PIXELS)  # (1, 9, RGB)
        return _stamp(self, images, row.permute(2, 0, 1).unsqueeze(0))


@dataclass(frozen=True, eq=False)
class _WithPattern:
    pattern: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        if not self.pattern.is_floating_point():
            raise TypeError(f"{_name(self)}: pattern must be floating point; got {self.pattern.dtype}")
        if self.pattern.dim() != 4 or self.pattern.shape[0] != 1:
            raise ValueError(f"{_name(self)}: pattern must be (1, C, H, W); got {tuple(self.pattern.shape)}")

    def _pattern_for(self, images: Tensor) -> Tensor:
        check_images(_name(self), images)
        if images.shape[1:] != self.pattern.shape[1:]:
            raise ValueError(
                f"{_name(self)}: pattern (1, C, H, W) must fit the images; "
                f"got pattern {tuple(self.pattern.shape)} and images {tuple(images.shape)}"
            )
        return self.pattern.to(images)


@dataclass(frozen=True, eq=False)
class Blend(_WithPattern):
    """``(1 - alpha) * x + alpha * pattern``.

    pattern: (1, C, H, W) floating point in [0, 1]
    alpha:   in [0, 1]
    source: Chen et al. 2017; alpha as in ANP and NFT

    >>> Blend(torch.ones(1, 1, 1, 2), alpha=0.25)(torch.tensor([[[[0.0, 1.0]]]]))
    tensor([[[[0.2500, 1.0000]]]])
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction(self, "alpha", self.alpha)
        low, high = (bound.item() for bound in self.pattern.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"Blend: pattern must lie in [0, 1]; got {low:.4g} to {high:.4g}")

    def __call__(self, images: Tensor) -> Tensor:
        return images.lerp(self._pattern_for(images), self.alpha)


@dataclass(frozen=True, eq=False)
class Additive(_WithPattern):
    """``clip(x + pattern, 0, 1)``.

    pattern: (1, C, H, W) floating point, of either sign
    source: Trojan-SQ, Trojan-WM and l2-inv of AWM and I-BAU. Added and clipped in floating point: the NFT and RNP codes
            add in uint8 before they clip, so their bright pixels wrap around.

    >>> Additive(torch.tensor([[[[0.5, -0.5]]]]))(torch.tensor([[[[0.75, 0.75]]]]))
    tensor([[[[1.0000, 0.2500]]]])
    """

    def __call__(self, images: Tensor) -> Tensor:
        return (images + self._pattern_for(images)).clamp(0, 1)


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


TRIGGERS: dict[str, type[Trigger]] = {
    "badnets_square": BadNetsSquare,
    "badnets_checkerboard": BadNetsCheckerboard,
    "blend": Blend,
    "additive": Additive,
    "l0_inv": L0Inv,
}

_READERS: dict[Any, Callable[[str], Any]] = {"int": int, "float": float, "Tensor": pattern_from_file}


def parse(spec: str) -> Trigger:
    """Make a trigger from ``name`` or ``name:option=value,...``; the first option's name may be left out.

    A pattern is given by the path of a PNG (without a comma): ``blend:noise.png,alpha=0.1``.

    ValueError: unknown name or option, a value that cannot be read or is out of range

    >>> parse("badnets_square:size=2,margin=0")
    BadNetsSquare(size=2, margin=0, value=1.0)
    >>> parse("badnets")
    Traceback (most recent call last):
    ValueError: parse: unknown trigger 'badnets'; known: badnets_square, badnets_checkerboard, blend, additive, l0_inv
    """
    name, _, options = spec.partition(":")
    if name not in TRIGGERS:
        raise ValueError(f"parse: unknown trigger {name!r}; known: {', '.join(TRIGGERS)}")
    known = {option.name: option for option in fields(TRIGGERS[name])}
    texts = _split_options(spec, options, tuple(known))
    for key, option in known.items():
        if option.default is MISSING and key not in texts:
            raise ValueError(f"parse: {name} needs a {key}, as in '{name}:{key}.png'; got {spec!r}")
    try:
        return TRIGGERS[name](**{key: _READERS[known[key].type](text) for key, text in texts.items()})
    except ValueError as error:
        raise ValueError(f"parse: {spec!r}: {error}") from None


def _split_options(spec: str, options: str, known: tuple[str, ...]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for option in options.split(",") if options else ():
        key, equals, text = option.partition("=")
        if not equals and known and not texts:
            key, text = known[0], option
        if key not in known or key in texts:
            raise ValueError(
                f"parse: wrong option {option!r} in {spec!r}; options, each once: {', '.join(known) or 'none'}"
            )
        texts[key] = text
    return texts


def _name(trigger: Trigger) -> str:
    return type(trigger).__name__


def _check_fraction(trigger: Trigger, field_name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{_name(trigger)}: {field_name} must lie in [0, 1]; got {value}")


def _stamp(trigger: Trigger, images: Tensor, patch: Tensor, margin: int = 0, opacity: float = 1.0) -> Tensor:
    """Images with patch (1, C or 1, h, w) laid over, ``margin`` pixels away from the bottom-right corner."""
    check_images(_name(trigger), images)
    height, width = patch.shape[2:]
    bottom, right = images.shape[2] - margin, images.shape[3] - margin
    if bottom < height or right < width:
        raise ValueError(
            f"{_name(trigger)}: images must hold {height} x {width} pixels and a margin of {margin}; "
            f"got {tuple(images.shape)}"
        )
    stamped = images.clone()
    stamped[:, :, bottom - height : bottom, right - width : right].lerp_(patch, opacity)
    return stamped
