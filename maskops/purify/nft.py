"""Neural mask Fine-Tuning: Karim et al. 2024, "Augmented Neural Fine-Tuning for Efficient Backdoor Purification"."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from maskops import augment
from maskops.augment.basic import blend, draw_cutmix, draw_mixup, paste
from maskops.optim import MaskSGD
from maskops.purify._algorithm import Algorithm, complete
from maskops.purify._draws import Batch, Drawn
from maskops.purify._fake import on_host
from maskops.purify._loop import OnEpoch, cosine
from maskops.purify._masks import MaskRun
from maskops.purify._options import Auto, Preset, choice, number, optional
from maskops.purify._phase import Phase
from maskops.purify._result import Purification
from maskops.purify._setting import MaskSetting

AUGMENTATIONS = ("mixup", "cutmix", "cutout", "augmix", "randaugment", "adversarial", "none")


@dataclass(frozen=True)
class NFTOptions:
    """The hyper-parameters of NFT. The defaults are the paper's for CIFAR-10.

    lr, momentum: of SGD on the masks
    epochs, steps: mask steps are epochs * steps; steps ``"auto"`` is as many as one pass over the clean images takes
    batch_size:   at most n
    lr_decay:     factor on lr, once every ``lr_decay_epochs`` epochs (the paper's on Tiny-ImageNet: 0.65 every 20)
    cosine_to:    learning rate that a cosine reaches after all epochs, in place of lr_decay; None for none
    eta:          η, weight of Σ|1 - m|; ``"auto"`` is the published code's 0.001 / (clean images per class)
    floor, floor_decay: masks stay in [μ(l), 1] with μ(l) = floor * exp(-floor_decay * l) for layer l
    floor_by:     l is the ``"depth"`` of a masked layer, or its ``"index"`` among the masks, as published, which counts
                  shortcuts too; both begin at 1 after the first layer, whose masks stay 1
    augmentation: of Table 7: mixup (the paper's own), cutmix, cutout, augmix, randaugment, adversarial, none
    mixup_alpha:  λ ~ Beta(mixup_alpha, mixup_alpha), for mixup and cutmix
    tune_bias:    learn the masked layers' biases too, by the same SGD (Table 14, which doesn't say how)
    statistics:   ``"batch"``: the model runs in train mode (batch norms on their batch's statistics, dropout on) and
                  the result's running statistics follow, as published; ``"running"``: in eval mode, with the user's
    """

    lr: float = 0.05
    momentum: float = 0.95
    epochs: int = 100
    steps: int | Auto = "auto"
    batch_size: int = 128
    lr_decay: float = 1.0
    lr_decay_epochs: int = 20
    cosine_to: float | None = None
    eta: float | Auto = 5e-4
    floor: float = 0.8
    floor_decay: float = 0.5
    floor_by: str = "depth"
    augmentation: str = "mixup"
    mixup_alpha: float = 1.0
    tune_bias: bool = False
    statistics: str = "batch"

    def __post_init__(self) -> None:
        for name in ("lr", "lr_decay", "floor_decay"):
            number("nft", self, name, float, 0)
        for name in ("momentum", "floor"):
            number("nft", self, name, float, 0, 1)
        for name in ("epochs", "batch_size", "lr_decay_epochs"):
            number("nft", self, name, int, 1)
        number("nft", self, "steps", int, 1, auto=True)
        number("nft", self, "eta", float, 0, auto=True)
        number("nft", self, "mixup_alpha", float, 1e-3)
        optional("nft", self, "cosine_to", float, 0)
        choice("nft", self, "floor_by", ("depth", "index"))
        choice("nft", self, "augmentation", AUGMENTATIONS)
        choice("nft", self, "tune_bias", (True, False))
        choice("nft", self, "statistics", ("batch", "running"))

    def for_labels(self, labels: Tensor) -> NFTOptions:
        """The same options with every ``"auto"`` replaced by what it stands for with these labels."""
        batch_size = min(self.batch_size, len(labels))
        with on_host():
            per_class = len(labels) / len(labels.unique())
        return replace(
            self,
            batch_size=batch_size,
            steps=math.ceil(len(labels) / batch_size) if self.steps == "auto" else self.steps,
            eta=1e-3 / per_class if self.eta == "auto" else self.eta,
        )


_NEURONS = MaskSetting(layers="auto", granularity="neuron", crop="auto", flip=True)

PRESETS = {
    "paper": Preset(NFTOptions(), _NEURONS),
    "official": Preset(
        NFTOptions(epochs=5, steps=200, cosine_to=0.02, eta="auto", floor_by="index"),
        replace(_NEURONS, layers="norm", crop=4),
    ),
}
"""``paper``: the supplementary, Sections 2.2 and 4 (momentum from the code: the paper says SGD). ``official``: the
published ``Remove_Backdoor.py``, once its training loop, which stops at its first batch, is made to run."""


@torch.enable_grad()
def nft(
    model: nn.Module,
    clean_data: Any,
    *,
    preset: str = "paper",
    on_epoch: OnEpoch | None = None,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    **options: Any,
) -> Purification:
    """Purify a model by masks on its neurons, fine-tuned on clean images that are mixed with each other.

        min over m in [μ(l), 1]: E L(f(λ x + (1 - λ) x'; m⊙w, b), λ y + (1 - λ) y') + η·Σ|1 - m|

    A neuron is a channel of a batch norm's scale in a model with batch norms; otherwise a row of a convolution's or
    linear layer's weight, or a channel of a layer norm: that is what ``layers="auto"`` means. The floor μ keeps early
    layers near to what they were, and no neuron is pruned.

    model, clean_data, on_epoch, checkpoint, resume: as in :func:`maskops.purify.awm`; ``on_epoch`` measures the model
                in eval mode
    preset:     ``"paper"`` or ``"official"``: see :data:`PRESETS`
    options:    single fields of :class:`NFTOptions` and :class:`maskops.purify.MaskSetting`
    returns:    a :class:`maskops.purify.Purification`; the masks are soft. With statistics of batches, the model's
                running statistics are new too, so that the masks alone don't make it from the original
    errors:     as in :func:`maskops.purify.awm`
    measured:   on the demo's digits with 100 clean images (seeds 0 to 2, ``flip=False``; ACC 98 to 99 %, asr_all 100 %
                before): 98.8 / 98, 97.6 / 99, 98.0 / 100, so it fails, also with four times the steps, in eval mode and
                with masks on convolutions: clean images, mixed or not, hardly move what the trigger alone uses
    source:     the supplementary, Section 2.2 (the loss is that of Zhang et al. 2018 on masks), and the published code
                where that is silent

    >>> images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    >>> convolutions = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    >>> net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 2))
    >>> result = nft(net, (images, labels), epochs=1, progress=False)
    >>> result.masks["1.neuron_mask"]
    tensor([1., 1., 1., 1.])
    """
    return complete(NFT(model, clean_data, preset, on_epoch, options), checkpoint, resume)


class NFT(Algorithm):
    """The published fine-tuning of masks."""

    method, presets = "nft", PRESETS

    def prepare(self, model: nn.Module, clean_data: Any, options: NFTOptions, setting: MaskSetting) -> None:
        statistics = options.statistics == "batch"
        biases = "tune" if options.tune_bias else None
        modes = {"batch_statistics": statistics, "track_statistics": True}
        self.run = run = MaskRun("nft", model, clean_data, setting, **modes, biases=biases)
        self.options = options = options.for_labels(run.labels)
        floor_of = _floors(run, options)
        floors = run.arena.per_mask(floor_of)
        fixed = [name for name, floor in floor_of.items() if floor == 1]
        run.fix(fixed if len(fixed) < len(floor_of) else [])  # a loss must depend on something
        self.lr = run.varying(options.lr)
        momentum = options.momentum
        self.masks = MaskSGD(run.arena, self.lr, momentum, l1=options.eta, toward=1.0, lower=floors)
        self.optimizers = [self.masks]
        if run.biases:
            anywhere = {"lower": -math.inf, "upper": math.inf}
            self.optimizers.append(MaskSGD(run.biases.values(), self.lr, momentum, **anywhere))

    def phases(self) -> Iterator[Phase]:
        run, options = self.run, self.options
        draws = _DRAWS.get(options.augmentation)
        mix = None if draws is None else partial(draws, alpha=options.mixup_alpha)
        drawn_within = options.augmentation != "none" and mix is None
        why_eager = f"{options.augmentation} draws on the host" if drawn_within else None
        masks = run.steps("masks", self.step, options.steps, options.batch_size, mix=mix, why_eager=why_eager)
        for epoch in run.epochs(options.epochs):
            self.lr.fill_(_learning_rate(epoch, options))
            yield masks
            run.report(self.on_epoch, epoch, run.model)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        loss = self.run.losses.descend_mixed(_augmented(self.run, batch, self.options))
        self.run.add_gradients()  # those of biases, which aren't in the arena
        for optimizer in self.optimizers:
            optimizer.step()  # the gradient of η Σ|1 - m| and the floors are part of the mask step
            optimizer.zero_grad(set_to_none=False)
        return {"loss": loss}


def _floors(run: MaskRun, options: NFTOptions) -> dict[str, float]:
    """μ(l) of each mask; 1 for those of the first layer."""
    layers = run.depths() if options.floor_by == "depth" else run.indices()
    first = min(layers.values())
    return {
        name: 1.0 if layer == first else options.floor * math.exp(-options.floor_decay * (layer - first))
        for name, layer in layers.items()
    }


def _learning_rate(epoch: int, options: NFTOptions) -> float:
    if options.cosine_to is None:
        return options.lr * options.lr_decay ** (epoch // options.lr_decay_epochs)
    return options.cosine_to + (options.lr - options.cosine_to) * cosine(epoch, options.epochs)


def _draw_mixup(shape: tuple[int, ...], generator: Generator, alpha: float) -> Drawn:
    weight, partners = draw_mixup(shape[0], generator, alpha)
    return {"partners": partners, "weight": torch.tensor(weight, dtype=torch.float64)}


def _draw_cutmix(shape: tuple[int, ...], generator: Generator, alpha: float) -> Drawn:
    weight, partners, box = draw_cutmix(shape, generator, alpha)
    torch.rand((), generator=generator)  # whether it is done at all: here always
    return {"partners": partners, "weight": torch.tensor(weight, dtype=torch.float64), "box": box}


_DRAWS = {"mixup": _draw_mixup, "cutmix": _draw_cutmix}


def _augmented(run: MaskRun, batch: Batch, options: NFTOptions) -> augment.Mixed:
    images, labels = run.sample(batch)
    if batch.partners is not None:
        other_labels = labels.index_select(0, batch.partners)
        weight = batch.weight.to(images.dtype)
        if batch.box is not None:
            return augment.Mixed(paste(images, batch.partners, batch.box), labels, other_labels, weight)
        return augment.Mixed(blend(images, batch.partners, weight), labels, other_labels, weight)
    if options.augmentation == "adversarial":
        with run.frozen_masks():
            images = _adversarial(run, images, labels)
    elif options.augmentation != "none":
        images = getattr(augment, options.augmentation)(images, run.generator)
    return augment.Mixed(images, labels, labels, 1.0)


def _adversarial(run: MaskRun, images: Tensor, labels: Tensor) -> Tensor:
    start = run.generator.get_state()

    def compute() -> Tensor:
        perturbed = torch.empty_like(images)
        for rows in run.parts.of(len(images)):
            perturbed[rows] = augment.adversarial(run.logits, images[rows], labels[rows], run.generator)
        return perturbed

    return run.parts.attempt(compute, lambda: run.generator.set_state(start))
