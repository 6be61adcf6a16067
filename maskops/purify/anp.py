"""Adversarial Neuron Pruning: Wu & Wang 2021, "Adversarial Neuron Pruning Purifies Backdoored Deep Models"."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maskops.optim import MaskSGD
from maskops.purify._algorithm import Algorithm, complete
from maskops.purify._draws import Batch
from maskops.purify._images import count_held_out
from maskops.purify._loop import OnEpoch
from maskops.purify._masks import MaskRun
from maskops.purify._options import Auto, Preset, choice, number, optional
from maskops.purify._phase import Phase
from maskops.purify._pruning import kept, threshold_within
from maskops.purify._result import Purification
from maskops.purify._setting import MaskSetting


@dataclass(frozen=True)
class ANPOptions:
    """The hyper-parameters of ANP, under the names of Algorithm 1. The defaults are the paper's.

    alpha:        weight of the clean loss; the perturbed loss has 1 - alpha
    epsilon:      ε, bound of the noise δ on the masks and ξ on the biases
    noise_steps:  ascent steps of the noise per mask step, each of size ε / noise_steps, from a uniformly random start
    project:      after each, bring the noise back into [-ε, ε]; the published code doesn't: its noise reaches 2 ε
    epochs, steps: mask steps are epochs * steps; the history has one number per epoch
    batch_size:   b, at most n
    lr, momentum: η, and of SGD on the masks
    statistics:   ``"batch"``: the model runs in train mode (batch norms on their batch's statistics, dropout on), as
                  published; ``"running"``: in eval mode. The result has the user's running statistics
    threshold:    neurons whose mask is at most this are pruned, none at -1; ``"auto"``: the last of 0, 0.05, …, 0.95
                  before the accuracy on clean images, held out from the masks, falls by more than ``budget``
    number, fraction: prune that many, or that share, of the neurons with the smallest masks instead; None for neither
    budget:       accuracy, as a fraction of 1, that ``threshold="auto"`` may cost
    held_out:     share of the clean images that ``threshold="auto"`` holds out
    """

    alpha: float = 0.2
    epsilon: float = 0.4
    noise_steps: int = 1
    project: bool = True
    epochs: int = 20
    steps: int = 100
    batch_size: int = 128
    lr: float = 0.2
    momentum: float = 0.9
    statistics: str = "batch"
    threshold: float | Auto = 0.2
    number: int | None = None
    fraction: float | None = None
    budget: float = 0.02
    held_out: float = 0.2

    def __post_init__(self) -> None:
        for name in ("alpha", "momentum", "budget", "held_out"):
            number("anp", self, name, float, 0, 1)
        for name in ("epsilon", "lr"):
            number("anp", self, name, float, 0)
        for name in ("noise_steps", "epochs", "steps", "batch_size"):
            number("anp", self, name, int, 1)
        choice("anp", self, "project", (True, False))
        choice("anp", self, "statistics", ("batch", "running"))
        number("anp", self, "threshold", float, -1, 1, auto=True)
        optional("anp", self, "number", int, 0)
        optional("anp", self, "fraction", float, 0, 1)
        if self.number is not None and self.fraction is not None:
            raise ValueError("anp: number and fraction are two ways to say it: give one of them")

    @property
    def chooses_threshold(self) -> bool:
        """Whether clean images are held out for a threshold."""
        return self.threshold == "auto" and self.number is None and self.fraction is None

    def learned_from(self, count: int) -> int:
        """How many of so many clean images the masks are learned from."""
        return count - count_held_out(count, self.held_out) if self.chooses_threshold else count


_NEURONS = MaskSetting(layers="auto", granularity="neuron", crop="auto", flip=True)

PRESETS = {
    "paper": Preset(ANPOptions(), _NEURONS),
    "official": Preset(ANPOptions(project=False, epochs=4, steps=500), replace(_NEURONS, layers="norm", crop=4)),
}
"""``paper``: Algorithm 1 and Section 4.1. ``official``: the published ``optimize_mask_cifar.py``, which doesn't project
the noise, on batch norms alone; its ``prune_neuron_cifar.py`` chooses no threshold: here 0.2, the paper's."""


@torch.enable_grad()
def anp(
    model: nn.Module,
    clean_data: Any,
    *,
    preset: str = "paper",
    on_epoch: OnEpoch | None = None,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    **options: Any,
) -> Purification:
    """Purify a model by pruning neurons that are sensitive to adversarial noise on neurons.

        min over m in [0, 1]: α·E L(f(x; m⊙w, b), y) + (1 - α)·max over δ, ξ: E L(f(x; (m + δ)⊙w, (1 + ξ)⊙b), y)

    with δ and ξ in [-ε, ε], and then every neuron with a small m is cut out of the original weights; biases stay.

    A neuron is a channel of a batch norm's scale and shift in a model with batch norms, because noise on a convolution
    before one would cancel out; otherwise a row of a convolution's or linear layer's weight with its bias, or a channel
    of a layer norm: that is what ``layers="auto"`` means.

    model, clean_data, on_epoch, checkpoint, resume: as in :func:`maskops.purify.awm`; with statistics of batches, the
                user's running statistics are left alone, and ``on_epoch`` measures the unpruned model in eval mode
    preset:     ``"paper"`` or ``"official"``: see :data:`PRESETS`
    options:    single fields of :class:`ANPOptions` and :class:`maskops.purify.MaskSetting`
    returns:    a :class:`maskops.purify.Purification`; ``.masks`` are zeros and ones, ``.scores`` the masks as learned,
                from which :func:`maskops.purify.prune` makes models for other thresholds
    errors:     as in :func:`maskops.purify.awm`
    measured:   on the demo's digits with 100 clean images (seeds 0 to 2, ``flip=False``; ACC 98 to 99 %, asr_all 100 %
                before): 98.8 / 65, 98.4 / 100, 98.8 / 99, so it fails: the network has 96 channels, and of the masks
                that were learned only seed 0's have thresholds (0.7: 95.0 / 16) that cut the backdoor before the digits
    source:     Eq. 8 and Algorithm 1, whose lines are marked in the code. Deviations: the mask step has momentum, as in
                Section 4.1; several noise steps have size ε / steps, as in the published code

    >>> images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> result = anp(net, (images, labels), epochs=1, steps=2, number=1, progress=False)
    >>> result.masks["1.neuron_mask"].sum().item()
    3.0
    """
    return complete(ANP(model, clean_data, preset, on_epoch, options), checkpoint, resume)


class ANP(Algorithm):
    """Algorithm 1, whose lines are marked."""

    method, presets = "anp", PRESETS

    def prepare(self, model: nn.Module, clean_data: Any, options: ANPOptions, setting: MaskSetting) -> None:
        statistics = options.statistics == "batch"
        self.run = run = MaskRun("anp", model, clean_data, setting, batch_statistics=statistics, biases="noise")
        self.held_out = run.hold_out(options.held_out) if options.chooses_threshold else None
        self.options = replace(options, batch_size=min(options.batch_size, len(run.images)))
        if options.number is not None:
            with run.named_errors():
                kept(run.arena.masks, number=options.number)  # raises now, not at the end, if there are fewer neurons
        self.masks = MaskSGD(run.arena, lr=options.lr, momentum=options.momentum)  # line 2: every mask is 1
        self.optimizers = [self.masks]

    def phases(self) -> Iterator[Phase]:
        run, options = self.run, self.options
        masks = run.steps("masks", self.step, options.steps, options.batch_size)
        for epoch in run.epochs(options.epochs):  # line 3
            yield masks
            run.report(self.on_epoch, epoch, run.model)

    def step(self, batch: Batch) -> dict[str, Tensor]:  # line 4
        run, options = self.run, self.options
        bound = options.epsilon if options.project else None
        images, labels = run.sample(batch)
        run.noise.draw(options.epsilon)  # line 5
        for _ in range(options.noise_steps):
            run.ascend_noise(images, labels, options.epsilon / options.noise_steps, bound)  # lines 6 to 9
        clean, perturbed = (options.alpha, images, labels), (1 - options.alpha, images, labels)
        clean_loss, perturbed_loss = run.descend(clean, perturbed=perturbed)  # line 10
        self.masks.step()  # lines 10, 11
        return {"clean loss": clean_loss, "perturbed loss": perturbed_loss}

    def result(self) -> Purification:
        options, scores = self.options, self.run.arena.masks
        if self.held_out is not None:
            hits = partial(self.run.hits, *self.held_out)
            find = partial(threshold_within, options.budget, scores, hits, len(self.held_out[1]))
            threshold = self.run.team.first(find)
            options = replace(options, threshold=threshold)
        return self.run.finish(options, pruned=_pruned(scores, options))  # lines 13, 14


def _pruned(scores: Mapping[str, Tensor], options: ANPOptions) -> dict[str, Tensor]:
    if options.number is not None:
        return kept(scores, number=options.number)
    if options.fraction is not None:
        return kept(scores, fraction=options.fraction)
    return kept(scores, threshold=options.threshold)
