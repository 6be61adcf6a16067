"""What runs a baseline: phase after phase, between which it can be stopped and gone on with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from maskops.purify._checkpoint import Checkpoint
from maskops.purify._loop import OnEpoch, Run
from maskops.purify._options import Preset, settle
from maskops.purify._result import Purification


class Baseline:
    """A paper's loop as phases, as :class:`maskops.purify._algorithm.Algorithm` is, but that each runs by itself.

    model, clean_data: the user's
    preset, options:   where the values of options and setting begin, and the changes to them
    on_epoch:          the user's, or None
    """

    method: ClassVar[str]
    presets: ClassVar[Mapping[str, Preset]]
    optimizers: Sequence[Optimizer]

    def __init__(
        self, model: nn.Module, clean_data: Any, preset: str, on_epoch: OnEpoch | None, options: Mapping[str, Any]
    ) -> None:
        self.on_epoch, self.clean_data = on_epoch, clean_data
        self.options, setting = settle(self.method, self.presets, preset, options)
        self.run = Run(self.method, model, clean_data, setting)
        self.prepare()

    def prepare(self) -> None:
        """Make the models, the optimisers and all else that the phases work on."""
        raise NotImplementedError

    def phases(self) -> Iterator[Callable[[], None]]:
        """The phases in their order. What they hand on to those after them is in :meth:`tensors` or the history."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What the phases change in place, beside the optimisers' states."""
        raise NotImplementedError

    def restored(self) -> None:
        """After these have become those of a checkpoint: what follows from them."""

    def result(self) -> Purification:
        """After the last phase."""
        raise NotImplementedError


def complete(baseline: Baseline, checkpoint: str | os.PathLike | None, resume: bool) -> Purification:
    """Run all phases of a baseline; ``checkpoint`` and ``resume`` are as for :class:`Checkpoint`, or None for none."""
    phases = baseline.phases() if checkpoint is None else Checkpoint(baseline, checkpoint, resume).remaining()
    for phase in phases:
        phase()
    return baseline.result()


def tensors_of(**models: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of models, by names of their own."""
    found: dict[str, Tensor] = {}
    for which, model in models.items():
        found |= {f"buffer {which} {name}": buffer for name, buffer in model.named_buffers()}
        found |= {f"{which} {name}": parameter for name, parameter in model.named_parameters()}
    return found
