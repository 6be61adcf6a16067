"""Crop, flip and hole, two images in one, and the worst perturbation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from maskops.augment._checks import check_at_least, check_images, check_labels


class Mixed(NamedTuple):
    """Images of two classes each: the loss is ``weight * CE(f(x), labels) + (1 - weight) * CE(f(x), other_labels)``.

    images:       (N, C, H, W) mixed images
    labels:       (N,) labels of the images that they were made from
    other_labels: (N,) labels of the images that were mixed in
    weight:       share of the former, in [0, 1], the same for the whole batch
    """

    images: Tensor
    labels: Tensor
    other_labels: Tensor
    weight: float | Tensor


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """A random window of its own size from each image with ``padding`` zeros on every side.

    images:  (N, C, H, W) floating point
    padding: pixels on each side, at least 0; 0 changes nothing. 4 is usual for 32 x 32
    returns: as images
    errors:  TypeError for dtypes, ValueError for shapes and a negative padding

    >>> images = torch.ones(2, 3, 8, 8)
    >>> random_crop(images, 2, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 8, 8])
    """
    check_images("random_crop", images, generator)
    check_at_least("random_crop", "padding", padding, 0)
    return crop_at(images, padding, draw_corners(len(images), padding, generator).to(images.device))


def draw_corners(count: int, padding: int, generator: Generator) -> Tensor:
    """The upper left corners (2, count, 1) of windows in padded images."""
    return torch.randint(2 * padding + 1, (2, count, 1), generator=generator)


def crop_at(images: Tensor, padding: int, corners: Tensor) -> Tensor:
    """The window of each padded image at its corner."""
    count, _, height, width = images.shape
    rows = corners[0] + torch.arange(height, device=images.device)
    columns = corners[1] + torch.arange(width, device=images.device)
    padded = F.pad(images.detach(), (padding,) * 4)
    index = torch.arange(count, device=images.device)[:, None, None]
    windows = padded[index, :, rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return torch.empty_like(images).copy_(windows.permute(0, 3, 1, 2))


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Each image mirrored left to right with probability 1/2.

    images:  (N, C, H, W) floating point
    returns: as images
    errors:  TypeError for dtypes, ValueError for shapes

    >>> images = torch.tensor([0.0, 1.0]).expand(3, 1, 1, 2)
    >>> random_flip(images, torch.Generator().manual_seed(0))[:, 0, 0].tolist()
    [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    """
    check_images("random_flip", images, generator)
    return flip_where(images, draw_mirrored(len(images), generator).to(images.device))


def draw_mirrored(count: int, generator: Generator) -> Tensor:
    """Which of so many images are mirrored, (count,) bool."""
    return torch.rand(count, generator=generator) < 0.5


def flip_where(images: Tensor, mirrored: Tensor) -> Tensor:
    """The images, mirrored left to right where it says so."""
    images = images.detach()
    return torch.empty_like(images).copy_(torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images))


def cutout(images: Tensor, generator: Generator, length: int | None = None) -> Tensor:
    """One square hole of zeros in each image, its centre anywhere in it, so that it may reach over the border.

    images:  (N, C, H, W) floating point
    length:  side of the square in pixels, at least 0; None: half the height
    returns: as images
    errors:  TypeError for dtypes, ValueError for shapes and a negative length
    source:  DeVries & Taylor 2017 (16 pixels for CIFAR-10); their code makes holes of even length only

    >>> holes = cutout(torch.ones(4, 1, 8, 8), torch.Generator().manual_seed(0), length=2)
    >>> [int(hole.sum()) for hole in 1 - holes]
    [4, 4, 4, 2]
    """
    check_images("cutout", images, generator)
    height, width = images.shape[2:]
    length = height // 2 if length is None else length
    check_at_least("cutout", "length", length, 0)
    top = torch.randint(height, (len(images), 1), generator=generator).to(images.device) - length // 2
    left = torch.randint(width, (len(images), 1), generator=generator).to(images.device) - length // 2
    rows = torch.arange(height, device=images.device) - top
    columns = torch.arange(width, device=images.device) - left
    in_rows, in_columns = ((offset >= 0) & (offset < length) for offset in (rows, columns))
    hole = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return images.detach().clone().masked_fill_(hole, 0)


