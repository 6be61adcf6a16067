"""The public functions on the shapes of real networks, against what anyone would write in plain torch."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.measure import Step, Timed, environment, first_line, full_float32, interleaved
from benchmarks.plan import OPS, plan
from benchmarks.problem import why_not
from benchmarks.results import Outcome, Row, aligned, make_row, say

BACKENDS = ("cuda", "triton", "reference")
WAYS = {"triton fused": "fused", "triton materialised": "materialised"}
UNMASKED = "triton unmasked"
"""The fused kernel with a mask of one number: what the mask costs is how much longer the fused kernel takes."""
FORCE, PIN = "MASKOPS_BACKEND", "MASKOPS_LAYERS"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.004}
"""Largest distance from plain torch, relative, as norms: about 4 units in the last place for the 16-bit dtypes."""
FLUSH_BYTES = 256 * 2**20
"""More than any L2 cache: a GPU's is emptied before every timed call."""


def run(
    nets: Sequence[str],
    batches: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    warmup: int,
    compiles: bool = False,
    wanted: Sequence[str] = OPS,
    deadline: float = math.inf,
) -> Outcome:
    """Compare, then time, every case; a contestant that disagrees or fails gets no number.

    deadline: of ``time.monotonic``, after which nothing is begun
    """
    outcome = Outcome()
    reason = why_not(dtype, device)
    if reason is not None:
        outcome.absent["ops"] = reason
        return outcome
    torch.manual_seed(0)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    entries, absent = plan(nets, batches, dtype, device)
    outcome.absent |= absent
    entries = [entry for entry in entries if entry.op in wanted]
    with settings(""):
        for done, entry in enumerate(entries):
            if time.monotonic() > deadline:
                outcome.absent["ops"] = f"the time was up before the last {len(entries) - done} of {len(entries)}"
                break
            try:
                for case in entry.make():
                    say(f"{case.phase}, {case.shape}")
                    steps = contestants(case, compiles, TOLERANCE[dtype], outcome)
                    timed = {name: _timed(name, step) for name, step in steps.items()}
                    for name, ms in interleaved(timed, repeats, warmup, device, flush).items():
                        where = case.shape, entry.batch, dtype, name, case.phase
                        outcome.rows.append(make_row("ops", *where, ms.percentiles(), device=device))
            except torch.OutOfMemoryError as error:
                outcome.absent[f"{entry.op}, {done + 1} of {len(entries)}"] = first_line(error)
            except (RuntimeError, TypeError, ValueError) as error:
                outcome.absent[f"{entry.op}, {done + 1} of {len(entries)}"] = first_line(error)
                outcome.failed = True
    return outcome


@contextmanager
def settings(name: str) -> Iterator[None]:
    """Inside, the environment is that of a contestant."""
    forced, pinned = _settings(name)
    with environment(FORCE, forced), environment(PIN, pinned):
        yield


def _settings(name: str) -> tuple[str, str]:
    """What the environment variables FORCE and PIN are for a contestant."""
    backend = name.split()[0] if name else ""
    pinned = "fused" if name == UNMASKED else WAYS.get(name, "")
    return backend if backend in BACKENDS else "", pinned


def _timed(name: str, step: Step) -> Timed:
    def force_backend(repetition: int) -> None:
        os.environ[FORCE], os.environ[PIN] = _settings(name)

    return Timed(lambda repetition: step(), force_backend)


def contestants(case: Case, compiles: bool, tolerance: float, outcome: Outcome) -> dict[str, Step]:
    """Those that agree with plain torch, by name; the others are noted in the outcome."""
    makers = {"eager": case.plain}
    if compiles and case.compiled is not None:
        makers["compile"] = case.compiled
    for backend in BACKENDS:
        makers[backend] = case.ours
        if backend == "triton" and case.ways:
            makers |= dict.fromkeys(WAYS, case.ours)
        if backend == "triton" and case.unmasked is not None:
            makers[UNMASKED] = case.unmasked.ours
    steps = {}
    with full_float32():
        expected = case.plain()()
        for name, make in makers.items():
            what = f"{name}, {case.phase}, {case.shape}"
            try:
                step = make()
                with settings(name):
                    found = step()
                error = _distance(case.unmasked.plain()() if name == UNMASKED else expected, found)
            except Exception as reason:
                if "was asked for, but" not in str(reason):
                    outcome.absent[what] = first_line(reason)
                    outcome.failed |= name != "compile" and not isinstance(reason, torch.OutOfMemoryError)
                continue
            if not error <= tolerance:
                outcome.absent[what] = f"{error:.2g} away from plain torch"
                outcome.failed = True
                continue
            steps[name] = step
    return {**steps, "floor": case.floor()}


@torch.no_grad()
def _distance(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    errors = [float((a.float() - e.float()).norm() / e.float().norm()) for e, a in zip(expected, actual, strict=True)]
    return max(errors, key=lambda error: (error != error, error))


def compile_kernels(processes: int, *what) -> None:
    """Run every case once in so many processes, each its share: the kernels are then in Triton's cache.

    what: nets, batches, dtype, device, wanted and deadline of :func:`run`, where what fails here fails again
    """
    say(f"compiling in {processes} processes")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=run_share, args=(share, processes, *what)) for share in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def run_share(share: int, shares: int, nets, batches, dtype, device, wanted, deadline) -> int:
    """Run the share's cases, until the deadline; returns how many contestants there were."""
    torch.set_num_threads(1)
    count = 0
    entries, _ = plan(nets, batches, dtype, device)
    for entry in [entry for entry in entries if entry.op in wanted][share::shares]:
        if time.monotonic() > deadline:
            break
        with suppress(Exception):
            for case in entry.make():
                for name, step in contestants(case, False, math.inf, Outcome()).items():
                    with settings(name):
                        step()  # once more, in the precision of float32 that is timed
                    count += 1
    return count


def table(outcome: Outcome) -> str:
    """One line per case, a column of ms per contestant, and how much longer the mask makes the fused kernel."""
    names = list(dict.fromkeys(row.contestant for row in outcome.rows))
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in outcome.rows:
        found.setdefault((row.phase, row.net), {})[row.contestant] = row
    priced = UNMASKED in names
    lines = [["ms", *names, *(["fused/unmasked"] if priced else [])]]
    for (phase, shape), rows in found.items():
        line = [f"{phase}, {shape}", *(rows[name].ms_p50 if name in rows else "" for name in names)]
        lines.append([*line, _price(rows)] if priced else line)
    notes = [f"{what}: no numbers, {reason}" for what, reason in outcome.absent.items()]
    return "\n".join([aligned(lines) if outcome.rows else "", *notes]).strip()


def _price(rows: dict[str, Row]) -> str:
    if UNMASKED not in rows or "triton fused" not in rows:
        return ""
    return f"{rows['triton fused'].ms / rows[UNMASKED].ms:.2f}"
