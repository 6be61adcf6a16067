"""What a purification ends with: its result, or the error of a loss that is no number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


class NonFiniteError(RuntimeError):
    """A loss was NaN or infinite; the message says in which phase and where it began. The user's model is as it was."""


@dataclass(frozen=True)
class Purification:
    """What a purification returns.

    model:   the purified model, of the user's class and in the user's mode (train or eval): plain layers with the masks
             folded in, or masked layers if that was asked for. It shares no tensor with the user's
    masks:   name -> mask on the CPU, such as ``"conv1.mask"``; empty for methods that change weights otherwise
    trigger: the last trigger that an inner maximisation found, (1, C, H, W) in pixel units; None for methods without
    history: name -> one number per epoch
    timings: seconds of each phase and in total; ``peak_bytes`` of memory on the GPU, or else of the whole process
    options: all settings of the run, as values that JSON knows
    scores:  name -> what a mask was before it was pruned to zeros and ones, for :func:`maskops.purify.prune`; None for
             methods that don't prune
    execution: phase -> how its steps ran: ``"CUDA graph"``, or ``"eager: "`` and why; empty for methods that only run
             eagerly
    """

    model: nn.Module
    masks: dict[str, Tensor]
    trigger: Tensor | None
    history: dict[str, list[float]]
    timings: dict[str, float]
    options: dict[str, Any]
    scores: dict[str, Tensor] | None = None
    execution: dict[str, str] = field(default_factory=dict)

    def explain(self) -> str:
        """How the steps of each phase ran, a line each."""
        width = max(map(len, self.execution), default=0)
        return "\n".join(f"{phase:<{width}}  {how}" for phase, how in self.execution.items())
