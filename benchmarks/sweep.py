"""Several purifications of one network: side by side, and one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import networks
from benchmarks.measure import Samples
from benchmarks.problem import Problem, make_problem, why_not
from benchmarks.results import Outcome, aligned, make_row, say
from maskops.purify import Purification, awm, sweep

SHORT, LONG = 1, 3
"""Epochs of the runs whose difference is the time of epochs alone, without what a run does once."""
TOLERANCE = 1e-3
"""How far the mean losses of a run side by side with others may be from those of the run alone."""


def run(
    net: str, runs: int, batch: int, dtype: torch.dtype, device: torch.device, repeats: int, warmup: int
) -> Outcome:
    """Time an epoch of so many runs of AWM, in its published setting but for the seeds, each way."""
    outcome = Outcome()
    reason = why_not(dtype, device) or networks.why_not(net)
    if reason is not None:
        outcome.absent = dict.fromkeys(WAYS, reason)
        return outcome
    problem = make_problem(net, batch, dtype, device)
    seeds = [{"seed": seed} for seed in range(runs)]
    say(f"{net}: comparing {runs} runs")
    alone, together = (way(problem, seeds, LONG) for way in WAYS.values())
    for one, other in zip(alone, together, strict=True):
        if not _near(one, other):
            outcome.failed, outcome.absent["maskops"] = True, "its runs side by side are not the runs alone"
            return outcome
    say(f"{net}: timing")
    samples: dict[str, Samples] = {name: Samples([]) for name in WAYS}
    for repetition in range(warmup + repeats):
        for name, way in WAYS.items():
            ms = _epochs(way, problem, seeds, LONG) - _epochs(way, problem, seeds, SHORT)
            if repetition >= warmup:
                samples[name].ms.append(ms / (LONG - SHORT))
    for name, of_way in samples.items():
        phase = f"epoch of {runs} runs"
        row = make_row("sweep", net, batch, dtype, name, phase, of_way.percentiles(), device, method="awm")
        outcome.rows.append(row)
    return outcome


def table(outcome: Outcome) -> str:
    """A line per way, and how many times as long as side by side it takes."""
    lines = [["", "ms", "20 %", "80 %", "/maskops"]]
    ours = next((row for row in outcome.rows if row.contestant == "maskops"), None)
    lines += [[r.contestant, r.ms_p50, r.ms_p20, r.ms_p80, f"{r.ms / ours.ms:.2f}"] for r in outcome.rows if ours]
    heads = [f"awm on {r.net}, batch {r.batch}, {r.dtype}: {r.phase} on {r.device}" for r in outcome.rows[:1]]
    notes = [f"{name}: no numbers, {reason}" for name, reason in outcome.absent.items()]
    return "\n".join([*heads, aligned(lines), *notes])


def _one_after_the_other(problem: Problem, seeds: list[dict[str, int]], epochs: int) -> list[Purification]:
    return [awm(*_clean(problem), **_options(problem, epochs), **own) for own in seeds]


def _side_by_side(problem: Problem, seeds: list[dict[str, int]], epochs: int) -> list[Any]:
    return sweep("awm", *_clean(problem), seeds, **_options(problem, epochs))


def _clean(problem: Problem) -> tuple[Any, Any]:
    return problem.model, (problem.images, problem.labels)


def _options(problem: Problem, epochs: int) -> dict[str, Any]:
    dtype = None if problem.dtype == torch.float32 else problem.dtype
    batch_size = problem.indices.shape[1]
    return {"preset": "official", "epochs": epochs, "batch_size": batch_size, "dtype": dtype, "progress": False}


def _epochs(way: Callable[..., Any], problem: Problem, seeds: list[dict[str, int]], epochs: int) -> float:
    start = time.perf_counter()
    way(problem, seeds, epochs)
    return 1e3 * (time.perf_counter() - start)


def _near(one: Purification, other: Any) -> bool:
    return isinstance(other, Purification) and all(
        len(values) == len(other.history[name])
        and all(abs(a - b) <= TOLERANCE * max(abs(a), 1) for a, b in zip(values, other.history[name], strict=True))
        for name, values in one.history.items()
    )


WAYS = {"one after the other": _one_after_the_other, "maskops": _side_by_side}
