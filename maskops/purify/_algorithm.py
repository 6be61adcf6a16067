"""A paper's loop as a sequence of phases, and who runs them: one loop alone, or several side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Protocol

from torch.nn.modules.dropout import _DropoutNd

from maskops.purify._loop import NonFiniteError, Purification, Run
from maskops.purify._masks import MaskRun
from maskops.purify._phase import Phase


class Algorithm(Protocol):
    """A paper's loop as phases: what :func:`complete` runs."""

    run: MaskRun

    def phases(self) -> Iterator[Phase]:
        """The phases in their order; what is done between them comes before and after the yields."""

    def result(self) -> Purification:
        """After the last phase."""


def complete(algorithm: Algorithm) -> Purification:
    """Run all phases of an algorithm."""
    for phase in algorithm.phases():
        (error,) = side_by_side([(algorithm.run, phase)])
        if error is not None:
            raise error
    return algorithm.result()


def complete_together(algorithms: Sequence[Algorithm]) -> list[Purification | NonFiniteError]:
    """Run the phases of several algorithms on one GPU side by side, or on a CPU one algorithm after the other.

    returns: the result of each, or the error that ended it
    """
    if any(algorithm.run.device.type != "cuda" or _draws_in_layers(algorithm.run) for algorithm in algorithms):
        return [_or_error(partial(complete, algorithm)) for algorithm in algorithms]
    going = {index: algorithm.phases() for index, algorithm in enumerate(algorithms)}
    errors: dict[int, NonFiniteError] = {}
    while going:
        current = {index: next(phases, None) for index, phases in going.items()}
        pairs = {index: (algorithms[index].run, phase) for index, phase in current.items() if phase is not None}
        found = dict(zip(pairs, side_by_side(list(pairs.values())), strict=True))
        errors |= {index: error for index, error in found.items() if error is not None}
        going = {index: phases for index, phases in going.items() if index in pairs and index not in errors}
    return [errors.get(index) or _or_error(algorithm.result) for index, algorithm in enumerate(algorithms)]


def _or_error(compute: Callable[[], Purification]) -> Purification | NonFiniteError:
    try:
        return compute()
    except NonFiniteError as error:
        return error


def _draws_in_layers(run: MaskRun) -> bool:
    """Whether layers draw from torch's own generator, of which there is one for all runs."""
    return any(isinstance(layer, _DropoutNd) and layer.training for layer in run.model.modules())


def side_by_side(pairs: Sequence[tuple[Run, Phase]]) -> list[NonFiniteError | None]:
    """One phase of each run, a step of each in turn; returns for each what is wrong with its numbers."""
    start = time.perf_counter()
    with ExitStack() as contexts:
        for run, _ in reversed(pairs):  # each goes on with its own seeds; within, those of the first are used
            contexts.enter_context(run.quiet())
        for run, phase in pairs:
            contexts.callback(run.lane.join)  # also when something is raised: nobody gets memory that is in use
            contexts.enter_context(phase.around())
            phase.start()
        while any(phase.left for _, phase in pairs):
            for _, phase in pairs:
                if phase.left:
                    phase.advance()
        numbers = [phase.finish() for _, phase in pairs]
    errors: list[NonFiniteError | None] = []
    for (run, phase), of_phase in zip(pairs, numbers, strict=True):
        run.execution[phase.name] = phase.execution
        try:
            run.keep(phase.name, of_phase, start)
            errors.append(None)
        except NonFiniteError as error:
            errors.append(error)
    return errors