def mixup(images: Tensor, labels: Tensor, generator: Generator, alpha: float = 1.0) -> Mixed:
    """Each image blended with another of the batch: ``λ x + (1 - λ) x'`` with one λ ~ Beta(alpha, alpha) per batch.

    images:  (N, C, H, W) floating point
    labels:  (N,) integer
    alpha:   at least 0; 0 means λ = 1, the images as they are
    returns: Mixed, its weight λ
    errors:  TypeError for dtypes, ValueError for shapes and a negative alpha
    source:  Zhang et al. 2018, and their code's one λ and one permutation per batch

    >>> images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    >>> mixed = mixup(images, labels, torch.Generator().manual_seed(0))
    >>> mixed.images.shape, sorted(mixed.other_labels.tolist()), 0 <= mixed.weight <= 1
    (torch.Size([4, 3, 8, 8]), [0, 1, 2, 3], True)
    """
    check_images("mixup", images, generator)
    check_labels("mixup", images, labels)
    weight, partners = draw_mixup(len(images), generator, alpha)
    return Mixed(blend(images, partners.to(images.device), weight), labels, labels[partners.to(labels.device)], weight)


def draw_mixup(count: int, generator: Generator, alpha: float) -> tuple[float, Tensor]:
    """λ, and with which image each of so many is mixed, (count,)."""
    return _beta("mixup", alpha, generator), torch.randperm(count, generator=generator)


def blend(images: Tensor, partners: Tensor, weight: float | Tensor) -> Tensor:
    """``weight * x + (1 - weight) * x'``, x' being the partner of x."""
    images = images.detach()
    return torch.empty_like(images).copy_(torch.lerp(images[partners], images, weight).clamp(0, 1))


def cutmix(images: Tensor, labels: Tensor, generator: Generator, alpha: float = 1.0, probability: float = 1.0) -> Mixed:
    """A box of each image replaced by that of another: one box per batch, of share ``1 - λ``, λ ~ Beta(alpha, alpha).

    The box's centre is uniform over the image and what reaches over the border is cut off.

    images:      (N, C, H, W) floating point
    labels:      (N,) integer
    alpha:       at least 0; 0 means λ = 1, the images as they are
    probability: that this batch is mixed; otherwise it comes back as it is with weight 1. The published code takes 0.5
                 on CIFAR and 1 on ImageNet
    returns:     Mixed, its weight the exact share of pixels kept
    errors:      TypeError for dtypes, ValueError for shapes, a negative alpha and a probability outside [0, 1]
    source:      Yun et al. 2019, and their code

    >>> images, labels = torch.zeros(2, 1, 8, 8), torch.arange(2)
    >>> images[1] = 1
    >>> mixed = cutmix(images, labels, torch.Generator().manual_seed(0))
    >>> mixed.other_labels, mixed.weight, mixed.images.mean((1, 2, 3))
    (tensor([1, 0]), 0.875, tensor([0.1250, 0.8750]))
    """
    check_images("cutmix", images, generator)
    check_labels("cutmix", images, labels)
    if not 0 <= probability <= 1:
        raise ValueError(f"cutmix: probability must be in [0, 1]; got {probability}")
    weight, partners, box = draw_cutmix(images.shape, generator, alpha)
    if torch.rand((), generator=generator) >= probability:
        return Mixed(images.detach().clone(), labels, labels, 1.0)
    mixed = paste(images, partners.to(images.device), box.to(images.device))
    return Mixed(mixed, labels, labels[partners.to(labels.device)], weight)


def draw_cutmix(shape: Sequence[int], generator: Generator, alpha: float) -> tuple[float, Tensor, Tensor]:
    """The share of pixels that images (N, C, H, W) keep, the partner of each, and the box: top, bottom, left, right."""
    weight = _beta("cutmix", alpha, generator)
    partners = torch.randperm(shape[0], generator=generator)
    (top, bottom), (left, right) = (_cut(size, weight, generator) for size in shape[2:])
    weight = 1 - (bottom - top) * (right - left) / (shape[2] * shape[3])
    return weight, partners, torch.tensor([top, bottom, left, right])


