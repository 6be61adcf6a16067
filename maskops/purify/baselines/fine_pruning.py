"""Fine-pruning: Liu, Dolan-Gavitt & Garg 2018, "Fine-Pruning: Defending Against Backdooring Attacks on DNNs"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from maskops.purify._loop import OnEpoch, Purification, Run
from maskops.purify._options import Preset, choice, number, settle
from maskops.purify._setting import Setting
from maskops.purify._working import PixelModel
from maskops.purify.baselines._training import (
    accuracy,
    check_training,
    cosine,
    finish,
    one_pass,
    set_lr,
    sgd,
    train,
)


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
    with run.phase("pruning"):
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
    model.eval()
    linear, size = _last_linear(run, model)
    activity = _activity(run, model, linear, options.batch_size).view(-1, size).mean(1)
    order = activity.argsort(stable=True)
    weight, kept = linear.weight.clone(), torch.ones_like(activity)
    before = accuracy(model, *held_out)
    least = before * (1 - options.budget) if options.relative else before - options.budget
    step, count = max(1, round(options.step * len(order))), 0
    while count + step < len(order):
        fewer = kept.clone().index_fill_(0, order[: count + step], 0)
        linear.weight.copy_(weight * fewer.repeat_interleave(size))
        if accuracy(model, *held_out) < least:
            break
        kept, count = fewer, count + step
    kept = kept.repeat_interleave(size)
    linear.weight.copy_(weight * kept)
    run.history["pruned neurons"] = [float(count)]
    model.train()
    return linear, kept


def _last_linear(run: Run, model: PixelModel) -> tuple[nn.Linear, int]:
    """The last linear layer that a forward calls, and how many of its inputs belong to one neuron."""
    called: list[nn.Module] = []
    channels: list[int] = []

    def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
        called.append(module)
        channels.append(output.shape[1])

    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    with _hooked([module for module in model.modules() if isinstance(module, kinds)], record):
        model(run.images[:2].clone())
    linears = [index for index, module in enumerate(called) if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError("fine_pruning: the model's forward calls no nn.Linear, of whose inputs some would be pruned")
    linear, before = called[linears[-1]], linears[-1] - 1
    follows = before >= 0 and not isinstance(called[before], nn.Linear)
    size, rest = divmod(linear.in_features, channels[before]) if follows else (1, 0)
    return linear, size if size and not rest else 1


def _activity(run: Run, model: PixelModel, linear: nn.Linear, batch_size: int) -> Tensor:
    """The mean absolute value of each input of a linear layer over the clean images."""
    total = torch.zeros(linear.in_features, dtype=linear.weight.dtype, device=run.device)

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        total.add_(inputs[0].abs().flatten(0, -2).mean(0), alpha=len(output))

    with _hooked([linear], add):
        for images in run.images.split(batch_size):
            model(images.clone())
    return total / len(run.images)


@contextmanager
def _hooked(modules: list[nn.Module], hook: Any) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
