"""Poisoning of a training set: which images, and which labels they get. How they are counted: see ``poison``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from maskops._state import eval_mode
from maskops.augment import adversarial
from maskops.backdoor._checks import check_labelled
from maskops.backdoor._model import device_of
from maskops.backdoor.triggers import DecoyTrigger, Several, Trigger

_PIECE = 1024  # images that a trigger gets at a time: a learned one computes with maps of each
RULES = ("all_to_one", "all_to_all")


@dataclass(frozen=True, eq=False)
class Poisoned:
    """A poisoned training set; unpacks as (images, labels, indices).

    images:  (N, C, H, W)
    labels:  (N,) int64
    indices: (P,) int64, ascending: which images carry the trigger
    decoys:  (D,) int64, ascending: which images are decoys, with their true label; none of them is in indices
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    decoys: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.images, self.labels, self.indices))


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
    generator: Generator,
    *,
    rule: str = "all_to_one",
    num_classes: int | None = None,
    decoy_rate: float = 0.0,
) -> Poisoned:
    """A copy of a training set in which ``round(rate * N)`` images carry the trigger and the label t(y).

    The count is a fraction of all N images, as in BackdoorBench; they are drawn without replacement from the images
    whose label the attack changes (y != t(y): the other classes' in all_to_one, every image in all_to_all), as in AWM
    and ANP. So ``rate`` is the share of the training set that is effectively poisoned, whatever the balance of classes.
    Published codes differ: AWM, ANP and I-BAU take the fraction of the non-target images; NFT, BackdoorBench and
    BackdoorBox draw from all, those of the target class too; TrojanZoo adds to each batch.
    Decoys are a fraction of all N too. ``poison_clean_label`` alone counts in images of the target class.

    images:     (N, C, H, W) floating point in [0, 1]; not modified
    labels:     (N,) integers; not modified
    trigger:    a ``Several`` divides the drawn images among its triggers
    rate:       in [0, 1]
    generator:  decides the draw; one on the CPU draws the same wherever the images are
    rule, num_classes: see ``target_labels``
    decoy_rate: in [0, 1]: further ``round(decoy_rate * N)`` images, drawn from all others (the target class too),
                become the trigger's decoys and keep their label; published: twice the rate for WaNet, 0.1 for BPPA
    returns Poisoned(images, labels int64, indices (round(rate * N),), decoys (round(decoy_rate * N),))
    TypeError: uint8 images, decoys of a trigger that has none
    ValueError: values outside [0, 1], more images asked for than can be drawn

    >>> images, labels = torch.zeros(10, 1, 4, 4), torch.arange(10) % 5
    >>> poisoned = poison(images, labels, lambda x: x + 1, 0, 0.3, torch.Generator().manual_seed(0))
    >>> int(poisoned.images.amax((1, 2, 3)).sum()), bool((poisoned.labels[poisoned.indices] == 0).all())
    (3, True)
    """
    check_labelled("poison", images, labels)
    _check_rate("poison", "rate", rate)
    _check_rate("poison", "decoy_rate", decoy_rate)
    targets = target_labels(labels, target, rule, num_classes)
    candidates = (labels != targets).nonzero().flatten()
    count = round(rate * len(labels))
    if count > len(candidates):
        raise ValueError(
            f"poison: rate {rate} asks for {count} images; only {len(candidates)} are not of class {target}"
        )
    indices = _draw(candidates, count, generator)
    decoys = _draw_decoys(trigger, len(labels), indices, decoy_rate, generator)
    poisoned, labels = images.clone(), labels.long().clone()
    rows = indices.to(images.device)
    poisoned[rows] = _triggered(trigger, images[rows], generator)
    if len(decoys):
        rows = decoys.to(images.device)
        poisoned[rows] = trigger.decoys(images[rows], generator)
    labels[indices] = targets[indices]
    return Poisoned(poisoned, labels, indices, decoys)


