"""Fine-pruning: Liu, Dolan-Gavitt & Garg 2018, "Fine-Pruning: Defending Against Backdooring Attacks on DNNs"."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from maskops._state import eval_mode
from maskops.purify._loop import OnEpoch, Purification, Run, cosine
from maskops.purify._options import Preset, choice, number, settle
from maskops.purify._setting import Setting
from maskops.purify._working import PixelModel
from maskops.purify.baselines._trace import activity, last_linear
from maskops.purify.baselines._training import check_training, finish, hits, one_pass, set_lr, sgd, train


@dataclass(frozen=True)
class FinePruningOptions:
    """The hyper-parameters of fine-pruning. The paper leaves the budget to the defender; fine-tuning is that of ``ft``.

    budget:     accuracy on held-out clean images, as a fraction of 1, that pruning may cost
    relative:   the budget is a fraction of the accuracy before
    held_out:   share of the clean images that is held out to measure that
    step:       share of the neurons that is pruned between two measurements, at least one neuron
    lr, momentum, weight_decay: of SGD on all weights, after pruning
    epochs:     passes over the clean images that aren't held out
    batch_size: at most n
    cosine:     lr falls to 0 along a cosine, epoch by epoch
    """

    budget: float = 0.04
    relative: bool = False
    held_out: float = 0.2
    step: float = 0.01
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 125
    batch_size: int = 128
    cosine: bool = False

    def __post_init__(self) -> None:
        for name in ("budget", "held_out", "step"):
            number("fine_pruning", self, name, float, 0, 1)
        check_training("fine_pruning", self)
        for name in ("relative", "cosine"):
            choice("fine_pruning", self, name, (True, False))


_AUGMENTED = Setting(crop="auto", flip=True)

PRESETS = {
    "paper": Preset(FinePruningOptions(), _AUGMENTED),
    "official": Preset(
        FinePruningOptions(budget=0.1, relative=True, epochs=100, batch_size=256, cosine=True), _AUGMENTED
    ),
}
"""``paper``: the paper's procedure. ``official``: BackdoorBench's ``fp.py``, but for its use of the test images and for
the step over the budget, which it keeps."""


@torch.enable_grad()
def fine_pruning(
    model: nn.Module,
    clean_data: Any,
    *,
    preset: str = "paper",
    on_epoch: OnEpoch | None = None,
    **options: Any,
) -> Purification:
    """Prune the neurons that are least active on clean images, as long as the accuracy allows; then fine-tune the rest.

    The neurons are those that the last linear layer reads: the channels of the last convolution where no other linear
    layer lies between the two, the single features otherwise. To prune one is to zero the last layer's weights for it;
    they stay zero while all others are fine-tuned, in train mode.

    model, clean_data, on_epoch: as in :func:`maskops.purify.awm`; ``on_epoch`` measures the fine-tuning
    preset:     ``"paper"`` or ``"official"``: see :data:`PRESETS`
    options:    single fields of :class:`FinePruningOptions` and :class:`maskops.purify.Setting`
    returns:    a :class:`maskops.purify.Purification` without masks; its history has the number of ``pruned neurons``
    errors:     as in :func:`maskops.purify.awm`, and ValueError for a model whose forward calls no nn.Linear
    measured:   as for :func:`ft`: 97.8 / 26, 95.8 / 43, 97.8 / 36, so it fails; with ``batch_size=32`` 97.6 / 14,
                95.6 / 38, 97.4 / 33, and with ``lr=0.02``, too, 96.8 / 11, 95.4 / 27, 97.6 / 11
    source:     Sections 3.1 and 3.3. Deviation: activity is the mean of the absolute activation, the same after a ReLU

    >>> images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> result = fine_pruning(net, (images, labels), epochs=1, budget=1.0, progress=False)
    >>> result.history["pruned neurons"]
    [3.0]
    """
    chosen, setting = settle("fine_pruning", PRESETS, preset, options)
    run = Run("fine_pruning", model, clean_data, setting)
    held_out = run.hold_out(chosen.held_out)
    chosen = replace(chosen, batch_size=min(chosen.batch_size, len(run.images)))
    pruned = run.trainable_copy()
    with run.phase("pruning"), eval_mode(pruned):
        linear, kept = _prune(run, pruned, held_out, chosen)
    optimizer = sgd(pruned, chosen)

    @torch.no_grad()
    def stay_pruned() -> None:
        linear.weight.mul_(kept)

    for epoch in run.epochs(chosen.epochs):
        set_lr(optimizer, chosen.lr * (cosine(epoch, chosen.epochs) if chosen.cosine else 1))
        with run.phase("fine-tuning"):
            train(run, pruned, optimizer, one_pass(run, chosen.batch_size), stay_pruned)
        run.report(on_epoch, epoch, pruned)

    return finish(run, chosen, pruned)


@torch.no_grad()
def _prune(
    run: Run, model: PixelModel, held_out: tuple[Tensor, Tensor], options: FinePruningOptions
) -> tuple[nn.Linear, Tensor]:
    """Prune within the budget; returns the last linear layer and zeros for those of its inputs that are pruned."""
    with run.named_errors():
        linear, size = last_linear(model, run.images[:2])
    per_neuron = activity(model, linear, run.images.split(options.batch_size)).view(-1, size).mean(1)
    order = per_neuron.argsort(stable=True)
    weight, kept = linear.weight.clone(), torch.ones_like(per_neuron)
    before = hits(run, model.network, *held_out)
    allowed = options.budget * (before if options.relative else len(held_out[1]))
    step, count = max(1, round(options.step * len(order))), 0
    while count + step < len(order):
        fewer = kept.index_fill(0, order[: count + step], 0)
        linear.weight.copy_(weight * fewer.repeat_interleave(size))
        if before - hits(run, model.network, *held_out) > allowed + 1e-6:
            break
        kept, count = fewer, count + step
    kept = kept.repeat_interleave(size)
    linear.weight.copy_(weight * kept)
    run.history["pruned neurons"] = [float(count)]
    return linear, kept
