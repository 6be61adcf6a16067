"""RandAugment and AugMix: random chains of operations, each on the part of the batch that drew it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from maskops.augment import operations as op
from maskops.augment._checks import check_at_least, check_grey_or_rgb, check_images
from maskops.augment.basic import numpy_generator

Operation: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images, level in [0, 1] and sign, both (N,)) to images."""

RANDAUGMENT: dict[str, Operation] = {
    "identity": lambda images, level, sign: images,
    "autocontrast": lambda images, level, sign: op.autocontrast(images),
    "equalize": lambda images, level, sign: op.equalize(images),
    "rotate": lambda images, level, sign: op.rotate(images, 30 * level * sign),
    "solarize": lambda images, level, sign: op.solarize(images, 256 * level),
    "color": lambda images, level, sign: op.color(images, 0.1 + 1.8 * level),
    "posterize": lambda images, level, sign: op.posterize(images, (4 * level).floor()),
    "contrast": lambda images, level, sign: op.contrast(images, 0.1 + 1.8 * level),
    "brightness": lambda images, level, sign: op.brightness(images, 0.1 + 1.8 * level),
    "sharpness": lambda images, level, sign: op.sharpness(images, 0.1 + 1.8 * level),
    "shear-x": lambda images, level, sign: op.shear_x(images, 0.3 * level * sign),
    "shear-y": lambda images, level, sign: op.shear_y(images, 0.3 * level * sign),
    "translate-x": lambda images, level, sign: op.translate_x(images, 0.33 * images.shape[3] * level * sign),
    "translate-y": lambda images, level, sign: op.translate_y(images, 0.33 * images.shape[2] * level * sign),
}

AUGMIX: dict[str, Operation] = {
    "identity": lambda images, level, sign: images,
    "autocontrast": lambda images, level, sign: op.autocontrast(images),
    "equalize": lambda images, level, sign: op.equalize(images),
    "posterize": lambda images, level, sign: op.posterize(images, 4 - (4 * level).floor()),
    "rotate": lambda images, level, sign: op.rotate(images, (30 * level).floor() * sign, "bilinear"),
    "solarize": lambda images, level, sign: op.solarize(images, 256 - (256 * level).floor()),
    "shear-x": lambda images, level, sign: op.shear_x(images, 0.3 * level * sign, "bilinear"),
    "shear-y": lambda images, level, sign: op.shear_y(images, 0.3 * level * sign, "bilinear"),
    "translate-x": lambda images, level, sign: op.translate_x(
        images, (images.shape[3] / 3 * level).floor() * sign, "bilinear"
    ),
    "translate-y": lambda images, level, sign: op.translate_y(
        images, (images.shape[2] / 3 * level).floor() * sign, "bilinear"
    ),
}


def randaugment(images: Tensor, generator: Generator, count: int = 4, magnitude: float = 10) -> Tensor:
    """``count`` operations on each image, drawn with replacement from the paper's 14, all at one magnitude.

    From magnitude 0 to 30: rotate 0 to 30 degrees, shear 0 to 0.3, translate 0 to 0.33 of the side (these five with a
    random sign, nearest neighbour, zeros outside); color, contrast, brightness and sharpness factor 0.1 to 1.9, 1 being
    no change; posterize to 0 to 4 bits, rounded down; solarize from level 0 to 256; identity, autocontrast and equalize
    have no magnitude. As in the code below, a small magnitude posterizes and solarizes most.

    images:    (N, C, H, W) floating point in [0, 1], C of 1 or 3, H and W of at least 4; half precision is computed in
               float32
    count:     at least 0. The default is NFT's, with its magnitude
    magnitude: 0 to 30
    returns:   as images
    errors:    TypeError for dtypes, ValueError for shapes and ranges
    source:    Cubuk et al. 2020, and the ranges of github.com/ildoonet/pytorch-randaugment. Its list has no identity,
               but invert, solarize-add and cutout besides; and it translates by up to 100 pixels, meant for ImageNet,
               which leaves nothing of a 32 x 32 image at magnitude 10: here it is a share of the side

    >>> images = torch.rand(4, 3, 32, 32)
    >>> randaugment(images, torch.Generator().manual_seed(0)).shape
    torch.Size([4, 3, 32, 32])
    """
    check_images("randaugment", images, generator)
    check_grey_or_rgb("randaugment", images)
    check_at_least("randaugment", "count", count, 0)
    if not 0 <= magnitude <= 30:
        raise ValueError(f"randaugment: magnitude must be in [0, 30]; got {magnitude}")
    shape = (len(images), count)
    choices = torch.randint(len(RANDAUGMENT), shape, generator=generator)
    levels, signs = torch.full(shape, magnitude / 30), _signs(shape, generator)
    result = _run(_float(images), tuple(RANDAUGMENT.values()), choices, levels, signs)
    return torch.empty_like(images).copy_(result)


