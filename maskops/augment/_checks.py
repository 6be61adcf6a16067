from __future__ import annotations

import math

from torch import Generator, Tensor


def check_images(name: str, images: Tensor, generator: Generator) -> None:
    """Raise in one line unless images are floating point (N, C, H, W) and the generator is on the CPU."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name}: images must be a tensor; got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"{name}: images must be floating point in [0, 1]; got {images.dtype} (uint8: divide by 255)")
    if images.dim() != 4:
        raise ValueError(f"{name}: images must be (N, C, H, W); got {tuple(images.shape)}")
    if not isinstance(generator, Generator):
        raise TypeError(f"{name}: generator must be a torch.Generator; got {type(generator).__name__}")
    if generator.device.type != "cpu":
        raise ValueError(f"{name}: generator must be on the CPU; got one on {generator.device}")


def check_grey_or_rgb(name: str, images: Tensor) -> None:
    """Raise in one line unless images (N, C, H, W) have 1 or 3 channels and sides of at least 4 pixels."""
    if images.shape[1] not in (1, 3) or min(images.shape[2:]) < 4:
        raise ValueError(f"{name}: images must be (N, 1 or 3, H >= 4, W >= 4); got {tuple(images.shape)}")


def check_labels(name: str, images: Tensor, labels: Tensor) -> None:
    """Raise in one line unless labels are integers (N,), one for each image."""
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name}: labels must be integers; got {labels.dtype}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name}: labels must be (N,) for images (N, C, H, W); got {tuple(labels.shape)} and {tuple(images.shape)}"
        )


def check_at_least(name: str, argument: str, value: float, low: float) -> None:
    """Raise in one line unless a number is finite and at least low."""
    if not (math.isfinite(value) and value >= low):
        raise ValueError(f"{name}: {argument} must be finite and at least {low}; got {value}")
