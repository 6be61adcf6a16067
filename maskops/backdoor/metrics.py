"""What a backdoor and its removal are measured by. Every number is a fraction in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from maskops._state import eval_mode
from maskops.backdoor._checks import check_labelled
from maskops.backdoor._model import device_of
from maskops.backdoor.composite import Composite
from maskops.backdoor.poison import target_labels
from maskops.backdoor.triggers import Several, Trigger


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


class SeveralMetrics(NamedTuple):
    """What ``evaluate_several`` returns.

    each:     one Metrics per trigger, stamped alone
    any_of:   an image counts as a success if any trigger, stamped alone, fools the model, and as robust (ra) if it is
              classified rightly under each of them
    together: all triggers stamped on the same image, one after the other
    """

    each: tuple[Metrics, ...]
    any_of: Metrics
    together: Metrics


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
    triggers = () if trigger is None else (trigger,)
    seen = _look("evaluate", model, images, labels, triggers, target, rule, num_classes, batch_size, device)
    return seen.clean_metrics() if trigger is None else seen.metrics(*seen.outcome(0))


def evaluate_several(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    several: Several,
    target: int | None = None,
    *,
    rule: str = "all_to_one",
    num_classes: int | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> SeveralMetrics:
    """Measure an attack of several triggers: each alone, any of them, and all on one image. Arguments as ``evaluate``.

    source: AWM, supplement, Table 10, whose "ASR (all)" is described as any_of ("as long as any one of the three
            triggers fooled the model"). Its rows after purification, 10.38 beside 13.16 for the third trigger, cannot
            be that, but could be together: hence both.

    >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # predicts the brightest channel
    >>> images, labels = torch.eye(2).view(2, 2, 1, 1) * 0.5, torch.arange(2)
    >>> weak, strong = (lambda x: x.clone()), (lambda x: torch.cat([torch.ones_like(x[:, :1]), x[:, 1:]], dim=1))
    >>> measured = evaluate_several(model, images, labels, Several((weak, strong)), target=0)
    >>> [one.asr_excl for one in measured.each], measured.any_of.asr_excl, measured.together.asr_excl
    ([0.0, 1.0], 1.0, 1.0)
    """
    triggers, count = (*several.triggers, several), len(several.triggers)
    seen = _look("evaluate_several", model, images, labels, triggers, target, rule, num_classes, batch_size, device)
    outcomes = [seen.outcome(index) for index in range(count)]
    success, robust = (torch.stack(of_each) for of_each in zip(*outcomes, strict=True))
    return SeveralMetrics(
        tuple(seen.metrics(*outcome) for outcome in outcomes),
        any_of=seen.metrics(success.any(0), robust.all(0)),
        together=seen.metrics(*seen.outcome(count)),
    )


def evaluate_composite(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    composite: Composite,
    generator: Generator,
    *,
    num_classes: int | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Metrics:
    """Measure a composite attack: acc on the images, asr on ``composite.test_set`` of them. Arguments as ``evaluate``.

    No mix is of the target class, so asr_all = asr_excl. ra is the share of mixes that are classified as either of
    their two classes; a mix has no true class, so asr_per_class is None.
    """
    name = "evaluate_composite"
    clean = _look(name, model, images, labels, (), None, "", num_classes, batch_size, device).clean_metrics()
    mixes, targets = composite.test_set(images, labels, generator)
    predicted = _look(name, model, mixes, targets, (), None, "", num_classes, batch_size, device).clean
    success = _mean(predicted == composite.target)
    robust = _mean((predicted == composite.first) | (predicted == composite.second))
    return Metrics(clean.acc, success, success, robust, clean.acc_per_class, None)


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


def rir(before: Metrics, after: Metrics) -> float:
    """Robust improvement rating, ``(max(0, gain of ra) - max(0, drop of acc) + 1) / 2`` in [0, 1].

    0.5 is no change; above it, more triggered images got their true class back than clean ones lost theirs.

    ValueError: a measurement without a trigger, or on images that are all of the target class
    source: the formula that BackdoorBench documents; its ``robust_improvement_rate`` adds the second term instead
    """
    for metrics in (before, after):
        if metrics.ra is None or math.isnan(metrics.ra):
            raise ValueError(f"rir: both measurements need an ra; got '{metrics}'")
    return (max(0.0, after.ra - before.ra) - max(0.0, before.acc - after.acc) + 1) / 2


def removed(asr_all: float, num_classes: int) -> bool:
    """Whether a backdoor counts as removed: ``asr_all < 1.5 / num_classes`` (AWM).

    asr_all: a fraction in [0, 1]
    """
    if not 0 <= asr_all <= 1:
        raise ValueError(f"removed: asr_all must be a fraction in [0, 1]; got {asr_all}")
    return asr_all < 1.5 / num_classes


@dataclass(frozen=True)
class _Seen:
    """Labels, target labels and predicted classes of the same images, (N,) int64 on the CPU."""

    labels: Tensor
    targets: Tensor | None
    clean: Tensor
    triggered: tuple[Tensor, ...]
    num_classes: int

    def outcome(self, index: int) -> tuple[Tensor, Tensor]:
        """Of one trigger, (N,) bool each: whether it got its target, whether the model got the true class."""
        return self.triggered[index] == self.targets, self.triggered[index] == self.labels

    def clean_metrics(self) -> Metrics:
        correct = self.clean == self.labels
        return Metrics(_mean(correct), None, None, None, self._mean_per_class(correct), None)

    def metrics(self, success: Tensor, robust: Tensor) -> Metrics:
        changed = self.labels != self.targets
        return replace(
            self.clean_metrics(),
            asr_all=_mean(success),
            asr_excl=_mean(success[changed]),
            ra=_mean(robust[changed]),
            asr_per_class=self._mean_per_class(success),
        )

    def _mean_per_class(self, hits: Tensor) -> Tensor:
        of_class = torch.bincount(self.labels, minlength=self.num_classes)
        return torch.bincount(self.labels, weights=hits.double(), minlength=self.num_classes) / of_class


def _look(
    function: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    triggers: Sequence[Trigger],
    target: int | None,
    rule: str,
    num_classes: int | None,
    batch_size: int,
    device: torch.device | str | None,
) -> _Seen:
    """Let the model see the images, clean and under each trigger; target and rule are read only with a trigger."""
    if len(images) == 0:
        raise ValueError(f"{function}: at least one image expected; got {tuple(images.shape)}")
    if batch_size < 1:
        raise ValueError(f"{function}: batch_size must be at least 1; got {batch_size}")
    check_labelled(function, images, labels)
    labels = labels.long().cpu()
    device = device_of(model, images) if device is None else device
    with eval_mode(model), torch.inference_mode():
        clean, width = _predict(function, model, images, None, batch_size, device)
        num_classes = width if num_classes is None else num_classes
        if int(labels.max()) >= num_classes:
            raise ValueError(f"{function}: labels must be below num_classes {num_classes}; got {int(labels.max())}")
        targets = target_labels(labels, target, rule, num_classes) if triggers else None
        triggered = [_predict(function, model, images, trigger, batch_size, device)[0] for trigger in triggers]
    return _Seen(labels, targets, clean, tuple(triggered), num_classes)


def _predict(
    function: str,
    model: nn.Module,
    images: Tensor,
    trigger: Trigger | None,
    batch_size: int,
    device: torch.device | str,
) -> tuple[Tensor, int]:
    """Predicted classes (N,) int64 on the CPU, -1 where a logit is NaN, and the number of logits."""
    predictions = []
    for batch in images.split(batch_size):
        batch = batch.to(device)
        logits = model(batch if trigger is None else trigger(batch))
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(batch):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"{function}: the model must map {tuple(batch.shape)} to logits (n, num_classes); got {got}"
            )
        predictions.append(logits.argmax(1).where(~logits.isnan().any(1), -1))
    return torch.cat(predictions).cpu(), logits.shape[1]


def _mean(hits: Tensor) -> float:
    return hits.double().mean().item()
