"""The sum of an arena's gradient over several processes, which begins before the backward has ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from maskops._text import one_line
from maskops.arena import MaskArena
from maskops.purify._distributed import Team
from maskops.purify._working import WorkingModel

_BYTES = 25 * 2**20
"""Of the gradients of layers that are summed together: fewer take more calls, more begin later."""


class BucketSums:
    """Sums of the flat gradient of an arena over the processes of a team, a bucket of consecutive layers at a time.

    A backward comes to the last layers first, so the last bucket is the first, and its sum begins as soon as the
    gradients of its layers are there. Others begin in their order, which all processes thus have in common.
    """

    def __init__(self, method: str, team: Team, arena: MaskArena) -> None:
        self._method, self._team, self._arena = method, team, arena
        self._places: list[slice] = []
        self._bucket_of: dict[int, int] = {}
        self._left: Counter[int] = Counter()
        self._waiting: list[tuple[Parameter, Tensor]] = []
        self._begun: list[Callable[[], None]] = []

    @contextmanager
    def during_backward(self, model: WorkingModel) -> Iterator[None]:
        """Within is the last backward before a step, with its forward; at the end the arena's gradient is summed.

        errors: RuntimeError where no memory is left after a sum has begun, which the others take part in
        """
        if self._team.size == 1 or self._arena.grad is None:
            yield
            return
        weights = self._arena.effective_weights.values()
        self._places, self._bucket_of = _buckets(self._arena.grad, list(weights))
        self._left = Counter(self._bucket_of[id(weight)] for weight in weights if weight.requires_grad)
        self._waiting, self._begun = [], []
        try:
            with model.handing_over(self._take):
                yield
            self._add_waiting()
            while len(self._begun) < len(self._places):
                self._begin_next()
            for wait in self._begun:
                wait()
        except torch.OutOfMemoryError as error:
            if not self._begun:
                raise  # the step can be tried again with less
            reason = f"no memory was left in the middle of a sum over the processes ({one_line(str(error))})"
            raise RuntimeError(f"{self._method}: {reason}") from error

    def _take(self, parameter: Parameter, grad: Tensor) -> None:
        """The complete gradient of a parameter: a layer's effective weight, or a tuned bias."""
        self._waiting.append((parameter, grad))
        if id(parameter) in self._bucket_of:
            self._left[self._bucket_of[id(parameter)]] -= 1
        while len(self._begun) < len(self._places) and self._left[len(self._begun)] == 0:
            self._add_waiting()
            self._begin_next()

    def _add_waiting(self) -> None:
        for parameter, _ in self._waiting:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, requires_grad=False)
        if self._waiting:
            totals, grads = zip(*((p.grad, grad.to(p.grad.dtype)) for p, grad in self._waiting), strict=True)
            torch._foreach_add_(totals, grads)
        self._waiting = []

    def _begin_next(self) -> None:
        self._begun.append(self._team.adding(self._arena.grad[self._places[len(self._begun)]]))


def _buckets(flat: Tensor, weights: Sequence[Parameter]) -> tuple[list[slice], dict[int, int]]:
    """Where each bucket lies in a flat gradient, and the bucket of each weight, whose gradient is a view, by its id."""
    places, bucket_of, stop = [], {}, flat.numel()
    for weight in reversed(weights):
        bucket_of[id(weight)] = len(places)
        start = weight.grad.storage_offset()
        if (stop - start) * flat.element_size() >= _BYTES or weight is weights[0]:
            places.append(slice(start, stop))
            stop = start
    return places, bucket_of
