"""The state of a run in a file, so that another process can go on with it to the same result."""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from maskops._text import one_line
from maskops.checkpoint import CheckpointError, load_run, save_run
from maskops.optim import EIGHT_BITS, MaskAdam, MaskSGD
from maskops.purify._finite import is_finite
from maskops.purify._loop import Run, plain_options

_ELSEWHERE = {"progress", "graphs", "gate", "recompute", "micro_batch_size", "remake_weights", "offload", "shard"}
"""Settings that may differ in the process that goes on, as may which GPU it is: they change memory, or what is seen."""

_NOTES = {"phases": int, "options": dict, "now": dict, "history": dict, "seconds": dict}
"""What a checkpoint says beside its tensors."""

_MOMENTS = {"exp_avg": None, "exp_avg_sq": None}
"""Of Adam's state, in any floating dtype."""

_PAUSE = 20
"""A state is written at most once in so many times as long as writing one takes: at most 5 % of the time goes there."""


_OF_MASKS = MaskAdam, MaskSGD

_Kind = tuple[torch.Size, torch.dtype]


class Resumable(Protocol):
    """What a :class:`maskops.purify._algorithm.Algorithm`, or a baseline, has for its checkpoints.

    Models and optimisers that are made between two phases, out of what those before it have changed, come late: they
    are made anew before the first phase that is still to be run.
    """

    method: str
    run: Run
    options: Any
    optimizers: Sequence[Optimizer]

    def phases(self) -> Iterator[Any]: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def restored(self) -> None: ...


