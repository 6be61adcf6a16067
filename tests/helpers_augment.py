"""What the tests of the augmentations share: images, labels and a model for the adversary."""

from __future__ import annotations

import torch
from helpers import seeded
from torch import nn

LABELS = torch.arange(6)


def random_images(shape=(6, 3, 12, 10), seed=0, dtype=torch.float32):
    """Random images of 8-bit levels whose contrast and brightness differ."""
    images = torch.rand(shape, generator=seeded(seed))
    low, high = torch.rand(2, shape[0], 1, 1, 1, generator=seeded(seed + 1)).sort(0).values
    return ((low + (high - low) * images) * 255).round().div(255).to(dtype)


class Mean(nn.Module):
    """Logits that are linear in the mean of each channel."""

    def __init__(self, channels=3):
        super().__init__()
        self.linear = nn.Linear(channels, 6)

    def forward(self, images):
        return self.linear(images.mean((2, 3)).float())
