from __future__ import annotations

from torch import Tensor


def check_images(name: str, images: Tensor) -> None:
    """Raise in one line unless images are floating point of shape (N, C, H, W)."""
    if not images.is_floating_point():
        raise TypeError(f"{name}: images must be floating point in [0, 1]; got {images.dtype} (uint8: divide by 255)")
    if images.dim() != 4:
        raise ValueError(f"{name}: images must be (N, C, H, W); got {tuple(images.shape)}")


def check_labelled(name: str, images: Tensor, labels: Tensor) -> None:
    """Raise in one line unless images are (N, C, H, W) in [0, 1] and labels (N,) non-negative integers."""
    check_images(name, images)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name}: labels must be integers; got {labels.dtype}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name}: labels must be (N,) for images (N, C, H, W); got {tuple(labels.shape)} and {tuple(images.shape)}"
        )
    if labels.numel() and int(labels.min()) < 0:
        raise ValueError(f"{name}: labels must not be negative; got {int(labels.min())}")
    if images.numel():
        low, high = (bound.item() for bound in images.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"{name}: images must lie in [0, 1], not normalised; got {low:.4g} to {high:.4g}")
