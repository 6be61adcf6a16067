"""Where a run keeps its clean images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from maskops.functional import prepare_images
from maskops.purify._fake import on_host


def count_held_out(count: int, share: float) -> int:
    """How many of at least two images are held out from what is learned from: the share, at least one and not all."""
    return min(max(1, round(share * count)), count - 1)


class CleanImages:
    """Images on a device: as bytes where they came from bytes, which takes a quarter of the memory, and channels_last.

    images: (N, C, H, W) float32 in [0, 1]
    dtype:  of what is read

    >>> images = CleanImages(torch.tensor([0.0, 0.2, 1.0]).view(3, 1, 1, 1), torch.float32, torch.device("cpu"))
    >>> images[1:].flatten(), images.stored.dtype
    (tensor([0.2000, 1.0000]), torch.uint8)
    """

    def __init__(self, images: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        with on_host():
            in_bytes = (255 * images).round_().to(torch.uint8)
            lossless = dtype == torch.float32 and torch.equal(in_bytes.float().div_(255), images)
            stored = in_bytes if lossless else images.to(dtype)
        self.stored = stored.to(device, memory_format=torch.channels_last)

    @property
    def shape(self) -> torch.Size:
        return self.stored.shape

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, which: slice) -> Tensor:
        return prepare_images(self.stored[which], dtype=self.dtype)

    def at(self, index: Tensor) -> Tensor:
        """The images (B, C, H, W) of an index (B,) on their device."""
        return prepare_images(self.stored, index, dtype=self.dtype)

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in batches of at most this size."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def keep(self, index: Tensor) -> None:
        """Hold only the images of this index."""
        self.stored = self.stored[index].contiguous(memory_format=torch.channels_last)
