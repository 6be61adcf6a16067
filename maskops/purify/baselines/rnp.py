"""RNP: Li et al. 2023, "Reconstructive Neuron Pruning for Backdoor Defense"."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskops.optim import MaskSGD
from maskops.purify._loop import OnEpoch
from maskops.purify._masks import MaskRun
from maskops.purify._options import Auto, Preset, choice, number, optional
from maskops.purify._pruning import apply_masks, kept, threshold_within
from maskops.purify._result import Purification
from maskops.purify._setting import MaskSetting
from maskops.purify.baselines._baseline import Baseline, complete, tensors_of
from maskops.purify.baselines._training import hits, one_pass, set_lr, sgd


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
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    **options: Any,
) -> Purification:
    """Purify a model by pruning the neurons that aren't needed to relearn what was unlearned.

        max over θ: E L(f(x; θ), y);  then min over m in [0, 1]: α·E L(f(x; m⊙θ'), y)

    and then every neuron with a small m is cut out of the original weights; biases stay. A neuron is what it is for
    :func:`maskops.purify.anp`. Both models run in train mode.

    model, clean_data, on_epoch, checkpoint, resume: as in :func:`maskops.purify.awm`; ``on_epoch`` measures the
                unlearned model with masks
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
    return complete(RNP(model, clean_data, preset, on_epoch, options), checkpoint, resume)


class RNP(Baseline):
    """Unlearning, recovery, pruning."""

    method, presets = "rnp", PRESETS

    def prepare(self) -> None:
        run, options = self.run, self.options
        choice("rnp", run.setting, "folded", (True,))
        self.held_out = run.hold_out(options.held_out) if options.threshold == "auto" else None
        self.options = replace(options, batch_size=min(options.batch_size, len(run.images)))
        self.unlearned = run.trainable_copy()
        self.accuracy = torch.full((), 2.0, device=run.device)  # more than any: there is one pass at least
        self.masked: MaskRun | None = None
        self.optimizers = [sgd(self.unlearned, replace(self.options, lr=options.unlearn_lr))]

    def phases(self) -> Iterator[Callable[[], None]]:
        run, options, (ascent,) = self.run, self.options, self.optimizers
        for epoch in run.epochs(options.unlearn_epochs):
            set_lr(ascent, options.unlearn_lr * options.lr_decay ** (epoch // options.lr_decay_epochs))
            yield self.unlearn

        ascent.state.clear()  # memory that nobody needs any more
        how = {"batch_statistics": True, "within": True}
        self.masked = MaskRun("rnp", self.unlearned.network, self.clean_data, run.setting, **how)
        masks = MaskSGD(self.masked.arena, lr=options.lr, momentum=options.momentum)
        self.optimizers = [ascent, masks]
        for epoch in run.epochs(options.epochs):
            yield self.recover
            run.report(self.on_epoch, epoch, self.masked.model)

    def unlearn(self) -> None:
        """Climb the cross entropy, unless the accuracy has come down to ``least_accuracy``."""
        run, options, model, optimizer = self.run, self.options, self.unlearned, self.optimizers[0]
        if self.accuracy <= options.least_accuracy:
            return
        seen, right = 0, torch.zeros((), device=run.device)
        with run.phase("unlearn"):
            for batch in one_pass(run, options.batch_size):
                images, labels = run.sample(batch)
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
                optimizer.zero_grad()
                (-loss).backward()
                if options.max_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), options.max_norm)
                optimizer.step()
                seen += len(batch)
                right += (logits.argmax(1) == labels).sum()
                run.note("unlearning loss", loss)
        self.accuracy.copy_(right / seen)

    def recover(self) -> None:
        run, options, masks = self.run, self.options, self.optimizers[1]
        with run.phase("recover"):
            for batch in one_pass(run, options.batch_size):
                losses = self.masked.descend((options.alpha, *run.sample(batch)))
                masks.step()
                run.note("recovery loss", losses[0])

    def tensors(self) -> dict[str, Tensor]:
        masks = {} if self.masked is None else self.masked.tensors()
        return {**tensors_of(unlearned=self.unlearned), "accuracy": self.accuracy, **masks}

    def restored(self) -> None:
        if self.masked is not None:
            self.masked.arena.refresh()

    def result(self) -> Purification:
        run, options = self.run, self.options
        original = copy.deepcopy(run.original).to(run.device)
        scores = self.masked.finish(options).masks
        if self.held_out is not None:
            images, labels = self.held_out
            threshold = threshold_within(
                options.budget,
                scores,
                lambda masks: hits(run, apply_masks(original, masks), images, labels),
                len(labels),
            )
            options = replace(options, threshold=threshold)
        pruned = kept(scores, threshold=options.threshold)
        return run.finish(options, apply_masks(original, pruned), masks=pruned, scores=scores)
