"""The steps of a purification: who computes them how fast, and in how much memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import ceilings, loaders, networks
from benchmarks.contestants import CONTESTANTS, Make
from benchmarks.counting import Counts, count
from benchmarks.measure import (
    Peak,
    Samples,
    Timed,
    first_line,
    full_float32,
    growth,
    interleaved,
    launches,
    peak_bytes,
    peak_saved_bytes,
    time_limit,
)
from benchmarks.problem import ROTATION, STEPS, Problem, make_problem, why_not
from benchmarks.results import Extent, Outcome, make_row, say

NETS = ("small_vgg", "resnet18")
PHASES = {"awm": ("inner", "outer"), "anp": ("step",), "nft": ("step",)}
"""What a method's contestants are asked for, by the names of their methods."""
AGAIN = "maskops again"
"""The noise: our contestant, timed a second time as if it were another."""
OURS = ("official", "maskops", "floor")
"""Contestants that must not fail; the others may, for the reasons of the libraries that they rest on."""
TOLERANCE = {torch.float32: 0.05, torch.bfloat16: 0.5}
"""How far a contestant's step may be from the published one, relative to the step, tensor by tensor.

Where two values are equal up to rounding, a ReLU or a max-pool passes the gradient on elsewhere. That alone moves a
float32 gradient by up to 1 %, and a bfloat16 one by 20 to 30 %, whoever computes it. A mistake in the procedure (the L1
term or a branch forgotten) moves it by 10 % and more, so a bfloat16 run proves little without a float32 one beside it.
"""
DRAWS = 1000
"""Batches that a published loader has to give at least."""

Found = TypeVar("Found")


def run(
    net: str,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    warmup: int,
    method: str = "awm",
    contestants: Mapping[str, Make] | None = None,
    compile_limit: int = 600,
    peaks: bool = True,
    loader: bool = False,
) -> Outcome:
    """Compare the contestants, then time those that agree with the published procedure.

    contestants:   by name; all of the method's by default
    compile_limit: seconds, after which a compilation or a capture is given up
    peaks:         measure peak memory too, on the CPU in a new process for each step
    loader:        time the published way to a batch too
    """
    contestants = CONTESTANTS[method] if contestants is None else contestants
    outcome = Outcome()
    reason = why_not(dtype, device) or networks.why_not(net)
    if reason is not None:
        outcome.absent = dict.fromkeys(contestants, reason)
        return outcome
    try:
        problem = make_problem(net, batch, dtype, device, method)
    except (ImportError, RuntimeError, ValueError) as error:
        outcome.absent = dict.fromkeys(contestants, first_line(error))
        return outcome
    torch.compiler.reset()  # what an earlier run compiled
    everybody = _admit(problem, contestants, outcome, compile_limit)
    if not everybody:
        return outcome
    admitted = {name: each.contestant for name, each in everybody.items()}
    say(f"{net}: timing {', '.join(admitted)}")
    timed = ceilings.timed(dtype, device) | dict(_timed(problem, admitted))
    if loader:
        timed |= _loading(problem, outcome)
    failed: dict[tuple[str, str], str] = {}
    samples = interleaved(timed, repeats, warmup, device, failed=failed)
    for (name, phase), why in failed.items():
        outcome.absent[f"{name}, {phase}"] = why
        outcome.failed |= name in OURS
    reached = ceilings.found(samples, device)
    row = partial(make_row, "steps", net, batch, dtype, device=device, method=method, ceilings=reached)

    for name, each in everybody.items():
        what = getattr(each.contestant, "compiles", None)
        if what is not None:
            outcome.rows.append(row(name, what, (1e3 * each.seconds,) * 3))
    extents: dict[tuple[str, str], Extent] = dict(ceilings.extents(device))
    for name, phase in samples:
        if name in admitted and phase in PHASES[method]:
            make = contestants[name] if peaks else None
            extents[name, phase] = _extent(problem, everybody[name], phase, make, outcome, name)
    for (name, phase), extent in list(extents.items()):
        source = getattr(admitted.get(name), "counts_as", None)
        if source is not None:
            flops = extents[source, phase].flops if (source, phase) in extents else None
            extents[name, phase] = Extent(flops, None, extent.launches, extent.saved, extent.peak, extent.reserved)
    for name, phase in samples:
        if phase != "begin":
            ms = _with_its_share(samples, name, phase)
            outcome.rows.append(row(name, phase, ms.percentiles(), extent=extents.get((name, phase))))
    return outcome


