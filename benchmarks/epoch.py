"""A whole epoch of AWM: the published one, with and without its data loader, against ``maskops.purify.awm``."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks import loaders, networks
from benchmarks.contestants import CONTESTANTS
from benchmarks.measure import Samples, first_line
from benchmarks.problem import ROTATION, STEPS, Problem, make_problem, why_not
from benchmarks.results import Outcome, Row, aligned, make_row, say
from maskops.purify import awm

EPOCHS = 2
"""Epochs that a timed run of maskops has more than the one it is held against, so that what they share drops out."""
WITH_LOADER, WITHOUT = "epoch with loader", "epoch"


def run(net: str, batch: int, dtype: torch.dtype, device: torch.device, repeats: int) -> Outcome:
    """Time 15 inner and 15 outer steps, whatever the batch; nothing is evaluated, as the published script also does."""
    outcome = Outcome()
    reason = why_not(dtype, device) or networks.why_not(net)
    if reason is not None:
        outcome.absent["epoch"] = reason
        return outcome
    problem = make_problem(net, batch, dtype, device)
    official = CONTESTANTS["awm"]["official"](problem)
    official.reset()
    ways: dict[tuple[str, str], Callable[[], float]] = {
        ("official", WITH_LOADER): lambda: _seconds(lambda: _published(official, loaders.batches), device),
        ("official", WITHOUT): lambda: _seconds(lambda: _published(official, _resident), device),
        ("maskops", WITHOUT): lambda: _ours(problem),
    }
    for (name, phase), way in ways.items():
        say(f"{net}: {name}, {phase}")
        try:
            way()  # kernels are compiled and chosen
            samples = Samples([1e3 * way() for _ in range(repeats)])
        except Exception as error:
            outcome.absent[f"{name}, {phase}"] = first_line(error)
            outcome.failed = True
            continue
        row = make_row("epoch", net, batch, dtype, name, phase, samples.percentiles(), device, method="awm")
        outcome.rows.append(row)
    return outcome


def _published(official, batches: Callable) -> None:
    for images, labels in batches(official.problem, STEPS):
        official.ascend(images, labels)
    for images, labels in batches(official.problem, STEPS):
        official.descend(images, labels)


def _resident(problem: Problem, count: int):
    """Batches that are on the device already."""
    ready = problem.batches(torch.contiguous_format)
    return (ready[index % ROTATION] for index in range(count))


def _ours(problem: Problem) -> float:
    """Seconds of an epoch: those of a longer run less those of a shorter one, over how many epochs it has more."""

    def purify(epochs: int) -> float:
        steps = {"inner_steps": STEPS, "outer_steps": STEPS, "batch_size": problem.indices.shape[1]}
        dtype = None if problem.dtype == torch.float32 else problem.dtype
        where = {"device": problem.device, "dtype": dtype, "layers": networks.masked_kinds(problem.net)}
        data = problem.images, problem.labels
        how = {"preset": "official", "progress": False, **steps, **where}
        return _seconds(lambda: awm(problem.model, data, epochs=epochs, **how), problem.device)

    short = purify(1)
    return (purify(1 + EPOCHS) - short) / EPOCHS


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def table(outcome: Outcome) -> str:
    """One line per way, and how many times as long as ours it takes."""
    lines = [["", "ms", "20 %", "80 %", "/maskops"]]
    ours = next((row for row in outcome.rows if row.contestant == "maskops"), None)
    for row in outcome.rows:
        ratio = "" if ours is None else f"{row.ms / ours.ms:.2f}"
        lines.append([f"{row.contestant}, {row.phase}", row.ms_p50, row.ms_p20, row.ms_p80, ratio])
    notes = [f"{what}: no numbers, {reason}" for what, reason in outcome.absent.items()]
    return "\n".join([*_head(outcome.rows[:1]), *([aligned(lines)] if outcome.rows else []), *notes])


def _head(rows: list[Row]) -> list[str]:
    return [f"{row.method} on {row.net}, batch {row.batch}, {row.dtype}: an epoch on {row.device}" for row in rows]
