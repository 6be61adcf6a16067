"""RNP: Li et al. 2023, "Reconstructive Neuron Pruning for Backdoor Defense"."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from maskops.optim import MaskSGD
from maskops.purify._loop import OnEpoch, Purification, Run
from maskops.purify._masks import MaskRun
from maskops.purify._options import Auto, Preset, choice, number, optional, settle
from maskops.purify._pruning import apply_masks, kept, threshold_within
from maskops.purify._setting import MaskSetting
from maskops.purify.baselines._training import hits, one_pass, unlearn


@dataclass(frozen=True)
class RNPOptions:
    """The hyper-parameters of RNP. The defaults are the published code's; the threshold, which it sweeps, is chosen.

    unlearn_epochs, unlearn_lr: passes of gradient ascent on all weights at most, and their learning rate
    lr_decay:     factor on unlearn_lr, once every ``lr_decay_epochs`` passes
    least_accuracy: a pass whose accuracy is at most this is the last
    max_norm, weight_decay: of the ascent's gradient, None for any, and of its weights
    epochs:       passes over the clean images in which the masks recover what was unlearned
    lr:           of SGD on the masks
    alpha:        factor on the masks' loss
    momentum:     of both
    batch_size:   at most n
    threshold:    neurons whose mask is at most this are pruned, none at -1; ``"auto"``: the last of 0, 0.05, …, 0.95
                  before the accuracy on clean images, held out from everything before, falls by more than ``budget``
    budget:       accuracy, as a fraction of 1, that ``threshold="auto"`` may cost
    held_out:     share of the clean images that ``threshold="auto"`` holds out
    """

    unlearn_epochs: int = 20
    unlearn_lr: float = 0.01
    lr_decay: float = 0.1
    lr_decay_epochs: int = 10
    least_accuracy: float = 0.2
    max_norm: float | None = 20.0
    weight_decay: float = 5e-4
    epochs: int = 20
    lr: float = 0.2
    alpha: float = 0.2
    momentum: float = 0.9
    batch_size: int = 128
    threshold: float | Auto = "auto"
    budget: float = 0.02
    held_out: float = 0.2

    def __post_init__(self) -> None:
        for name in ("unlearn_epochs", "lr_decay_epochs", "epochs", "batch_size"):
            number("rnp", self, name, int, 1)
        for name in ("unlearn_lr", "lr_decay", "weight_decay", "lr", "alpha"):
            number("rnp", self, name, float, 0)
        for name in ("least_accuracy", "momentum", "budget", "held_out"):
            number("rnp", self, name, float, 0, 1)
        number("rnp", self, "threshold", float, -1, 1, auto=True)
        optional("rnp", self, "max_norm", float, 0)


_NEURONS = MaskSetting(layers="auto", granularity="neuron", crop="auto", flip=True)

PRESETS = {
    "paper": Preset(RNPOptions(), _NEURONS),
    "official": Preset(RNPOptions(unlearn_epochs=21, max_norm=None, threshold=0.7), _NEURONS),
}
"""``paper``: the method as it is meant. ``official``: the published ``main.py``, which clips gradients before there are
any, with the threshold that BackdoorBench fixes; the published code chooses none."""


@torch.enable_grad()
def rnp(
    model: nn.Module,
    clean_data: Any,
    *,
    preset: str = "paper",
    on_epoch: OnEpoch | None = None,
    **options: Any,
) -> Purification:
    """Purify a model by pruning the neurons that aren't needed to relearn what was unlearned.

        max over θ: E L(f(x; θ), y);  then min over m in [0, 1]: α·E L(f(x; m⊙θ'), y)

    and then every neuron with a small m is cut out of the original weights; biases stay. A neuron is what it is for
    :func:`maskops.purify.anp`. Both models run in train mode.

    model, clean_data, on_epoch: as in :func:`maskops.purify.awm`; ``on_epoch`` measures the unlearned model with masks
    preset:     ``"paper"`` or ``"official"``: see :data:`PRESETS`
    options:    single fields of :class:`RNPOptions` and :class:`maskops.purify.MaskSetting`
    returns:    a :class:`maskops.purify.Purification`; ``.masks`` are zeros and ones, ``.scores`` the masks as learned,
                from which :func:`maskops.purify.prune` makes models with more or fewer neurons
    errors:     as in :func:`maskops.purify.awm`
    measured:   as for :func:`ft`: it prunes nothing, because the masks can't recover what was unlearned; with
                ``unlearn_lr=0.001`` they can, and it is 95.6 / 20, 95.0 / 64, 95.4 / 64, so it fails
    source:     Section 3. Deviation: a model that keeps its accuracy through all passes is taken as it then is

    >>> images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> result = rnp(net, (images, labels), epochs=1, threshold=0.0, progress=False)
    >>> result.masks["1.neuron_mask"].sum().item()
    4.0
    """
    chosen, setting = settle("rnp", PRESETS, preset, options)
    choice("rnp", setting, "folded", (True,))
    run = Run("rnp", model, clean_data, setting)
    held_out = run.hold_out(chosen.held_out) if chosen.threshold == "auto" else None
    chosen = replace(chosen, batch_size=min(chosen.batch_size, len(run.images)))
    unlearned = run.trainable_copy()
    unlearn(run, unlearned, chosen)

    masked = MaskRun("rnp", unlearned.network, clean_data, setting, batch_statistics=True, within=True)
    masks = MaskSGD(masked.arena, lr=chosen.lr, momentum=chosen.momentum)
    for epoch in run.epochs(chosen.epochs):
        with run.phase("recover"):
            for batch in one_pass(run, chosen.batch_size):
                losses = masked.descend((chosen.alpha, *run.sample(batch)))
                masks.step()
                run.note("recovery loss", losses[0])
        run.report(on_epoch, epoch, masked.model)

    original = copy.deepcopy(model).to(run.device)
    scores = masked.finish(chosen).masks
    if held_out is not None:
        threshold = threshold_within(
            chosen.budget, scores, lambda masks: hits(run, apply_masks(original, masks), *held_out), len(held_out[1])
        )
        chosen = replace(chosen, threshold=threshold)
    pruned = kept(scores, threshold=chosen.threshold)
    return run.finish(chosen, apply_masks(original, pruned), masks=pruned, scores=scores)