def poison_clean_label(
    images: Tensor,
    labels: Tensor,
    trigger: Trigger,
    target: int,
    rate: float,
    generator: Generator,
    model: nn.Module | None = None,
    epsilon: float = 16 / 255,
    *,
    steps: int = 100,
    step_size: float = 1.5 / 255,
    batch_size: int = 256,
) -> Poisoned:
    """A copy of a training set in which a share of the target class carries the trigger; no label changes.

    With a model, the drawn images are first made hard by an untargeted l_inf PGD against their own label, so that the
    trigger is the easiest thing to learn (CLB, with ``FourCorners``); without one they get the trigger alone (SIG).
    Test images get the trigger alone in either case, and are those of the other classes.

    images:     (N, C, H, W) floating point in [0, 1]; not modified
    labels:     (N,) integers; not modified
    trigger:    a ``Several`` divides the drawn images among its triggers
    rate:       in [0, 1]: ``round(rate * n)`` of the n images of the target class (0.8 in ANP and NFT)
    generator:  decides the draw and PGD's start; on the CPU
    model:      maps images in [0, 1] to logits, trained on clean data; it runs in eval mode, where its parameters are
    epsilon, steps, step_size: PGD; epsilon 16/255 as in ANP and NFT, steps as in BackdoorBox (whose epsilon is 8/255)
    returns Poisoned(images, labels int64, indices)
    source: Turner et al. 2019 (CLB), Barni et al. 2019 (SIG)

    >>> images, labels = torch.zeros(10, 1, 4, 4), torch.arange(10) % 2
    >>> poisoned = poison_clean_label(images, labels, lambda x: x + 1, 1, 0.8, torch.Generator().manual_seed(0))
    >>> len(poisoned.indices), torch.equal(poisoned.labels, labels), labels[poisoned.indices].tolist()
    (4, True, [1, 1, 1, 1])
    """
    check_labelled("poison_clean_label", images, labels)
    _check_rate("poison_clean_label", "rate", rate)
    if batch_size < 1:
        raise ValueError(f"poison_clean_label: batch_size must be at least 1; got {batch_size}")
    candidates = (labels == target).nonzero().flatten()
    if len(candidates) == 0:
        raise ValueError(f"poison_clean_label: images of the target class expected; got none of class {target}")
    indices = _draw(candidates, round(rate * len(candidates)), generator)
    rows = indices.to(images.device)
    chosen = images[rows]
    if model is not None:
        device, truths = device_of(model, images), labels[indices].long()
        with eval_mode(model), torch.enable_grad():
            hard = [
                adversarial(model, batch.to(device), truth.to(device), generator, epsilon, steps, step_size)
                for batch, truth in zip(chosen.split(batch_size), truths.split(batch_size), strict=True)
            ]
        chosen = torch.cat(hard).to(images)
    poisoned = images.clone()
    poisoned[rows] = _triggered(trigger, chosen, generator)
    return Poisoned(poisoned, labels.long().clone(), indices)


def _check_rate(function: str, name: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{function}: {name} must lie in [0, 1]; got {rate}")


def _draw(candidates: Tensor, count: int, generator: Generator) -> Tensor:
    draw = torch.randperm(len(candidates), generator=generator, device=generator.device)[:count]
    return candidates[draw.to(candidates.device)].sort().values


def _draw_decoys(trigger: Trigger, total: int, indices: Tensor, rate: float, generator: Generator) -> Tensor:
    count = round(rate * total)
    if count == 0:
        return indices.new_empty(0)
    if not isinstance(trigger, DecoyTrigger):
        raise TypeError(f"poison: decoy_rate needs a trigger with decoys, as WaNet and BPPA; got {trigger!r}")
    others = torch.ones(total, dtype=torch.bool, device=indices.device).index_fill(0, indices, False)
    candidates = others.nonzero().flatten()
    if count > len(candidates):
        raise ValueError(
            f"poison: decoy_rate {rate} asks for {count} images; only {len(candidates)} are without the trigger"
        )
    return _draw(candidates, count, generator)


def _triggered(trigger: Trigger, images: Tensor, generator: Generator) -> Tensor:
    if isinstance(trigger, Several):
        return trigger.divide(images, generator)
    return torch.cat([trigger(part) for part in images.split(_PIECE)]) if len(images) else images