def _with_its_share(samples: Mapping[tuple[str, str], Samples], name: str, phase: str) -> Samples:
    """An inner step takes its share of what its phase does once."""
    if phase == "inner" and (name, "begin") in samples:
        return samples[name, phase] + samples[name, "begin"] / STEPS
    return samples[name, phase]


@dataclass(frozen=True)
class Admitted:
    """A contestant that computes the published steps.

    seconds: what making it and its first steps took
    held:    bytes on a GPU that it holds between steps: masks, moments, graphs
    """

    contestant: Any
    seconds: float
    held: int = 0


def _admit(
    problem: Problem, contestants: Mapping[str, Make], outcome: Outcome, compile_limit: int
) -> dict[str, Admitted]:
    """The contestants whose first steps are the published ones."""
    admitted: dict[str, Admitted] = {}
    # in 16 bits nothing is as exact as that
    exact = full_float32 if problem.dtype == torch.float32 else nullcontext
    # what is captured or compiled without TF32 is not what is to be timed
    anew = problem.device.type == "cuda" and problem.dtype == torch.float32
    say(f"{problem.net}: comparing")
    try:
        with exact():
            expected = first_steps(CONTESTANTS[problem.method]["official"](problem), problem.method)
    except Exception as error:
        outcome.absent = dict.fromkeys(contestants, f"the published procedure failed: {first_line(error)}")
        outcome.failed = True
        return admitted
    for name, make in contestants.items():
        if getattr(make, "needs_cuda", False) and problem.device.type != "cuda":
            outcome.absent[name] = "it needs a CUDA device"
            continue
        what = getattr(make, "compiles", None)
        limit = compile_limit if what else None
        try:
            with exact():
                made, actual = _make(make, problem, limit)
            where, error = disagreement(problem, expected, actual)
            if not error <= TOLERANCE[problem.dtype]:
                outcome.absent[name] = f"its {where} is {error:.2g} away from the published step"
                outcome.failed = True
                continue
            if anew:
                del made
                made, _ = _make(make, problem, limit)
            admitted[name] = made
        except Exception as error:
            outcome.absent[name] = f"{what or 'its first step'} failed: {first_line(error)}"
            outcome.failed |= name in OURS
    return admitted


def _make(make: Make, problem: Problem, limit: int | None) -> tuple[Admitted, dict[str, Tensor]]:
    """A contestant, in no more than so many seconds, and what it has learned after its first steps."""
    on_gpu = problem.device.type == "cuda"
    before = torch.cuda.memory_allocated(problem.device) if on_gpu else 0
    start = time.perf_counter()
    with nullcontext() if limit is None else time_limit(limit):
        contestant = make(problem)
        learned = first_steps(contestant, problem.method)
    if on_gpu:
        torch.cuda.synchronize(problem.device)
    seconds = time.perf_counter() - start
    held = torch.cuda.memory_allocated(problem.device) - before if on_gpu else 0
    held -= sum(tensor.numel() * tensor.element_size() for tensor in learned.values())
    return Admitted(contestant, seconds, max(held, 0)), learned


def first_steps(contestant: Any, method: str = "awm") -> dict[str, Tensor]:
    """What a contestant has learned after one step of each kind, on the problem's random draws."""
    contestant.inject = True
    contestant.reset()
    begin(contestant)
    for phase in PHASES[method]:
        getattr(contestant, phase)()
    contestant.inject = False
    return contestant.result()


def begin(contestant: Any) -> None:
    """What a phase does once, where a contestant has that."""
    if getattr(contestant, "begin", None) is not None:
        contestant.begin()


def disagreement(problem: Problem, expected: dict[str, Tensor], actual: dict[str, Tensor]) -> tuple[str, float]:
    """The tensor that is farthest from the expected one, and how far, relative to how far that is from its start.

    Of signs it is the share of those that differ.
    """
    starts = {"trigger": problem.trigger, **problem.masks}
    errors = {}
    for name, wanted in expected.items():
        if name in starts:
            errors[name] = float((actual[name] - wanted).norm() / (wanted - starts[name]).norm())
        else:
            errors[name] = float((actual[name] != wanted).float().mean())
    # a NaN is farther than any number
    return max(errors.items(), key=lambda item: (item[1] != item[1], item[1]))