def paste(images: Tensor, partners: Tensor, box: Tensor) -> Tensor:
    """The images, each with its partner's pixels in the box."""
    images = images.detach()
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
    inside = ((rows >= box[0]) & (rows < box[1])).unsqueeze(1) & (columns >= box[2]) & (columns < box[3])
    return torch.empty_like(images).copy_(torch.where(inside, images[partners], images))


def adversarial(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    generator: Generator,
    epsilon: float = 1 / 255,
    steps: int = 2,
    step_size: float | None = None,
) -> Tensor:
    """Projected gradient ascent on the cross entropy in the L∞ ball, from a random start in it.

    ``x' <- clip(x' + step_size * sign(∇ CE(model(x'), labels)))`` to ``[x - epsilon, x + epsilon]`` and ``[0, 1]``.
    The model's mode and the gradients of its parameters stay as they are; in training mode its batch norm statistics
    see the perturbed images.

    model:     images to logits (N, K)
    images:    (N, C, H, W) floating point in [0, 1]
    labels:    (N,) integer, on the device of the logits
    epsilon:   radius in units of the pixel range, at least 0. The default is NFT's "perturbation norm of 1", read as
               1/255; clean-label poisoning takes 16/255
    steps:     gradient steps, at least 0
    step_size: at least 0; None: 2.5 * epsilon / steps, as Madry et al. choose it
    returns:   as images
    errors:    TypeError for dtypes, ValueError for shapes and negative numbers
    source:    Madry et al. 2018, eq. 2

    >>> images, labels = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1])
    >>> model = lambda images: torch.stack((images.sum((1, 2, 3)), -images.sum((1, 2, 3))), dim=1)
    >>> adversarial(model, images, labels, torch.Generator().manual_seed(0), epsilon=0.25).mean((1, 2, 3))
    tensor([0.2500, 0.7500])
    """
    check_images("adversarial", images, generator)
    check_labels("adversarial", images, labels)
    check_at_least("adversarial", "epsilon", epsilon, 0)
    check_at_least("adversarial", "steps", steps, 0)
    step_size = 2.5 * epsilon / max(steps, 1) if step_size is None else step_size
    check_at_least("adversarial", "step_size", step_size, 0)
    images = images.detach()
    low, high = (images - epsilon).clamp_(min=0), (images + epsilon).clamp_(max=1)
    start = torch.rand(images.shape, generator=generator).to(images) * (2 * epsilon) - epsilon
    perturbed = torch.clamp(images + start, low, high)
    for _ in range(steps):
        with torch.enable_grad():
            perturbed.requires_grad_()
            loss = F.cross_entropy(model(perturbed), labels, reduction="sum")
            (ascent,) = torch.autograd.grad(loss, perturbed)
        perturbed = torch.clamp(perturbed.detach() + step_size * ascent.sign(), low, high)
    return torch.empty_like(images).copy_(perturbed)


def numpy_generator(generator: Generator) -> np.random.Generator:
    """NumPy's generator, seeded by the next number of torch's, which has no public Beta and Dirichlet of its own."""
    return np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))


def _beta(name: str, alpha: float, generator: Generator) -> float:
    """λ ~ Beta(alpha, alpha), and 1 for an alpha of 0."""
    check_at_least(name, "alpha", alpha, 0)
    drawn = numpy_generator(generator)
    return float(drawn.beta(alpha, alpha)) if alpha > 0 else 1.0


def _cut(size: int, weight: float, generator: Generator) -> tuple[int, int]:
    """From where to where one side of a box reaches that covers ``1 - weight`` of a square image."""
    half = int(size * (1 - weight) ** 0.5) // 2
    centre = int(torch.randint(size, (), generator=generator))
    return max(centre - half, 0), min(centre + half, size)
