"""Fine-pruning: Liu, Dolan-Gavitt & Garg 2018, "Fine-Pruning: Defending Against Backdooring Attacks on DNNs"."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from maskops._state import eval_mode, seeded_layers
from maskops.purify._loop import OnEpoch, cosine
from maskops.purify._options import Preset, choice, number
from maskops.purify._result import Purification
from maskops.purify._setting import Setting
from maskops.purify.baselines._baseline import Baseline, complete, tensors_of
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
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    **options: Any,
) -> Purification:
    """Prune the neurons that are least active on clean images, as long as the accuracy allows; then fine-tune the rest.

    The neurons are those that the last linear layer reads: the channels of the last convolution where no other linear
    layer lies between the two, the single features otherwise. To prune one is to zero the last layer's weights for it;
    they stay zero while all others are fine-tuned, in train mode.

    model, clean_data, on_epoch, checkpoint, resume: as in :func:`maskops.purify.awm`; ``on_epoch`` measures the
                fine-tuning
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
    return complete(FinePruning(model, clean_data, preset, on_epoch, options), checkpoint, resume)


class FinePruning(Baseline):
    """Pruning, then fine-tuning."""

    method, presets = "fine_pruning", PRESETS

    def prepare(self) -> None:
        run, options = self.run, self.options
        self.held_out = run.hold_out(options.held_out)
        self.options = replace(options, batch_size=min(options.batch_size, len(run.images)))
        self.pruned = run.trainable_copy()
        with run.named_errors(), eval_mode(self.pruned), seeded_layers(run.setting.seed, run.device):
            self.linear, self.inputs_per_neuron = last_linear(self.pruned, run.images[:2])
        self.kept = torch.ones_like(self.linear.weight[0], requires_grad=False)
        self.optimizers = [sgd(self.pruned, self.options)]

    def phases(self) -> Iterator[Callable[[], None]]:
        run, options = self.run, self.options
        yield self.prune
        for epoch in run.epochs(options.epochs):
            set_lr(self.optimizers[0], options.lr * (cosine(epoch, options.epochs) if options.cosine else 1))
            yield self.tune
            run.report(self.on_epoch, epoch, self.pruned)

    @torch.no_grad()
    def prune(self) -> None:
        """Prune within the budget: the last linear layer's weights for those of its inputs are zero from now on."""
        run, options, linear, size = self.run, self.options, self.linear, self.inputs_per_neuron
        with run.phase("pruning"), eval_mode(self.pruned):
            images = run.images.split(options.batch_size)
            order = activity(self.pruned, linear, images).view(-1, size).mean(1).argsort(stable=True)
            weight, kept = linear.weight.clone(), torch.ones(len(order), dtype=self.kept.dtype, device=run.device)
            before = hits(run, self.pruned.network, *self.held_out)
            allowed = options.budget * (before if options.relative else len(self.held_out[1]))
            step, count = max(1, round(options.step * len(order))), 0
            while count + step < len(order):
                fewer = kept.index_fill(0, order[: count + step], 0)
                linear.weight.copy_(weight * fewer.repeat_interleave(size))
                if before - hits(run, self.pruned.network, *self.held_out) > allowed + 1e-6:
                    break
                kept, count = fewer, count + step
            self.kept.copy_(kept.repeat_interleave(size))
            linear.weight.copy_(weight * self.kept)
        run.history["pruned neurons"] = [float(count)]

    def tune(self) -> None:
        run, options = self.run, self.options
        with run.phase("fine-tuning"):
            batches = one_pass(run, options.batch_size)
            train(run, self.pruned, self.optimizers[0], batches, self.stay_pruned)

    @torch.no_grad()
    def stay_pruned(self) -> None:
        self.linear.weight.mul_(self.kept)

    def tensors(self) -> dict[str, Tensor]:
        return {**tensors_of(pruned=self.pruned), "kept": self.kept}

    def result(self) -> Purification:
        return finish(self.run, self.options, self.pruned)
