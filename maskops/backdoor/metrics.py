"""What a backdoor and its removal are measured by. Every number is a fraction in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from maskops.backdoor._checks import check_labelled
from maskops.backdoor.poison import target_labels
from maskops.backdoor.triggers import Trigger


@dataclass(frozen=True)
class Metrics:
    """Accuracy of a model f and, for a trigger T with target labels t(y), the attack's success. Fractions in [0, 1].

    acc:           mean[f(x) = y]
    asr_all:       mean[f(T(x)) = t(y)] over all images: the AWM and I-BAU convention, about 1/C once a backdoor is gone
    asr_excl:      the same over the images with y != t(y): the ANP, NFT and BackdoorBench convention
    ra:            robust accuracy, mean[f(T(x)) = y] over the images with y != t(y)
    acc_per_class: (num_classes,) float64: acc of the images of each true class
    asr_per_class: (num_classes,) float64: mean[f(T(x)) = t(y)] of the images of each true class

    What needs a trigger is None where none was given. A mean over no image (of a class that is absent, or asr_excl of
    images that are all of the target class) is nan.
    """

    acc: float
    asr_all: float | None
    asr_excl: float | None
    ra: float | None
    acc_per_class: Tensor = field(repr=False, compare=False)
    asr_per_class: Tensor | None = field(repr=False, compare=False)

    def __str__(self) -> str:
        named = {"ACC": self.acc, "asr_all": self.asr_all, "asr_excl": self.asr_excl, "RA": self.ra}
        return "  ".join(f"{name} {100 * value:.1f} %" for name, value in named.items() if value is not None)


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    trigger: Trigger | None = None,
    target: int | None = None,
    *,
    rule: str = "all_to_one",
    num_classes: int | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Metrics:
    """Measure a model on clean and, where a trigger is given, on triggered images.

    The model sees pixels; wrap one that wants normalised images: ``nn.Sequential(normalise, model)``. It runs in eval
    mode, and afterwards every submodule's training flag is what it was. A row of logits with a NaN predicts no class:
    it counts as wrong, and never as a success of the attack.

    model:        maps (n, C, H, W) to logits (n, number of classes)
    images:       (N, C, H, W) floating point in [0, 1], N > 0, any device; not modified
    labels:       (N,) integers, the true classes
    target, rule: see ``target_labels``; read only with a trigger
    num_classes:  default: the number of logits
    device:       where batches go; default: where the model's first parameter or buffer is, else where the images are

    >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # predicts the brightest channel
    >>> images, labels = torch.eye(3).view(3, 3, 1, 1) * 0.5, torch.arange(3)
    >>> def trigger(x):
    ...     return torch.cat([torch.ones_like(x[:, :1]), x[:, 1:]], dim=1)
    >>> print(evaluate(model, images, labels, trigger, target=0))
    ACC 100.0 %  asr_all 100.0 %  asr_excl 100.0 %  RA 0.0 %
    """
    if len(images) == 0:
        raise ValueError(f"evaluate: at least one image expected; got {tuple(images.shape)}")
    if batch_size < 1:
        raise ValueError(f"evaluate: batch_size must be at least 1; got {batch_size}")
    check_labelled("evaluate", images, labels)
    labels = labels.long().cpu()
    if device is None:
        device = next(chain(model.parameters(), model.buffers()), images).device
    with _eval_mode(model), torch.inference_mode():
        clean, width = _predict(model, images, None, batch_size, device)
        num_classes = width if num_classes is None else num_classes
        if int(labels.max()) >= num_classes:
            raise ValueError(f"evaluate: labels must be below num_classes {num_classes}; got {int(labels.max())}")
        if trigger is None:
            triggered = targets = None
        else:
            targets = target_labels(labels, target, rule, num_classes)
            triggered, _ = _predict(model, images, trigger, batch_size, device)
    return _count(labels, clean, triggered, targets, num_classes)


def der(before: Metrics, after: Metrics) -> float:
    """Defence effectiveness rating, ``(max(0, drop of asr_excl) - max(0, drop of acc) + 1) / 2`` in [0, 1].

    0.5 is no change; above it, the attack lost more than the accuracy did.

    ValueError: a measurement without a trigger, or on images that are all of the target class
    source: the formula that BackdoorBench documents; its ``defense_effectiveness_rate`` adds the second term instead
    """
    for metrics in (before, after):
        if metrics.asr_excl is None or math.isnan(metrics.asr_excl):
            raise ValueError(f"der: both measurements need an asr_excl; got '{metrics}'")
    return (max(0.0, before.asr_excl - after.asr_excl) - max(0.0, before.acc - after.acc) + 1) / 2


def removed(asr_all: float, num_classes: int) -> bool:
    """Whether a backdoor counts as removed: ``asr_all < 1.5 / num_classes`` (AWM).

    asr_all: a fraction in [0, 1]
    """
    if not 0 <= asr_all <= 1:
        raise ValueError(f"removed: asr_all must be a fraction in [0, 1]; got {asr_all}")
    return asr_all < 1.5 / num_classes


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    # the flags themselves, not eval() and train(): these may be overridden to do more (or to refuse)
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


def _predict(
    model: nn.Module, images: Tensor, trigger: Trigger | None, batch_size: int, device: torch.device | str
) -> tuple[Tensor, int]:
    """Predicted classes (N,) int64 on the CPU, -1 where a logit is NaN, and the number of logits."""
    predictions = []
    for batch in images.split(batch_size):
        batch = batch.to(device)
        logits = model(batch if trigger is None else trigger(batch))
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(batch):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"evaluate: the model must map {tuple(batch.shape)} to logits (n, num_classes); got {got}")
        predictions.append(logits.argmax(1).where(~logits.isnan().any(1), -1))
    return torch.cat(predictions).cpu(), logits.shape[1]


def _count(
    labels: Tensor, clean: Tensor, triggered: Tensor | None, targets: Tensor | None, num_classes: int
) -> Metrics:
    correct = clean == labels
    acc, acc_per_class = _mean(correct), _mean_per_class(correct, labels, num_classes)
    if triggered is None:
        return Metrics(acc, None, None, None, acc_per_class, None)
    success, changed = triggered == targets, labels != targets
    return Metrics(
        acc,
        asr_all=_mean(success),
        asr_excl=_mean(success[changed]),
        ra=_mean((triggered == labels)[changed]),
        acc_per_class=acc_per_class,
        asr_per_class=_mean_per_class(success, labels, num_classes),
    )


def _mean(hits: Tensor) -> float:
    return hits.double().mean().item()


def _mean_per_class(hits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    of_class = torch.bincount(labels, minlength=num_classes)
    return torch.bincount(labels, weights=hits.double(), minlength=num_classes) / of_class