def augmix(
    images: Tensor, generator: Generator, severity: float = 5, width: int = 3, depth: int = -1, alpha: float = 1.0
) -> Tensor:
    """``(1 - m) x + m Σ w_i chain_i(x)``, m ~ Beta(alpha, alpha) and w ~ Dirichlet(alpha) of each image.

    A chain is ``depth`` operations drawn with replacement from the nine that don't overlap the corruption benchmark,
    each with its own level l, uniform from 0.1 to severity. Rotate 3 l degrees, shear 0.03 l, translate l / 30 of the
    side (these five with a random sign, bilinear, zeros outside); posterize to 4 - 0.4 l bits; solarize from level
    256 - 25.6 l; degrees, pixels, 0.4 l and 25.6 l are rounded down; autocontrast and equalize have no level. This is
    the augmentation alone: the paper's Jensen-Shannon loss isn't part of it.

    images:   (N, C, H, W) floating point in [0, 1], C of 1 or 3, H and W of at least 4; half precision is computed in
              float32
    severity: 1 to 10. The default is NFT's; the published code's is 3
    width:    number of chains, at least 1; memory grows with it
    depth:    operations in a chain, at least 1; -1: 1 to 3 at random, for each chain of each image
    alpha:    above 0
    returns:  as images
    errors:   TypeError for dtypes, ValueError for shapes and ranges
    source:   Hendrycks et al. 2020, Algorithm 1, and their code, which rounds to 8 bits after each operation

    >>> images = torch.rand(4, 3, 32, 32)
    >>> augmix(images, torch.Generator().manual_seed(0)).shape
    torch.Size([4, 3, 32, 32])
    """
    check_images("augmix", images, generator)
    check_grey_or_rgb("augmix", images)
    check_at_least("augmix", "width", width, 1)
    if not 1 <= severity <= 10:
        raise ValueError(f"augmix: severity must be in [1, 10]; got {severity}")
    if depth != -1 and depth < 1:
        raise ValueError(f"augmix: depth must be at least 1, or -1 for 1 to 3 at random; got {depth}")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"augmix: alpha must be finite and above 0; got {alpha}")
    count = len(images)
    shape = (width * count, 3 if depth == -1 else depth)
    choices = torch.randint(1, len(AUGMIX), shape, generator=generator)
    if depth == -1:
        ends = torch.randint(1, 4, (len(choices), 1), generator=generator)
        choices = choices.where(torch.arange(3) < ends, 0)
    levels = (0.1 + (severity - 0.1) * torch.rand(shape, generator=generator)) / 10
    signs = _signs(shape, generator)
    drawn = numpy_generator(generator)
    weights = torch.from_numpy(drawn.dirichlet([alpha] * width, count)).T.reshape(width, count, 1, 1, 1)
    mixing = torch.from_numpy(drawn.beta(alpha, alpha, count)).view(count, 1, 1, 1)

    clean = _float(images)
    chains = _run(clean.repeat(width, 1, 1, 1), tuple(AUGMIX.values()), choices, levels, signs)
    mixture = (chains.view(width, *images.shape) * weights.to(chains)).sum(0)
    return torch.empty_like(images).copy_(torch.lerp(clean, mixture, mixing.to(clean)).clamp_(0, 1))


def _float(images: Tensor) -> Tensor:
    images = images.detach()
    return images if images.dtype == torch.float64 else images.float()


def _signs(shape: tuple[int, int], generator: Generator) -> Tensor:
    return 2.0 * torch.randint(2, shape, generator=generator) - 1


def _run(images: Tensor, operations: Sequence[Operation], choices: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """A copy of the images after one operation per column of choices; the first operation is the identity.

    choices, levels, signs: (N, steps), on the CPU
    """
    result = images.clone(memory_format=torch.contiguous_format)
    levels, signs = levels.to(images), signs.to(images)
    for step, chosen in enumerate(choices.unbind(1)):
        # images that drew the same operation side by side: one transfer
        counts = chosen.bincount(minlength=len(operations)).tolist()
        groups = chosen.argsort(stable=True).to(images.device).split(counts)
        for operation, group in zip(operations[1:], groups[1:], strict=True):
            if len(group):
                result[group] = operation(result[group], levels[group, step], signs[group, step])
    return result
