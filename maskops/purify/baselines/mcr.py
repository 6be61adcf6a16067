"""MCR: Zhao et al. 2020, "Bridging Mode Connectivity in Loss Landscapes and Adversarial Robustness"."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import Parameter

from maskops.purify._loop import OnEpoch
from maskops.purify._options import Preset, number
from maskops.purify._result import Purification
from maskops.purify._setting import Setting
from maskops.purify.baselines._baseline import Baseline, complete, tensors_of
from maskops.purify.baselines._training import (
    check_training,
    finish,
    measure_statistics,
    one_pass,
    sgd,
    train,
)

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class MCROptions:
    """The hyper-parameters of mode connectivity repair. The learning rates are those of ``ft``.

    t:            the place on the curve that is returned: 0 is the given model, 1 its fine-tuned copy
    end_epochs:   passes over the clean images that fine-tune the copy
    end_lr:       of SGD on the copy's weights
    epochs, lr:   the same for the curve's inner point
    momentum, weight_decay: of both; on the curve the decay is of the weights at t
    batch_size:   at most n
    """

    t: float = 0.1
    end_epochs: int = 100
    end_lr: float = 0.01
    epochs: int = 100
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128

    def __post_init__(self) -> None:
        number("mcr", self, "t", float, 0, 1)
        number("mcr", self, "end_epochs", int, 1)
        number("mcr", self, "end_lr", float, 0)
        check_training("mcr", self)


_AUGMENTED = Setting(crop="auto", flip=True)

PRESETS = {
    "paper": Preset(MCROptions(), _AUGMENTED),
    "anp": Preset(MCROptions(t=0.3), _AUGMENTED),
    "official": Preset(MCROptions(lr=3e-5), _AUGMENTED),
}
"""``paper``: 100 epochs, as in the NFT paper's comparison. ``anp``: the t of the ANP paper's. ``official``: the
learning rate of BackdoorBench's ``mcr.py``, without the gradients that it never sets to zero."""


@torch.enable_grad()
def mcr(
    model: nn.Module,
    clean_data: Any,
    *,
    preset: str = "paper",
    on_epoch: OnEpoch | None = None,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    **options: Any,
) -> Purification:
    """Walk from the model towards its fine-tuned copy, along a curve of low loss on clean images.

        min over θ: E over t in [0, 1]: E L(f(x; φ(t)), y),  φ(t) = (1 - t)² θ₀ + 2 t (1 - t) θ + t² θ₁

    θ₀ are the given weights, θ₁ the fine-tuned ones. All models run in train mode; the running statistics of the one
    that is returned are measured on the clean images.

    model, clean_data, on_epoch, checkpoint, resume: as in :func:`maskops.purify.awm`; ``on_epoch`` measures the
                model at ``t``
    preset:     ``"paper"``, ``"anp"`` or ``"official"``: see :data:`PRESETS`
    options:    single fields of :class:`MCROptions` and :class:`maskops.purify.Setting`
    returns:    a :class:`maskops.purify.Purification` without masks
    errors:     as in :func:`maskops.purify.awm`
    measured:   as for :func:`ft`: 99.0 / 99, 98.8 / 100, 98.6 / 99, so it fails; with ``batch_size=32`` at t 0.3
                96.2 / 12, 96.6 / 26, 98.0 / 32, at t 0.5 94.6 / 9, 94.8 / 15, 97.6 / 14, at t 0.7 95.6 / 8, 94.6 / 13,
                97.4 / 12: clean images alone don't say which t is enough
    source:     Section 3.1, the quadratic Bezier curve of Garipov et al. 2018. Deviation: the defender of one model has
                no second one to connect it with, so θ₁ is its fine-tuned copy, as in BackdoorBench

    >>> images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    >>> sorted(mcr(net, (images, labels), epochs=2, end_epochs=2, progress=False).history)
    ['curve loss', 'end loss']
    """
    return complete(MCR(model, clean_data, preset, on_epoch, options), checkpoint, resume)


class MCR(Baseline):
    """Fine-tuning of one end of the curve, then of its inner point."""

    method, presets = "mcr", PRESETS

    def prepare(self) -> None:
        run, options = self.run, self.options
        self.options = options = replace(options, batch_size=min(options.batch_size, len(run.images)))
        self.curve, self.end = run.trainable_copy(), run.trainable_copy()
        self.first = {name: weight.clone() for name, weight in _weights(self.curve).items()}  # these will be at t
        self.last = _weights(self.end)
        self.inner = {name: Parameter(weight.clone()) for name, weight in self.first.items()}
        of_inner = torch.optim.SGD(self.inner.values(), lr=options.lr, momentum=options.momentum)
        self.optimizers = [sgd(self.end, replace(options, lr=options.end_lr)), of_inner]

    def phases(self) -> Iterator[Callable[[], None]]:
        run, options = self.run, self.options
        for _ in run.epochs(options.end_epochs):
            yield self.tune_end

        self.optimizers[0].state.clear()  # memory that nobody needs any more
        with torch.no_grad():
            for name, weight in self.inner.items():
                weight.copy_((self.first[name] + self.last[name]) / 2)
        for epoch in run.epochs(options.epochs):
            yield self.tune_curve
            if self.on_epoch is not None and not run.replaying:
                self.settle()
                run.report(self.on_epoch, epoch, self.curve)

        yield self.measure

    def tune_end(self) -> None:
        run = self.run
        with run.phase("end"):
            train(run, self.end, self.optimizers[0], one_pass(run, self.options.batch_size), note="end loss")

    def tune_curve(self) -> None:
        run, options, optimizer = self.run, self.options, self.optimizers[1]
        with run.phase("curve"):
            for batch in one_pass(run, options.batch_size):
                images, labels = run.sample(batch)
                weights = self.at(float(torch.rand((), generator=run.generator)))
                loss = F.cross_entropy(functional_call(self.curve, weights, (images,)), labels)
                decay = sum(weight.square().sum() for weight in weights.values()) * options.weight_decay / 2
                optimizer.zero_grad()
                (loss + decay).backward()
                optimizer.step()
                run.note("curve loss", loss)

    def measure(self) -> None:
        with self.run.phase("statistics"):
            self.settle()

    def at(self, t: float) -> Weights:
        """φ(t), a quadratic Bezier curve."""
        first, inner, last = self.first, self.inner, self.last
        return {name: (1 - t) ** 2 * first[name] + 2 * t * (1 - t) * inner[name] + t**2 * last[name] for name in first}

    @torch.no_grad()
    def settle(self) -> None:
        """Make the model that of the place that is returned."""
        weights = self.at(self.options.t)
        for name, parameter in self.curve.named_parameters():
            parameter.copy_(weights[name])
        measure_statistics(self.curve, self.run.images, self.options.batch_size)

    def tensors(self) -> dict[str, Tensor]:
        inner = {f"inner {name}": weight for name, weight in self.inner.items()}
        return {**tensors_of(curve=self.curve, end=self.end), **inner}

    def result(self) -> Purification:
        return finish(self.run, self.options, self.curve)


def _weights(model: nn.Module) -> Weights:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
