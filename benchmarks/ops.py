"""The public functions on the shapes of real networks, against what anyone would write in plain torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Make, cases
from benchmarks.measure import Step, Timed, full_float32, interleaved
from benchmarks.problem import why_not
from benchmarks.results import Outcome, aligned, make_row, say

BACKENDS = ("cuda", "triton", "reference")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.004}
"""Largest distance from plain torch, relative, as norms: about 4 units in the last place for the 16-bit dtypes."""
FLUSH_BYTES = 256 * 2**20
"""More than any L2 cache: a GPU's is emptied before every timed call."""


def run(
    nets: Sequence[str],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    warmup: int,
    compiles: bool = False,
) -> Outcome:
    """Compare, then time, every case; a contestant that disagrees gets no number."""
    outcome = Outcome()
    reason = why_not(dtype, device)
    if reason is not None:
        outcome.absent["ops"] = reason
        return outcome
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for case in cases(nets, batch, dtype, device):
        say(f"{case.phase}, {case.shape}")
        steps = contestants(case, compiles, TOLERANCE[dtype], outcome)
        timed = {name: Timed(lambda repetition, step=step: step()) for name, step in steps.items()}
        samples = interleaved(timed, repeats, warmup, device, flush)
        for name, ms in samples.items():
            outcome.rows.append(
                make_row("ops", case.shape, batch, dtype, name, case.phase, ms.percentiles(), device=device)
            )
    return outcome


def contestants(case: Case, compiles: bool, tolerance: float, outcome: Outcome) -> dict[str, Step]:
    """Those that agree with plain torch, by name; the others are noted in the outcome."""
    makers = {"eager": case.plain}
    if compiles and case.compiled is not None:
        makers["compile"] = case.compiled
    makers |= {backend: partial(_forced, backend, case.ours) for backend in BACKENDS}
    steps = {}
    with full_float32():
        expected = case.plain()()
        for name, make in makers.items():
            step = make()
            try:
                error = _distance(expected, step())
            except RuntimeError as reason:
                if "was asked for, but" not in str(reason):
                    raise
                continue
            if not error <= tolerance:
                outcome.absent[f"{name}, {case.phase}, {case.shape}"] = f"{error:.2g} away from plain torch"
                outcome.failed = True
                continue
            steps[name] = step
    return {**steps, "floor": case.floor()}


def _forced(backend: str, make: Make) -> Step:
    """The step, on that backend whatever else there is."""
    step = make()

    def forced() -> Any:
        with forced_backend(backend):
            return step()

    return forced


@contextmanager
def forced_backend(backend: str) -> Iterator[None]:
    before = os.environ.get("MASKOPS_BACKEND")
    os.environ["MASKOPS_BACKEND"] = backend
    try:
        yield
    finally:
        del os.environ["MASKOPS_BACKEND"]
        if before is not None:
            os.environ["MASKOPS_BACKEND"] = before


@torch.no_grad()
def _distance(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    errors = [float((a.float() - e.float()).norm() / e.float().norm()) for e, a in zip(expected, actual, strict=True)]
    return max(errors, key=lambda error: (error != error, error))


def table(outcome: Outcome) -> str:
    """One line per case, a column of ms per contestant."""
    names = list(dict.fromkeys(row.contestant for row in outcome.rows))
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in outcome.rows:
        found.setdefault((row.phase, row.net), {})[row.contestant] = row.ms_p50
    lines = [["ms", *names]]
    lines += [[f"{phase}, {shape}", *(ms.get(name, "") for name in names)] for (phase, shape), ms in found.items()]
    notes = [f"{what}: no numbers, {reason}" for what, reason in outcome.absent.items()]
    return "\n".join([aligned(lines) if outcome.rows else "", *notes]).strip()
