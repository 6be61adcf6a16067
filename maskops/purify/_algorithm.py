"""A paper's loop as a sequence of phases, and who runs them: one loop alone, or several side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from maskops.purify._checkpoint import Checkpoint, about
from maskops.purify._distributed import team_of
from maskops.purify._loop import OnEpoch, Run
from maskops.purify._masks import MaskRun
from maskops.purify._options import Preset, settle
from maskops.purify._phase import Phase
from maskops.purify._result import NonFiniteError, Purification
from maskops.purify._savings import out_of_memory
from maskops.purify._setting import MaskSetting

T = TypeVar("T")


class Algorithm:
    """A paper's loop as phases: what :func:`complete` runs.

    model, clean_data: the user's
    preset, options:   where the values of options and setting begin, and the changes to them
    on_epoch:          the user's, or None
    """

    method: ClassVar[str]
    presets: ClassVar[Mapping[str, Preset]]
    run: MaskRun
    options: Any
    optimizers: Sequence[Optimizer]

    def __init__(
        self, model: nn.Module, clean_data: Any, preset: str, on_epoch: OnEpoch | None, options: Mapping[str, Any]
    ) -> None:
        self.on_epoch = on_epoch
        team = team_of(self.method)
        team.begin()
        with team.all_or_none():
            self.options, self._setting = settle(self.method, self.presets, preset, options)
        shard = getattr(self.options, "shard", False)
        team.same(lambda: {"options": {"shard": shard}})
        prepare = partial(self.prepare, model, clean_data, self.options, self._setting)
        # where layers are put together in between, the others may wait for that
        with team.ending_together() if shard else team.all_or_none():
            self.attempt(prepare, " before the first step")
        self.run.beside = lambda: {f"the {name}": value for name, value in self.tensors().items()}

    def prepare(self, model: nn.Module, clean_data: Any, options: Any, setting: MaskSetting) -> None:
        """Make the run, the optimisers and all else that the steps work on."""
        raise NotImplementedError

    def phases(self) -> Iterator[Phase]:
        """The phases in their order; what is done between them comes before and after the yields."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What the steps change in place, beside the run's own tensors and the optimisers' states."""
        return {}

    def restored(self) -> None:
        """After its tensors, and the run's, have become those of a checkpoint: what follows from them."""
        self.run.arena.refresh()

    def result(self) -> Purification:
        """After the last phase."""
        return self.run.finish(self.options)

    def attempt(self, compute: Callable[[], T], where: str) -> T:
        """What the function computes; where memory runs out, an error that says what would save some."""
        try:
            return compute()
        except torch.OutOfMemoryError as error:
            reason = str(error)
        # only now: what is raised within an except holds the frames of what failed, and their tensors
        run = getattr(self, "run", None)
        shape, saved = (None, "") if run is None else (run.images.shape[1:], run.saved)
        where = f"{where}; the model is left as it was{saved}"
        processes = team_of(self.method).size
        raise out_of_memory(self.method, reason, self.options, self._setting, shape, where, processes)


def complete(algorithm: Algorithm, checkpoint: str | os.PathLike | None = None, resume: bool = False) -> Purification:
    """Run all phases of an algorithm.

    checkpoint, resume: as for :class:`Checkpoint`; None for none
    """
    team = algorithm.run.team
    team.same(lambda: {**about(algorithm), "checkpoint": (checkpoint is None, resume)})
    with team.ending_together():
        for phase in _phases(algorithm, checkpoint, resume):
            compute = partial(side_by_side, [(algorithm.run, phase)])
            (error,) = algorithm.attempt(compute, f" in the {phase.name} phase")
            if error is not None:
                raise error
        return algorithm.attempt(algorithm.result, " after the last step")


def complete_together(
    algorithms: Sequence[Algorithm], checkpoints: Sequence[str | os.PathLike | None], resume: bool = False
) -> list[Purification | NonFiniteError]:
    """Run the phases of several algorithms on one GPU side by side, or on a CPU one algorithm after the other.

    checkpoints, resume: as for :class:`Checkpoint`, one for each algorithm; None for none
    returns:             the result of each, or the error that ended it
    """
    pairs = list(zip(algorithms, checkpoints, strict=True))
    if any(algorithm.run.device.type != "cuda" or _draws_in_layers(algorithm.run) for algorithm in algorithms):
        return [_or_error(partial(complete, *pair, resume)) for pair in pairs]
    going = {index: _phases(*pair, resume) for index, pair in enumerate(pairs)}
    errors: dict[int, NonFiniteError] = {}
    while going:
        current = {index: next(phases, None) for index, phases in going.items()}
        running = {index: (algorithms[index].run, phase) for index, phase in current.items() if phase is not None}
        compute = partial(side_by_side, list(running.values()))
        found = dict(zip(running, algorithms[0].attempt(compute, " in runs side by side"), strict=True))
        errors |= {index: error for index, error in found.items() if error is not None}
        going = {index: phases for index, phases in going.items() if index in running and index not in errors}
    return [errors.get(index) or _or_error(algorithm.result) for index, algorithm in enumerate(algorithms)]


def _phases(algorithm: Algorithm, checkpoint: str | os.PathLike | None, resume: bool) -> Iterator[Phase]:
    return algorithm.phases() if checkpoint is None else Checkpoint(algorithm, checkpoint, resume).remaining()


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
