"""NAD: Li et al. 2021, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks"."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskops.purify._loop import OnEpoch
from maskops.purify._options import Preset, number
from maskops.purify._result import Purification
from maskops.purify._setting import Setting
from maskops.purify.baselines._baseline import Baseline, complete, tensors_of
from maskops.purify.baselines._trace import attention, check_maps
from maskops.purify.baselines._training import check_training, finish, one_pass, set_lr, sgd, train

BETAS = (500.0, 1000.0, 1000.0)


@dataclass(frozen=True)
class NADOptions:
    """The hyper-parameters of NAD. The defaults are the paper's, with the weights that BackdoorBench uses.

    betas:        β, weights of the attention losses at the last resolutions of the network, the last one last; None is
                  500, 1000, 1000
    power:        p, of the activations in an attention map
    teacher_epochs: passes over the clean images that fine-tune the teacher
    epochs:       passes that distil it into the student
    lr, momentum, weight_decay: of SGD on all weights, of both
    lr_decay:     factor on lr, once every ``lr_decay_epochs`` epochs
    least_lr:     what lr doesn't fall below
    batch_size:   at most n
    """

    betas: Sequence[float] | None = None
    power: float = 2.0
    teacher_epochs: int = 10
    epochs: int = 10
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    lr_decay: float = 0.1
    lr_decay_epochs: int = 2
    least_lr: float = 0.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_training("nad", self)
        for name in ("lr_decay", "least_lr"):
            number("nad", self, name, float, 0)
        number("nad", self, "power", float, 1)
        for name in ("teacher_epochs", "lr_decay_epochs"):
            number("nad", self, name, int, 1)
        betas = BETAS if self.betas is None else self.betas
        try:
            betas = tuple(float(beta) for beta in betas)
        except (TypeError, ValueError):
            betas = ()
        if not betas or not all(0 <= beta < float("inf") for beta in betas):
            raise ValueError(f"nad: betas must be numbers of at least 0, one per resolution; got {self.betas!r}")
        object.__setattr__(self, "betas", betas)


_AUGMENTED = Setting(crop="auto", flip=True)

PRESETS = {
    "paper": Preset(NADOptions(), _AUGMENTED),
    "official": Preset(NADOptions(betas=(0, 0, 5000), epochs=20, least_lr=0.01), _AUGMENTED),
}
"""``paper``: Section 4.1, with the weights that BackdoorBench uses. ``official``: those of the published ``main.py``,
which is given its teacher and has Nesterov's momentum."""


@torch.enable_grad()
def nad(
    model: nn.Module,
    clean_data: Any,
    *,
    preset: str = "paper",
    on_epoch: OnEpoch | None = None,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    **options: Any,
) -> Purification:
    """Fine-tune a copy of the model, then the model itself with that copy's attention as the example.

        min over θ: E L(f(x; θ), y) + Σ over l: β_l·mean((A_l(x; θ) - A_l(x; teacher))²),  A = Σ_c|F_c|ᵖ / ‖Σ_c|F_c|ᵖ‖₂

    F_l are the last feature maps that the network computes at each of its last resolutions of more than one pixel.

    model, clean_data, on_epoch, checkpoint, resume: as in :func:`maskops.purify.awm`; ``on_epoch`` measures the student
    preset:     ``"paper"`` or ``"official"``: see :data:`PRESETS`
    options:    single fields of :class:`NADOptions` and :class:`maskops.purify.Setting`
    returns:    a :class:`maskops.purify.Purification` without masks
    errors:     as in :func:`maskops.purify.awm`, and ValueError for a model whose last maps are tokens
    measured:   as for :func:`ft`: it destroys the network, ACC 10 to 12, for β is meant for larger maps; with
                ``betas=(30, 60, 60)``, as maps here have 1/16 of the pixels, batches of 16, 60 epochs each, ``lr=0.02``
                and ``lr_decay_epochs=12`` 95.2 / 9, 93.6 / 13, 95.8 / 13
    source:     Eqs. 2 to 4, attention of the sum. Deviations: no Cutout; where the paper takes the ends of residual
                stages, here the ends of resolutions, which any network has

    >>> images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> sorted(nad(net, (images, labels), progress=False).history)
    ['attention loss', 'loss', 'teacher loss']
    """
    return complete(NAD(model, clean_data, preset, on_epoch, options), checkpoint, resume)


class NAD(Baseline):
    """Fine-tuning of the teacher, then distillation into the student."""

    method, presets = "nad", PRESETS

    def prepare(self) -> None:
        run, options = self.run, self.options
        self.options = replace(options, batch_size=min(options.batch_size, len(run.images)))
        self.teacher, self.student = run.trainable_copy(), run.trainable_copy()
        with run.named_errors():
            check_maps(self.student, run.images[:2])
        self.optimizers = [sgd(model, self.options) for model in (self.teacher, self.student)]

    def phases(self) -> Iterator[Callable[[], None]]:
        run, options, (of_teacher, of_student) = self.run, self.options, self.optimizers
        for epoch in run.epochs(options.teacher_epochs):
            set_lr(of_teacher, _learning_rate(epoch, options))
            yield self.teach

        of_teacher.state.clear()  # memory that nobody needs any more
        self.teacher.eval()
        for epoch in run.epochs(options.epochs):
            set_lr(of_student, _learning_rate(epoch, options))
            yield self.distil
            run.report(self.on_epoch, epoch, self.student)

    def teach(self) -> None:
        run = self.run
        with run.phase("teacher"):
            batches = one_pass(run, self.options.batch_size)
            train(run, self.teacher, self.optimizers[0], batches, note="teacher loss")

    def distil(self) -> None:
        run, options, optimizer = self.run, self.options, self.optimizers[1]
        count = len(options.betas)
        with run.phase("distillation"):
            for batch in one_pass(run, options.batch_size):
                images, labels = run.sample(batch)
                with torch.no_grad():
                    _, taught = attention(self.teacher, images, count, options.power)
                logits, own = attention(self.student, images, count, options.power)
                loss = F.cross_entropy(logits, labels)
                weights = options.betas[-len(own) :]
                distance = sum(b * F.mse_loss(a, t) for b, a, t in zip(weights, own, taught, strict=True))
                optimizer.zero_grad()
                (loss + distance).backward()
                optimizer.step()
                run.note("loss", loss)
                run.note("attention loss", distance)

    def tensors(self) -> dict[str, Tensor]:
        return tensors_of(teacher=self.teacher, student=self.student)

    def result(self) -> Purification:
        return finish(self.run, self.options, self.student)


def _learning_rate(epoch: int, options: NADOptions) -> float:
    return max(options.lr * options.lr_decay ** (epoch // options.lr_decay_epochs), options.least_lr)
