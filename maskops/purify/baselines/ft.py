"""Fine-tuning: the plainest defence, and a part of others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from maskops.purify._loop import OnEpoch, Purification, Run, cosine
from maskops.purify._options import Auto, Preset, choice, number, settle
from maskops.purify._setting import Setting
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
    **options: Any,
) -> Purification:
    """Fine-tune all weights on clean images, in train mode, and hope that the backdoor is forgotten.

        min over θ: E L(f(x; θ), y)

    model, clean_data, on_epoch: as in :func:`maskops.purify.awm`
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
    chosen, setting = settle("ft", PRESETS, preset, options)
    run = Run("ft", model, clean_data, setting)
    chosen = replace(chosen, batch_size=min(chosen.batch_size, len(run.images)))
    tuned = run.trainable_copy()
    optimizer = sgd(tuned, chosen)

    for epoch in run.epochs(chosen.epochs):
        set_lr(optimizer, chosen.lr * (cosine(epoch, chosen.epochs) if chosen.cosine else 1))
        with run.phase("fine-tuning"):
            train(run, tuned, optimizer, _batches(run, chosen))
        run.report(on_epoch, epoch, tuned)

    return finish(run, chosen, tuned)


def _batches(run: Run, options: FTOptions) -> Iterator[Tensor]:
    if options.steps == "auto":
        return one_pass(run, options.batch_size)
    return run.batches(options.steps, options.batch_size)