class Checkpoint:
    """A file with an algorithm's state after a phase: all that later phases depend on.

    path:   ends in .safetensors; written to at once, so that a folder that can't be is refused before the work begins
    resume: go on from the state in the file, if there is one; without it such a file is an error
    errors: ValueError for a file that must not be replaced or is of another model, other images or options;
            CheckpointError for one that can't be read or written
    """

    def __init__(self, algorithm: Resumable, path: str | os.PathLike, resume: bool) -> None:
        self._algorithm, self._path = algorithm, Path(path)
        self._team, self._shards = algorithm.run.team, algorithm.run.shards
        # where parts are put together all processes must come by, whatever the first one finds
        self._needed = _made(algorithm)
        self._tensors: dict[str, Tensor] = {}
        self._notes: dict[str, Any] = {"phases": 0}
        self._wait = self._written = 0.0
        exists = self._team.first(self._path.exists)
        with self._team.all_or_none():
            self._about = about(algorithm)
            if not exists:
                self._save(0)
            elif not resume:
                method = algorithm.method
                raise ValueError(f"{method}: {path} exists: give resume=True to go on from it, or another checkpoint=")
            else:
                self._tensors, self._notes = load_run(self._path)
                self._check()

    def remaining(self) -> Iterator[Any]:
        """The phases that are still to be run; the state is saved after each."""
        run, done, number = self._algorithm.run, self._notes["phases"], 0
        run.replaying = done > 0
        if done > 0:
            self._fill()
        for number, phase in enumerate(self._algorithm.phases(), start=1):
            if number == done:
                with self._team.all_or_none():
                    self._restore()
                run.replaying = False
            if number <= done:
                continue
            yield phase
            due = self._as_the_first(time.monotonic() - self._written >= self._wait)
            with self._team.all_or_none():
                if due:
                    self._save(number)
        if number < done:
            raise self._no_checkpoint(f"phase {done} of {number}")
        due = self._as_the_first(self._notes["phases"] < number)
        with self._team.all_or_none():
            if due:
                self._save(number)

    def _as_the_first(self, decided: bool) -> bool:
        """What the first process decided, if all must do the same."""
        return decided if self._shards == 1 else self._team.first(lambda: decided)

    def _save(self, phases: int) -> None:
        if self._team.rank > 0 and self._shards == 1:
            return
        start = time.monotonic()
        algorithm, run = self._algorithm, self._algorithm.run
        live, states = _live(algorithm), _optimizer_states(algorithm)
        if self._team.rank > 0 or _broken(live) is not None:
            return  # the run is about to end, and the state in the file is the last good one
        tensors = {**live, **states, **_generator_states(algorithm)}
        self._notes = {
            **self._about,
            "phases": phases,
            "now": {name: value for name, value in plain_options(algorithm.options).items() if name not in _ELSEWHERE},
            "history": run.history,
            "seconds": run.seconds(),
        }
        save_run(self._path, tensors, self._notes)
        self._told()
        self._written = time.monotonic()
        self._wait = _PAUSE * (self._written - start)

    def _told(self) -> None:
        """Let errors of the run say where its last state is."""
        phases = self._notes["phases"]
        state = f"the state after phase {phases}" if phases else "the state at the beginning"
        self._algorithm.run.saved = f"; checkpoint {self._path} has {state}"

    def _no_checkpoint(self, found: str) -> CheckpointError:
        method = self._algorithm.method
        return CheckpointError(f"{method}: {self._path} is no checkpoint of this run ({found}); nothing was changed")

    def _check(self) -> None:
        method, notes = self._algorithm.method, self._notes
        kinds = {name: type(notes.get(name)) for name in _NOTES}
        if kinds != _NOTES or not _plausible(notes):
            raise CheckpointError(f"{method}: {self._path} is no checkpoint of a run; nothing was changed")
        for what, title in (("method", "method"), ("model", "model"), ("images", "clean images")):
            if notes.get(what) != self._about[what]:
                raise ValueError(f"{method}: {self._path} is the checkpoint of another {title}; nothing was changed")
        before, now = notes["options"], self._about["options"]
        other = [name for name in now if before.get(name) != now[name]]
        if other:
            values = ", ".join(f"{name} {before.get(name)!r}, now {now[name]!r}" for name in other)
            raise ValueError(f"{method}: {self._path} is the checkpoint of a run with other options: {values}")
        self._check_needed(self._needed)
        broken = _broken(self._tensors)
        if broken is not None:
            raise self._no_checkpoint(f"{broken} has values that are nan or infinite")
        try:
            replace(self._algorithm.options, **notes["now"])
            for name, generator in self._algorithm.run.generators().items():
                generator.clone_state().set_state(self._tensors[f"generator.{name}"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._no_checkpoint(one_line(error)) from None
        self._told()

    def _check_needed(self, needed: Mapping[str, _Kind]) -> None:
        """Raise unless the file has all that has been made by now."""
        if needed != {name: _kind(value) for name, value in self._tensors.items() if name in needed}:
            method = self._algorithm.method
            raise CheckpointError(f"{method}: {self._path} lacks tensors of the run; nothing was changed")

    def _check_others(self, needed: Collection[str]) -> None:
        """Raise unless the other tensors are the whole states of optimisers."""
        others = {name: value for name, value in self._tensors.items() if name not in needed}
        for name, value in others.items():
            if not _belongs(self._algorithm, name, value):
                raise self._no_checkpoint(f"{one_line(name)} {tuple(value.shape)} is none of its tensors")
        if not _are_whole({name: value.dtype for name, value in others.items()}):
            raise self._no_checkpoint("an optimiser's state is in pieces")

    @torch.no_grad()
    def _fill(self) -> None:
        algorithm, run = self._algorithm, self._algorithm.run
        run.take_up({name: self._tensors[f"run.{name}"] for name in run.tensors()})
        for name, value in algorithm.tensors().items():
            value.copy_(self._tensors[f"run.{name}"])

    @torch.no_grad()
    def _restore(self) -> None:
        algorithm, run = self._algorithm, self._algorithm.run
        needed = _made(algorithm)
        self._check_needed(needed)
        self._check_others(needed)
        self._fill()
        for name, value in self._tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                number, place, key = rest.split(".", 2)
                optimizer = algorithm.optimizers[int(number)]
                parameter = _parameters(optimizer)[int(place)]
                if isinstance(optimizer, _OF_MASKS):
                    optimizer.take_up(parameter, key, value)
                else:
                    on_host = key == "step" and not optimizer.param_groups[0].get("capturable", False)
                    optimizer.state[parameter][key] = value.to("cpu" if on_host else parameter.device, copy=True)
        for name, generator in run.generators().items():
            generator.set_state(self._tensors[f"generator.{name}"])
        algorithm.options = replace(algorithm.options, **self._notes["now"])
        algorithm.restored()
        run.go_on_from(self._notes["history"], self._notes["seconds"])
        self._tensors = {}


def about(algorithm: Resumable) -> dict[str, Any]:
    """What must be the same in a process that goes on."""
    run = algorithm.run
    # what a GPU draws no CPU can go on with
    options = {**plain_options(algorithm.options), **plain_options(run.setting), "device": run.device.type}
    return {
        "method": algorithm.method,
        "model": _fingerprint(run.original.state_dict().items()),
        "images": _fingerprint([("images", run.images.stored), ("labels", run.labels)]),
        "options": {name: value for name, value in options.items() if name not in _ELSEWHERE},
    }


def _fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, value in tensors:
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _live(algorithm: Resumable) -> dict[str, Tensor]:
    """What steps change in place, but for the optimisers' states, which aren't there before the first step."""
    live = {**algorithm.run.whole_tensors(), **algorithm.tensors()}
    return {f"run.{name}": value.detach() for name, value in live.items()}


def _made(algorithm: Resumable) -> dict[str, _Kind]:
    """What a checkpoint must have of what has been made by now."""
    return {name: _kind(value) for name, value in {**_live(algorithm), **_generator_states(algorithm)}.items()}


def _kind(value: Tensor) -> _Kind:
    return value.shape, value.dtype


def _broken(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor with NaN or an infinity in it; -inf may be in a model's buffer."""
    return next((name for name, value in tensors.items() if not is_finite(value, name.startswith("run.buffer"))), None)


def _plausible(notes: Mapping[str, Any]) -> bool:
    """Whether the numbers in a checkpoint's notes are such."""
    history = list(notes["history"].values())
    numbers = [*notes["seconds"].values(), *chain.from_iterable(filter(_is_list, history))]
    whole = notes["phases"] >= 0 and "total" in notes["seconds"] and all(map(_is_list, history))
    return whole and all(type(number) in (int, float) and abs(number) < math.inf for number in numbers)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _belongs(algorithm: Resumable, name: str, value: Tensor) -> bool:
    """Whether a tensor is part of the state of one of the algorithm's optimisers."""
    found = re.fullmatch(r"optimizer\.(\d{1,9})\.(\d{1,9})\.(.+)", name)
    if found is None or int(found[1]) >= len(algorithm.optimizers):
        return False
    parameters = _parameters(algorithm.optimizers[int(found[1])])
    if int(found[2]) >= len(parameters):
        return False
    parameter = parameters[int(found[2])]
    if "." in found[3] or found[3].endswith("_scale"):  # a layer's own, or a number for some: fewer, in a row
        return value.dim() <= 1 and value.numel() <= parameter.numel() * algorithm.run.shards
    return value.shape in ((), parameter.shape)


def _are_whole(dtypes: Mapping[str, torch.dtype]) -> bool:
    """Whether the states of optimisers, by name, have all their parts, each of its dtype."""
    states: dict[str, dict[str, torch.dtype]] = {}
    for name, dtype in dtypes.items():
        # a layer's own state has the layer's name before it
        of, _, part = name.rpartition(".")
        states.setdefault(of, {})[part] = dtype
    kinds = [{**kind, "step": torch.float32} for kind in (_MOMENTS, EIGHT_BITS)] + [{"momentum_buffer": None}]
    return all(any(_fit(state, kind) for kind in kinds) for state in states.values())


def _fit(state: Mapping[str, torch.dtype], kind: Mapping[str, torch.dtype | None]) -> bool:
    return state.keys() == kind.keys() and all(
        dtype.is_floating_point if kind[part] is None else dtype == kind[part] for part, dtype in state.items()
    )


def _optimizer_states(algorithm: Resumable) -> dict[str, Tensor]:
    return {
        f"optimizer.{number}.{place}.{key}": value
        for number, optimizer in enumerate(algorithm.optimizers)
        for place, parameter in enumerate(_parameters(optimizer))
        for key, value in _state_of(optimizer, parameter).items()
        if isinstance(value, Tensor)
    }


def _state_of(optimizer: Optimizer, parameter: Tensor) -> Mapping[str, Any]:
    if isinstance(optimizer, _OF_MASKS):
        return optimizer.state_in_one(parameter)
    return optimizer.state.get(parameter, {})


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _generator_states(algorithm: Resumable) -> Mapping[str, Tensor]:
    return {f"generator.{name}": generator.get_state() for name, generator in algorithm.run.generators().items()}
