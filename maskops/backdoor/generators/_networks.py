"""The small networks that generators are made of. Their sizes are ours; the papers' are larger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import pairwise

import torch
from torch import Tensor, nn

from maskops._state import seeded_layers
from maskops.backdoor._checks import check_images


class LearnedTrigger(nn.Module):
    """A trigger whose networks are learned: a :class:`~maskops.backdoor.Trigger` once it is frozen.

    Called with images it computes without gradients, in float32 and in eval mode, whatever the ambient modes; its
    networks move to the images' device. ``state_dict`` and ``load_state_dict`` keep it.
    """

    def triggered(self, images: Tensor) -> Tensor:
        """Images with the trigger, differentiable; what a subclass defines."""
        raise NotImplementedError

    def freeze(self) -> LearnedTrigger:
        """Eval mode, without gradients."""
        return self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        check_images(type(self).__name__, images)
        if next(self.parameters()).device != images.device:
            self.to(images.device)
        self.eval()
        with torch.autocast(images.device.type, enabled=False):
            return self.triggered(images.float()).to(images.dtype).clamp(0, 1)


def autoencoder(inputs: int, outputs: int, image_size: tuple[int, int], width: int = 16) -> nn.Sequential:
    """Convolutions down to about 4 x 4 pixels and up again: (N, inputs, H, W) to (N, outputs, H, W), unbounded.

    width: channels at full resolution, doubled with each halving up to four times

    >>> autoencoder(1, 2, (8, 8))(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 2, 8, 8])
    """
    sizes = [image_size]
    while min(sizes[-1]) >= 8:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    widths = [width * min(2**level, 4) for level in range(len(sizes))]
    layers: list[nn.Module] = [*_block(inputs, width)]
    for before, after in pairwise(widths):
        layers += [nn.MaxPool2d(2), *_block(before, after)]
    for level in reversed(range(len(sizes) - 1)):
        layers += [
            nn.Upsample(sizes[level], mode="bilinear", align_corners=False),
            *_block(widths[level + 1], widths[level]),
        ]
    return nn.Sequential(*layers, nn.Conv2d(width, outputs, 3, padding=1))


def bit_reader(inputs: int, bits: int, width: int = 16) -> nn.Sequential:
    """Convolutions and a linear layer over their mean and largest values: (N, inputs, H, W) to (N, bits) logits."""
    return nn.Sequential(
        *_block(inputs, 2 * width),
        *_block(2 * width, 4 * width),
        nn.MaxPool2d(2),
        *_block(4 * width, 4 * width),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(4 * width * 16, bits),
    )


def seeded(generator: torch.Generator) -> AbstractContextManager[None]:
    """Layers made inside are initialised from a generator, on the CPU; torch's own generator stays as it is."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return seeded_layers(seed, torch.device("cpu"))


def random_batches(images: Tensor, steps: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of images, with replacement; drawn at once, so that no step waits for its draw."""
    rows = torch.randint(len(images), (steps, batch_size), generator=generator, device=generator.device)
    for batch in rows.to(images.device):
        yield images[batch]


def _block(before: int, width: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
