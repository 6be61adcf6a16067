"""One inner and one outer step of AWM: who computes them how fast, and in how much memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants import CONTESTANTS, Compiled, Official
from benchmarks.measure import Timed, full_float32, interleaved, peak_bytes, peak_saved_bytes, time_limit
from benchmarks.problem import ROTATION, STEPS, Problem, make_problem, why_not
from benchmarks.results import Outcome, Row, aligned, first_line, make_row, say

NETS = ("small_vgg", "resnet18")
PHASES = ("inner", "outer")
AGAIN = "maskops again"
"""The noise: our contestant, timed a second time as if it were another."""
TOLERANCE = {torch.float32: 0.05, torch.bfloat16: 0.5}
"""How far a contestant's step may be from the published one, relative to the step, tensor by tensor.

Where two values are equal up to rounding, a ReLU or a max-pool passes the gradient on elsewhere. That alone moves a
float32 gradient by up to 1 %, and a bfloat16 one by 20 to 30 %, whoever computes it. A mistake in the procedure (the L1
term or a branch forgotten) moves it by 10 % and more, so a bfloat16 run proves little without a float32 one beside it.
"""

Make = Callable[[Problem], Any]


def run(
    net: str,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    warmup: int,
    contestants: Mapping[str, Make] = CONTESTANTS,
    compile_limit: int = 600,
    peaks: bool = True,
) -> Outcome:
    """Compare the contestants, then time those that agree with the published procedure.

    compile_limit: seconds, after which ``torch.compile`` is given up
    peaks:         measure peak memory too, on the CPU in a new process for each step
    """
    outcome = Outcome()
    reason = why_not(dtype, device)
    if reason is not None:
        outcome.absent = dict.fromkeys(contestants, reason)
        return outcome
    problem = make_problem(net, batch, dtype, device)
    row = partial(make_row, "awm", net, batch, dtype, device=device)
    admitted, compiling = _admit(problem, contestants, outcome, compile_limit)
    for name, seconds in compiling.items():
        outcome.rows.append(row(name, "compilation", (1e3 * seconds,) * 3))

    say(f"{net}: timing {', '.join(admitted)}")
    samples = interleaved(dict(_timed(admitted)), repeats, warmup, device)
    for name, phase in [key for key in samples if key[1] in PHASES]:
        ms = samples[name, phase]
        if phase == "inner" and (name, "begin") in samples:
            ms = ms + samples[name, "begin"] / STEPS
        contestant = admitted.get(name)
        saved = peak = None
        if contestant is not None:
            contestant.reset()
            saved = peak_saved_bytes(getattr(contestant, phase), contestant.constants())
            if peaks and not isinstance(contestant, Compiled):  # whose compiler needs more memory than the step
                peak = peak_bytes(_prepare, net, batch, dtype, device, contestants[name], phase, device=device)
        outcome.rows.append(row(name, phase, ms.percentiles(), saved=saved, peak=peak))
    return outcome


def _admit(
    problem: Problem, contestants: Mapping[str, Make], outcome: Outcome, compile_limit: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """The contestants whose first steps are the published ones, and how many seconds those took that compiled."""
    admitted, compiling = {}, {}
    with full_float32():
        say(f"{problem.net}: comparing")
        expected = first_steps(Official(problem))
        for name, make in contestants.items():
            compiles = make is Compiled
            start = time.perf_counter()
            try:
                with time_limit(compile_limit) if compiles else nullcontext():
                    contestant = make(problem)
                    actual = first_steps(contestant)
            except Exception as error:
                if not compiles:
                    raise
                outcome.absent[name] = f"torch.compile failed: {first_line(error)}"
                continue
            where, error = disagreement(problem, expected, actual)
            if not error <= TOLERANCE[problem.dtype]:
                outcome.absent[name] = f"its {where} is {error:.2g} away from the published step"
                outcome.failed = True
                continue
            admitted[name] = contestant
            if compiles:
                compiling[name] = time.perf_counter() - start
    return admitted, compiling


def first_steps(contestant: Any) -> dict[str, Tensor]:
    """Trigger and masks after one inner and one outer step."""
    contestant.reset()
    if contestant.begin is not None:
        contestant.begin()
    contestant.inner()
    contestant.outer()
    return contestant.result()


def disagreement(problem: Problem, expected: dict[str, Tensor], actual: dict[str, Tensor]) -> tuple[str, float]:
    """The tensor that is farthest from the expected one, and how far, relative to how far that is from its start."""
    starts = {"trigger": problem.trigger, **problem.masks}
    errors = {
        name: float((actual[name] - expected[name]).norm() / (expected[name] - start).norm())
        for name, start in starts.items()
    }
    # a NaN is farther than any number
    return max(errors.items(), key=lambda item: (item[1] != item[1], item[1]))


def _timed(admitted: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Timed]]:
    def entry(contestant: Any, phase: str) -> Timed:
        if phase == "begin":
            return Timed(lambda repetition: contestant.begin(), lambda repetition: contestant.reset())
        step = getattr(contestant, phase)
        return Timed(lambda repetition: step(repetition % ROTATION), lambda repetition: contestant.reset())

    again = {AGAIN: admitted["maskops"]} if "maskops" in admitted else {}
    for phase in ("begin", *PHASES):
        for name, contestant in {**admitted, **again}.items():
            if getattr(contestant, phase) is not None:
                yield (name, phase), entry(contestant, phase)


def _prepare(
    net: str, batch: int, dtype: torch.dtype, device: torch.device, make: Make, phase: str
) -> Callable[[], None]:
    """Building a contestant and two of its steps, the second beside what the first left; all code loaded before."""

    def steps(problem: Problem) -> None:
        contestant = make(problem)
        contestant.reset()
        if phase == "inner" and contestant.begin is not None:
            contestant.begin()
        for index in range(2):
            getattr(contestant, phase)(index)

    steps(make_problem(net, 2, dtype, device))
    problem = make_problem(net, batch, dtype, device)
    return partial(steps, problem)


def table(outcome: Outcome) -> str:
    """The rows as a person reads them, each beside the published procedure and the floor."""
    blocks = []
    for phase in PHASES:
        rows = {row.contestant: row for row in outcome.rows if row.phase == phase}
        if not rows:
            continue
        first = next(iter(rows.values()))
        head = f"{first.net}, batch {first.batch}, {first.dtype}: one {phase} step on {first.device}"
        lines = [["", "ms", "20 %", "80 %", "official/", "/floor", "saved MB", "peak MB"]]
        for name, row in rows.items():
            ratios = _ratio(rows.get("official"), row), _ratio(row, rows.get("floor"))
            lines.append([name, row.ms_p50, row.ms_p20, row.ms_p80, *ratios, row.saved_mb, row.peak_mb])
        blocks.append(f"{head}\n{aligned(lines)}")
    notes = [
        f"{row.contestant}: {row.ms / 1e3:.0f} s of compilation" for row in outcome.rows if row.phase == "compilation"
    ]
    notes += [f"{name}: no numbers, {reason}" for name, reason in outcome.absent.items()]
    return "\n\n".join([*blocks, "\n".join(notes)]).strip()


def _ratio(row: Row | None, other: Row | None) -> str:
    return "" if row is None or other is None else f"{row.ms / other.ms:.2f}"
