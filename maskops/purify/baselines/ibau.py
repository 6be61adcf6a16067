"""I-BAU: Zeng et al. 2022, "Adversarial Unlearning of Backdoors via Implicit Hypergradient"."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from maskops.purify._images import CleanImages
from maskops.purify._loop import OnEpoch
from maskops.purify._options import Auto, Preset, choice, number
from maskops.purify._result import Purification
from maskops.purify._setting import Setting
from maskops.purify.baselines._baseline import Baseline, complete, tensors_of
from maskops.purify.baselines._hypergradient import hypergradient
from maskops.purify.baselines._training import finish
from maskops.purify.baselines._universal_trigger import ascended, inner_objective, outer_objective


@dataclass(frozen=True)
class IBAUOptions:
    """The hyper-parameters of I-BAU. The defaults are the paper's formulation, with the published step sizes.

    epochs:       rounds of an inner maximisation and one pass of outer steps
    batch_size:   at most n
    inner_steps:  ascent steps on the trigger per round, batch after batch; ``"auto"`` is one pass
    inner_lr:     of gradient ascent on the trigger
    inner_labels: ``"true"``, or ``"predicted"``: the model's answers to the clean images
    penalty:      weight of -‖δ‖₂² in the inner objective
    project:      bring the trigger back into the L2 ball of the radius after every ascent step
    radius:       C in pixel units; ``"auto"`` is the published code's 10 for 3x32x32, scaled by the root of image size
    terms:        K, of the fixed-point iteration
    fixed_point_step: step size of its map, a gradient step on the inner objective
    inner_batch:  that objective is of the ``"same"`` batch as the outer loss, or of the ``"first"``, as published
    share:        of an outer batch's images that carry the trigger, at least one of them
    lr:           of Adam on all weights
    """

    epochs: int = 5
    batch_size: int = 100
    inner_steps: int | Auto = "auto"
    inner_lr: float = 10.0
    inner_labels: str = "true"
    penalty: float = 0.0
    project: bool = True
    radius: float | Auto = "auto"
    terms: int = 5
    fixed_point_step: float = 0.1
    inner_batch: str = "same"
    share: float = 1.0
    lr: float = 0.001

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            number("ibau", self, name, int, 1)
        number("ibau", self, "inner_steps", int, 1, auto=True)
        number("ibau", self, "terms", int, 0)
        for name in ("inner_lr", "penalty", "fixed_point_step", "lr"):
            number("ibau", self, name, float, 0)
        number("ibau", self, "radius", float, 0, auto=True)
        number("ibau", self, "share", float, 0, 1)
        choice("ibau", self, "inner_labels", ("true", "predicted"))
        choice("ibau", self, "inner_batch", ("same", "first"))
        choice("ibau", self, "project", (True, False))

    def for_images(self, images: CleanImages) -> IBAUOptions:
        """The same options with every ``"auto"`` replaced by what it stands for on these images."""
        count, *size = images.shape
        batch_size = min(self.batch_size, count)
        return replace(
            self,
            batch_size=batch_size,
            inner_steps=math.ceil(count / batch_size) if self.inner_steps == "auto" else self.inner_steps,
            radius=10 * math.sqrt(math.prod(size) / (3 * 32 * 32)) if self.radius == "auto" else self.radius,
        )


_PUBLISHED = IBAUOptions(inner_labels="predicted", penalty=1e-3, project=False, inner_batch="first", share=0.01)

PRESETS = {"paper": Preset(IBAUOptions(), Setting()), "official": Preset(_PUBLISHED, Setting())}
"""``paper``: Eq. 1 and Algorithm 1. ``official``: the published ``defense.py``, but that at least one image of a batch
carries the trigger, where the published code has none in batches below 100."""


@torch.enable_grad()
def ibau(
    model: nn.Module,
    clean_data: Any,
    *,
    preset: str = "paper",
    on_epoch: OnEpoch | None = None,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    **options: Any,
) -> Purification:
    """Fine-tune all weights against a universal trigger, whose own answer to the weights is part of the gradient.

        min over θ: E L(f(x + δ*(θ); θ), y),  δ*(θ) = argmax over ‖δ‖₂ <= C: E L(f(x + δ; θ), y)

    The model runs in eval mode: its running statistics stay as they are.

    model, clean_data, on_epoch, checkpoint, resume: as in :func:`maskops.purify.awm`
    preset:     ``"paper"`` or ``"official"``: see :data:`PRESETS`
    options:    single fields of :class:`IBAUOptions` and :class:`maskops.purify.Setting`
    returns:    a :class:`maskops.purify.Purification` without masks, with the last trigger
    errors:     as in :func:`maskops.purify.awm`
    measured:   as for :func:`ft`: 98.2 / 100, 87.0 / 40, 98.4 / 100, so it fails; with batches of 20 and 50 rounds of
                50 inner steps 78.2 / 0, 68.8 / 0, 88.6 / 67; ``"official"`` with the same 96.2 / 11, 95.4 / 23,
                96.8 / 12, and with 20 rounds of one pass 97.6 / 10, 97.4 / 64, 97.6 / 86
    source:     Eq. 1; the hypergradient is that of Grazzi et al. 2020 by K fixed-point steps, as published. Deviations:
                the hypergradient is of one batch at a time; the fixed point's map has no projection, though δ has one

    >>> images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    >>> result = ibau(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), (images, labels), epochs=1, progress=False)
    >>> tuple(result.trigger.shape)
    (1, 1, 8, 8)
    """
    return complete(IBAU(model, clean_data, preset, on_epoch, options), checkpoint, resume)


class IBAU(Baseline):
    """Algorithm 1."""

    method, presets = "ibau", PRESETS

    def prepare(self) -> None:
        run = self.run
        self.options = self.options.for_images(run.images)
        self.unlearned = run.trainable_copy().eval()
        self.trigger = torch.zeros_like(run.images[:1])
        self.order = torch.arange(len(run.images)).split(self.options.batch_size)
        self.optimizers = [torch.optim.Adam(self.unlearned.parameters(), lr=self.options.lr)]

    def phases(self) -> Iterator[Callable[[], None]]:
        for epoch in self.run.epochs(self.options.epochs):
            yield self.round
            self.run.report(self.on_epoch, epoch, self.unlearned)

    def round(self) -> None:
        run = self.run
        batches = [run.sample(run.batch_of(index)) for index in self.order]
        with sdpa_kernel(SDPBackend.MATH):  # the faster kernels of attention have no second derivatives
            with run.phase("inner"):
                self.trigger.copy_(ascended(run, self.unlearned, batches, self.options))
            with run.phase("outer"):
                self.descend(batches)

    def descend(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        run, options, model, (adam,) = self.run, self.options, self.unlearned, self.optimizers
        parameters = list(model.parameters())
        for batch in batches:
            inner = inner_objective(model, batches[0] if options.inner_batch == "first" else batch, options)
            outer = outer_objective(run, model, batch, options)
            fixed_point = options.terms, options.fixed_point_step
            loss, gradients = hypergradient(outer, inner, self.trigger, parameters, *fixed_point)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            adam.step()
            run.note("outer loss", loss)

    def tensors(self) -> dict[str, Tensor]:
        return {**tensors_of(unlearned=self.unlearned), "trigger": self.trigger}

    def result(self) -> Purification:
        return finish(self.run, self.options, self.unlearned, trigger=self.trigger)
