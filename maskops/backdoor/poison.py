"""Poisoning of a training set: which images, and which labels they get."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskops.backdoor._checks import check_labelled
from maskops.backdoor.triggers import Trigger

RULES = ("all_to_one", "all_to_all")


class Poisoned(NamedTuple):
    """What ``poison`` returns; unpacks as (images, labels, indices)."""

    images: Tensor
    labels: Tensor
    indices: Tensor


def target_labels(
    labels: Tensor, target: int | None = None, rule: str = "all_to_one", num_classes: int | None = None
) -> Tensor:
    """The label t(y) that the attacker wants for each true label y.

    labels: (N,) integers
    rule:   "all_to_one": t(y) = target; "all_to_all": t(y) = (y + 1) mod num_classes, without a target
    returns (N,) int64
    ValueError: rule, target and num_classes that do not go together, a label that is not below num_classes

    >>> target_labels(torch.tensor([0, 1, 2]), 1)
    tensor([1, 1, 1])
    >>> target_labels(torch.tensor([0, 1, 2]), rule="all_to_all", num_classes=3)
    tensor([1, 2, 0])
    """
    if rule not in RULES:
        raise ValueError(f"target_labels: rule must be one of {', '.join(RULES)}; got {rule!r}")
    if num_classes is not None and labels.numel() and int(labels.max()) >= num_classes:
        raise ValueError(f"target_labels: labels must be below num_classes {num_classes}; got {int(labels.max())}")
    if rule == "all_to_all":
        if num_classes is None or num_classes < 2 or target is not None:
            raise ValueError(
                f"target_labels: all_to_all needs num_classes >= 2 and no target; got {num_classes=} and {target=}"
            )
        return (labels.long() + 1) % num_classes
    if target is None or target < 0 or (num_classes is not None and target >= num_classes):
        classes = "" if num_classes is None else f" below {num_classes}"
        raise ValueError(f"target_labels: all_to_one needs a target class{classes}; got {target}")
    return torch.full_like(labels, target, dtype=torch.int64)


def poison(
    images: Tensor,
    labels: Tensor,
    trigger: Trigger,
    target: int | None,
    rate: float,
    generator: torch.Generator,
    *,
    rule: str = "all_to_one",
    num_classes: int | None = None,
) -> Poisoned:
    """A copy of a training set in which ``round(rate * N)`` images carry the trigger and the label t(y).

    The count is a fraction of all N images, as in BackdoorBench; they are drawn without replacement from the images
    whose label the attack changes (y != t(y): the other classes' in all_to_one, every image in all_to_all), as in AWM
    and ANP. So ``rate`` is the share of the training set that is effectively poisoned, whatever the balance of classes.
    Published codes differ: AWM and ANP take the fraction of the non-target images, BackdoorBench draws from all.

    images:    (N, C, H, W) floating point in [0, 1]; not modified
    labels:    (N,) integers; not modified
    rate:      in [0, 1]
    generator: decides the draw; one on the CPU draws the same wherever the images are
    returns Poisoned(images, labels int64, indices (round(rate * N),) int64 in ascending order)
    TypeError: uint8 images; ValueError: values outside [0, 1], more images asked for than can be drawn

    >>> images, labels = torch.zeros(10, 1, 4, 4), torch.arange(10) % 5
    >>> poisoned = poison(images, labels, lambda x: x + 1, 0, 0.3, torch.Generator().manual_seed(0))
    >>> int(poisoned.images.amax((1, 2, 3)).sum()), bool((poisoned.labels[poisoned.indices] == 0).all())
    (3, True)
    """
    check_labelled("poison", images, labels)
    if not 0 <= rate <= 1:
        raise ValueError(f"poison: rate must lie in [0, 1]; got {rate}")
    targets = target_labels(labels, target, rule, num_classes)
    candidates = (labels != targets).nonzero().flatten()
    count = round(rate * len(labels))
    if count > len(candidates):
        raise ValueError(
            f"poison: rate {rate} asks for {count} images; only {len(candidates)} are not of class {target}"
        )
    draw = torch.randperm(len(candidates), generator=generator, device=generator.device)[:count]
    indices = candidates[draw.to(candidates.device)].sort().values
    images, labels = images.clone(), labels.long().clone()
    rows = indices.to(images.device)
    images[rows] = trigger(images[rows])
    labels[indices] = targets[indices]
    return Poisoned(images, labels, indices)
