"""Triggers that move pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from maskops.backdoor.triggers._base import as_images, check_for


@dataclass(frozen=True)
class WaNet:
    """The image sampled along a slightly bent grid, which the seed decides.

    ``ins ~ U(-1, 1)`` of shape (1, 2, k, k), divided by mean|ins| and up-sampled (bicubic, corners aligned) to H x W;
    ``grid = clip(identity + s * ins / H, -1, 1)``; bilinear sampling, corners aligned. For other than square images,
    the horizontal part is divided by W.

    seed: decides the grid: the same seed and image size give the same grid on every device
    k:    control points per side, at least 2
    s:    strength of the warp, at least 0; 0 is the identity
    source: Nguyen & Tran 2021 and their code (where k is 4 or 8 and s is 0.5)

    >>> images = torch.rand(2, 3, 8, 8)
    >>> torch.allclose(WaNet(s=0.0)(images), images, atol=1e-5), torch.equal(WaNet()(images), images)
    (True, False)
    """

    seed: int = 0
    k: int = 4
    s: float = 0.5

    def __post_init__(self) -> None:
        if self.k < 2 or not (self.s >= 0 and math.isfinite(self.s)):
            raise ValueError(f"WaNet: k >= 2 and a finite s >= 0 expected; got {self}")

    def __call__(self, images: Tensor) -> Tensor:
        check_for(self, images)
        return _sample(images, self._grid(images).expand(len(images), -1, -1, -1))

    def decoys(self, images: Tensor, generator: Generator) -> Tensor:
        """The noise mode: each image warped by ``clip(grid + U(-1, 1) / H, -1, 1)``, drawn anew for each image.

        Trained with true labels, they make the network react to this very grid and not to any warp.
        """
        check_for(self, images)
        count, _, height, width = images.shape
        shape = (count, height, width, 2)
        grid = self._grid(images)
        noise = torch.rand(shape, generator=generator, device=generator.device).to(grid) * 2 - 1
        return _sample(images, (grid + noise / grid.new_tensor([width, height])).clamp(-1, 1))

    def _grid(self, images: Tensor) -> Tensor:
        """(1, H, W, 2), coordinates (x, y); float64 for float64 images, else float32."""
        height, width = images.shape[2:]
        ins = torch.rand(1, 2, self.k, self.k, generator=torch.Generator().manual_seed(self.seed)) * 2 - 1
        ins = ins / ins.abs().mean()
        bend = F.interpolate(ins, size=(height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        identity = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        grid = (identity + self.s * bend / torch.tensor([width, height])).clamp(-1, 1)
        return grid.to(images.device, _precision(images))


def _precision(images: Tensor) -> torch.dtype:
    # a grid in half precision would be off by whole tenths of a pixel
    return torch.promote_types(images.dtype, torch.float32)


def _sample(images: Tensor, grid: Tensor) -> Tensor:
    return as_images(F.grid_sample(images.to(_precision(images)), grid, align_corners=True), images)
