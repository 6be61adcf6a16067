"""In what parts batches go through a network, and how these become smaller where memory runs out."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from maskops.purify._draws import Batch
from maskops.purify._fake import has_data
from maskops.purify._phase import Lane

T = TypeVar("T")
Step = Callable[[Batch], dict[str, Tensor]]
Shrink = Callable[[], bool]
"""Makes steps need less memory, or returns False where it can't."""


class Parts:
    """The parts of a run's batches, for each kind of step.

    method: for warnings
    most:   images in a part; None for whole batches
    lane:   where the run's steps are recorded
    """

    def __init__(self, method: str, most: int | None, lane: Lane) -> None:
        self._method, self._given, self._lane = method, most, lane
        self.whole = False
        """Whether batches must stay in one piece."""
        self._instead: dict[str, Shrink] = {}
        self._halved: dict[str, int] = {}
        self._largest: dict[str, int] = {}
        self._kind = ""

    def shrinking(self, kind: str, step: Step, instead: Shrink | None = None) -> dict[str, Any]:
        """For a :class:`Phase`: this step, whose parts become smaller where memory runs out.

        instead: what is tried before that
        """
        if instead is not None:
            self._instead[kind] = instead

        def step_in_parts(batch: Batch) -> dict[str, Tensor]:
            before, self._kind = self._kind, kind
            try:
                return step(batch)
            finally:
                self._kind = before

        return {"step": step_in_parts, "shrink": lambda: self._shrink(kind), "note": lambda: self._note(kind)}

    def of(self, count: int) -> list[slice]:
        """The parts of so many images, as equal as can be."""
        most = self._halved.get(self._kind, self._given)
        number = 1 if most is None else max(-(-count // most), 1)
        self._largest[self._kind] = max(-(-count // number), self._largest.get(self._kind, 0))
        places = range(number) if has_data() else {0, number - 1}  # the smallest and the largest, for their memory
        return [slice(count * place // number, count * (place + 1) // number) for place in places]

    def attempt(self, compute: Callable[[], T], clear: Callable[[], None]) -> T:
        """What the function computes, for as long as memory runs out again and in smaller parts.

        clear: undoes what an attempt that broke off has added
        """
        while True:
            try:
                return compute()
            except torch.OutOfMemoryError:
                # a step that is being recorded would keep what it began
                if self._lane.recording or not self._shrink(self._kind):
                    raise
            gc.collect()  # what the attempt has left may be in cycles
            clear()

    def _shrink(self, kind: str) -> bool:
        largest = self._largest.pop(kind, 0)
        if self.whole:
            return False
        if kind in self._instead and self._instead[kind]():
            return True
        if largest < 2:
            return False
        self._halved[kind] = -(-largest // 2)
        phase = f" in the {kind} phase" if kind else ""
        what = f"{self._method}: memory ran out{phase}; from now on it takes {_images(self._halved[kind])} at a time"
        warnings.warn(what, RuntimeWarning, stacklevel=2)
        return True

    def _note(self, kind: str) -> str:
        return f", {_images(self._halved[kind])} at a time for lack of memory" if kind in self._halved else ""


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