def _timed(problem: Problem, admitted: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Timed]]:
    def entry(contestant: Any, phase: str) -> Timed:
        if phase == "begin":
            return Timed(lambda repetition: contestant.begin(), lambda repetition: contestant.reset())
        step = getattr(contestant, phase)
        return Timed(lambda repetition: step(repetition % ROTATION), lambda repetition: contestant.reset())

    again = {AGAIN: admitted["maskops"]} if "maskops" in admitted else {}
    for phase in ("begin", *PHASES[problem.method]):
        for name, contestant in {**admitted, **again}.items():
            if getattr(contestant, phase, None) is not None:
                yield (name, phase), entry(contestant, phase)


def _loading(problem: Problem, outcome: Outcome) -> dict[tuple[str, str], Timed]:
    reason = loaders.why_not(problem.method)
    if reason is not None:
        outcome.absent["official, loader"] = reason
        return {}
    batches = loaders.batches(problem, DRAWS)
    return {("official", "loader"): Timed(lambda repetition: next(batches))}


def _extent(problem: Problem, admitted: Admitted, phase: str, make: Make | None, outcome: Outcome, name: str) -> Extent:
    """All but the time of a step; what can't be found out is noted, and empty.

    make: of which peak memory is to be measured, or None
    """

    def attempt(what: str, find: Callable[[], Found]) -> Found | None:
        try:
            return find()
        except Exception as error:
            outcome.absent[f"{what} of {name}, {phase}"] = first_line(error)
            return None

    def prepared(index: int) -> Callable[[], None]:
        contestant.reset()
        if phase == "inner":
            begin(contestant)
        return partial(getattr(contestant, phase), index)

    contestant, on_gpu = admitted.contestant, problem.device.type == "cuda"
    hidden = getattr(contestant, "counts_as", None) is not None
    prepares = getattr(contestant, "compiles", None) is not None
    saved = attempt("saved bytes", lambda: peak_saved_bytes(prepared(0), contestant.constants()))
    counts: Counts | None = None if hidden else attempt("counts", lambda: count(prepared(1)))
    started = attempt("launches", lambda: launches(prepared(1))) if on_gpu else None
    if not started and counts is not None:
        started = counts.ops
    peak = None
    if make is not None and on_gpu:
        peak = attempt("peak memory", lambda: growth(prepared(0), problem.device))
        peak = peak and Peak(peak.allocated + admitted.held, peak.reserved + admitted.held)
    elif make is not None and not prepares:  # a compiler needs more memory than the step
        what = problem.net, len(problem.indices[0]), problem.dtype, problem.device, problem.method
        peak = attempt("peak memory", lambda: peak_bytes(_prepare, make, phase, *what, device=problem.device))
    allocated, reserved = (None, None) if peak is None else peak
    flops, moved = (None, None) if counts is None else (counts.flops, counts.bytes)
    if counts is not None and phase == "inner" and getattr(contestant, "begin", None) is not None:
        once = attempt("counts of what a phase does once", lambda: count(contestant.begin))
        flops, moved = (None, None) if once is None else (flops + once.flops / STEPS, moved + once.bytes / STEPS)
    unseen = (hidden and on_gpu) or getattr(contestant, "saves_itself", False)
    return Extent(flops, moved, started, None if unseen else saved, allocated, reserved)


def _prepare(
    make: Make, phase: str, net: str, batch: int, dtype: torch.dtype, device: torch.device, method: str
) -> Callable[[], None]:
    """Building a contestant and two of its steps, the second beside what the first left; all code loaded before."""

    def steps(problem: Problem) -> None:
        contestant = make(problem)
        contestant.reset()
        if phase == "inner":
            begin(contestant)
        for index in range(2):
            getattr(contestant, phase)(index)

    steps(make_problem(net, 2, dtype, device, method))
    problem = make_problem(net, batch, dtype, device, method)
    return partial(steps, problem)
