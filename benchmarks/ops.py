"""The public functions on the shapes of real networks, against what anyone would write in plain torch."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.cases import Case, cases
from benchmarks.measure import Step, Timed, environment, full_float32, interleaved
from benchmarks.problem import why_not
from benchmarks.results import Outcome, aligned, first_line, make_row, say

BACKENDS = ("cuda", "triton", "reference")
FORCE = "MASKOPS_BACKEND"
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
    torch.manual_seed(0)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    with environment(FORCE, ""):
        for case in cases(nets, batch, dtype, device):
            say(f"{case.phase}, {case.shape}")
            steps = contestants(case, compiles, TOLERANCE[dtype], outcome)
            timed = {name: _timed(name, step) for name, step in steps.items()}
            for name, ms in interleaved(timed, repeats, warmup, device, flush).items():
                row = make_row("ops", case.shape, batch, dtype, name, case.phase, ms.percentiles(), device=device)
                outcome.rows.append(row)
    return outcome


def _timed(name: str, step: Step) -> Timed:
    def force_backend(repetition: int) -> None:
        os.environ[FORCE] = name if name in BACKENDS else ""

    return Timed(lambda repetition: step(), force_backend)


def contestants(case: Case, compiles: bool, tolerance: float, outcome: Outcome) -> dict[str, Step]:
    """Those that agree with plain torch, by name; the others are noted in the outcome."""
    makers = {"eager": case.plain}
    if compiles and case.compiled is not None:
        makers["compile"] = case.compiled
    makers |= dict.fromkeys(BACKENDS, case.ours)
    steps = {}
    with full_float32():
        expected = case.plain()()
        for name, make in makers.items():
            what = f"{name}, {case.phase}, {case.shape}"
            try:
                step = make()
                with environment(FORCE, name if name in BACKENDS else ""):
                    error = _distance(expected, step())
            except Exception as reason:
                if name == "compile":
                    outcome.absent[what] = first_line(reason)
                elif "was asked for, but" not in str(reason):
                    raise
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
