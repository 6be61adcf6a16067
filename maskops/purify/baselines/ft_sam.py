"""FT-SAM: Zhu et al. 2023, "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization"."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maskops.purify._loop import OnEpoch, Run, cosine
from maskops.purify._options import Preset, number, optional
from maskops.purify._result import Purification
from maskops.purify._setting import Setting
from maskops.purify._working import PixelModel
from maskops.purify.baselines._baseline import Baseline, complete, tensors_of
from maskops.purify.baselines._training import check_training, finish, one_pass, set_lr, sgd


@dataclass(frozen=True)
class FTSAMOptions:
    """The hyper-parameters of FT-SAM. The defaults are the paper's, with η of adaptive SAM.

    rho:          ρ, radius of the ascent step
    eta:          η, what a weight of zero counts as in that radius
    label_smoothing: share of each label that is spread over all classes
    lr, momentum, weight_decay: of SGD on all weights
    epochs:       passes over the clean images
    batch_size:   at most n
    cosine_steps: lr falls to 0 along a cosine over that many steps, then rises again; None: once over all epochs
    """

    rho: float = 2.0
    eta: float = 0.01
    label_smoothing: float = 0.1
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 100
    batch_size: int = 256
    cosine_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("rho", "eta"):
            number("ft_sam", self, name, float, 0)
        number("ft_sam", self, "label_smoothing", float, 0, 1)
        check_training("ft_sam", self)
        optional("ft_sam", self, "cosine_steps", int, 1)


_AUGMENTED = Setting(crop="auto", flip=True)

PRESETS = {
    "paper": Preset(FTSAMOptions(), _AUGMENTED),
    "official": Preset(FTSAMOptions(eta=0.0, cosine_steps=100), _AUGMENTED),
}
"""``paper``: Section 4. ``official``: BackdoorBench's ``ft-sam.py``, whose schedule counts steps for epochs."""


@torch.enable_grad()
def ft_sam(
    model: nn.Module,
    clean_data: Any,
    *,
    preset: str = "paper",
    on_epoch: OnEpoch | None = None,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    **options: Any,
) -> Purification:
    """Fine-tune all weights against the worst weights nearby, in a neighbourhood that scales with each weight.

        min over θ: max over ‖T⁻¹ε‖₂ <= ρ: E L(f(x; θ + ε), y),  T = diag(|θ| + η),  ε = ρ T² g / ‖T g‖₂,  g = dL/dθ

    The model runs in train mode; its running statistics follow the clean weights alone.

    model, clean_data, on_epoch, checkpoint, resume: as in :func:`maskops.purify.awm`
    preset:     ``"paper"`` or ``"official"``: see :data:`PRESETS`
    options:    single fields of :class:`FTSAMOptions` and :class:`maskops.purify.Setting`
    returns:    a :class:`maskops.purify.Purification` without masks
    errors:     as in :func:`maskops.purify.awm`
    measured:   as for :func:`ft`: 98.8 / 12, 95.2 / 32, 98.8 / 26; with ``batch_size=32`` 98.6 / 10, 95.6 / 12,
                96.6 / 12
    source:     the paper's objective; the ascent step and η are those of adaptive SAM (Kwon et al. 2021)

    >>> images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    >>> sorted(ft_sam(net, (images, labels), epochs=2, progress=False).history)
    ['loss', 'perturbed loss']
    """
    return complete(FTSAM(model, clean_data, preset, on_epoch, options), checkpoint, resume)


class FTSAM(Baseline):
    """The problem above as an algorithm."""

    method, presets = "ft_sam", PRESETS

    def prepare(self) -> None:
        run, options = self.run, self.options
        self.options = replace(options, batch_size=min(options.batch_size, len(run.images)))
        self.tuned = run.trainable_copy()
        self.optimizers = [sgd(self.tuned, self.options)]
        self.steps = torch.zeros((), dtype=torch.int64)

    def phases(self) -> Iterator[Callable[[], None]]:
        for epoch in self.run.epochs(self.options.epochs):
            yield partial(self.tune, epoch)
            self.run.report(self.on_epoch, epoch, self.tuned)

    def tune(self, epoch: int) -> None:
        run, options, (optimizer,) = self.run, self.options, self.optimizers
        with run.phase("fine-tuning"):
            for batch in one_pass(run, options.batch_size):
                once = options.cosine_steps is None
                at = (epoch, options.epochs) if once else (int(self.steps), options.cosine_steps)
                set_lr(optimizer, options.lr * cosine(*at))
                _step(run, self.tuned, optimizer, batch, options)
                self.steps += 1

    def tensors(self) -> dict[str, Tensor]:
        return {**tensors_of(tuned=self.tuned), "steps": self.steps}

    def result(self) -> Purification:
        return finish(self.run, self.options, self.tuned)


def _step(run: Run, model: PixelModel, optimizer: torch.optim.SGD, batch: Tensor, options: FTSAMOptions) -> None:
    images, labels = run.sample(batch)
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(images), labels, label_smoothing=options.label_smoothing)
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        scales = [parameter.abs() + options.eta for parameter in parameters]
        norm = torch.stack([(scale * g).norm() for scale, g in zip(scales, gradients, strict=True)]).norm()
        for parameter, scale, gradient in zip(parameters, scales, gradients, strict=True):
            parameter.add_(options.rho * scale.square() * gradient / (norm + 1e-12))
    with _kept_statistics(model):
        perturbed = F.cross_entropy(model(images), labels, label_smoothing=options.label_smoothing)
    optimizer.zero_grad()
    perturbed.backward()
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    optimizer.step()
    run.note("loss", loss)
    run.note("perturbed loss", perturbed)


@contextmanager
def _kept_statistics(model: nn.Module) -> Iterator[None]:
    """Within, batch norms in train mode leave their running statistics alone."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
