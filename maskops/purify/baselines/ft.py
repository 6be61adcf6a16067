"""Fine-tuning: the plainest defence, and a part of others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from maskops.purify._loop import OnEpoch, Run, cosine
from maskops.purify._options import Auto, Preset, choice, number
from maskops.purify._result import Purification
from maskops.purify._setting import Setting
from maskops.purify.baselines._baseline import Baseline, complete, tensors_of
from maskops.purify.baselines._training import check_training, finish, one_pass, set_lr, sgd, train


@dataclass(frozen=True)
class FTOptions:
    """The hyper-parameters of fine-tuning. The defaults are those of the NFT paper's comparison on CIFAR-10.

    lr, momentum, weight_decay: of SGD on all weights
    epochs, steps: SGD steps are epochs * steps; steps ``"auto"`` is one pass over the clean images in random order,
                   otherwise batches are drawn with replacement
    batch_size:    at most n
    cosine:        lr falls to 0 along a cosine, epoch by epoch
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 125
    steps: int | Auto = "auto"
    batch_size: int = 128
    cosine: bool = False

    def __post_init__(self) -> None:
        check_training("ft", self)
        number("ft", self, "steps", int, 1, auto=True)
        choice("ft", self, "cosine", (True, False))


_AUGMENTED = Setting(crop="auto", flip=True)

PRESETS = {
    "paper": Preset(FTOptions(), _AUGMENTED),
    "anp": Preset(FTOptions(epochs=20, steps=100), _AUGMENTED),
    "official": Preset(FTOptions(epochs=100, batch_size=256, cosine=True), _AUGMENTED),
}
"""``paper``: the NFT paper's supplementary. ``anp``: the ANP paper's 2000 iterations (give ``lr=0.02`` for its other
column). ``official``: BackdoorBench's ``ft.py``."""


@torch.enable_grad()
def ft(
    model: nn.Module,
    clean_data: Any,
    *,
    preset: str = "paper",
    on_epoch: OnEpoch | None = None,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    **options: Any,
) -> Purification:
    """Fine-tune all weights on clean images, in train mode, and hope that the backdoor is forgotten.

        min over θ: E L(f(x; θ), y)

    model, clean_data, on_epoch, checkpoint, resume: as in :func:`maskops.purify.awm`
    preset:     ``"paper"``, ``"anp"`` or ``"official"``: see :data:`PRESETS`
    options:    single fields of :class:`FTOptions` and :class:`maskops.purify.Setting`
    returns:    a :class:`maskops.purify.Purification` without masks
    errors:     as in :func:`maskops.purify.awm`
    measured:   ACC / asr_all in % on the demo's digits, whose backdoors have 100 % (seeds 0 to 2, 100 clean images, no
                flips): 99.0 / 26, 96.6 / 51, 98.6 / 37; with ``batch_size=32``, which takes as many steps as the paper,
                97.8 / 9, 94.8 / 11, 98.0 / 9
    source:     the comparisons of the NFT and ANP papers and BackdoorBench: see :data:`PRESETS`

    >>> images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    >>> result = ft(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), (images, labels), epochs=3, progress=False)
    >>> len(result.history["loss"])
    3
    """
    return complete(FT(model, clean_data, preset, on_epoch, options), checkpoint, resume)


class FT(Baseline):
    """Fine-tuning as an algorithm."""

    method, presets = "ft", PRESETS

    def prepare(self) -> None:
        run, options = self.run, self.options
        self.options = replace(options, batch_size=min(options.batch_size, len(run.images)))
        self.tuned = run.trainable_copy()
        self.optimizers = [sgd(self.tuned, self.options)]

    def phases(self) -> Iterator[Callable[[], None]]:
        run, options = self.run, self.options
        for epoch in run.epochs(options.epochs):
            set_lr(self.optimizers[0], options.lr * (cosine(epoch, options.epochs) if options.cosine else 1))
            yield self.tune
            run.report(self.on_epoch, epoch, self.tuned)

    def tune(self) -> None:
        with self.run.phase("fine-tuning"):
            train(self.run, self.tuned, self.optimizers[0], _batches(self.run, self.options))

    def tensors(self) -> dict[str, Tensor]:
        return tensors_of(tuned=self.tuned)

    def result(self) -> Purification:
        return finish(self.run, self.options, self.tuned)


def _batches(run: Run, options: FTOptions) -> Iterator[Tensor]:
    if options.steps == "auto":
        return one_pass(run, options.batch_size)
    return run.batches(options.steps, options.batch_size)
