"""Rows of steps, put together as tables and pictures show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from benchmarks.results import Row
from benchmarks.steps import PHASES

EAGER = ("eager", "lean", "tf32", "careful", "parametrize", "parametrize-cached", "functional")
COMPILED = ("naive", "naive-graphs", "naive-autotune", "compile", "compile-graphs", "graph")
"""What can be done without this package: op by op, and compiled or captured as a CUDA graph."""


def measured_steps(rows: Iterable[Row]) -> list[tuple[str, str, dict[str, Row]]]:
    """(network, batch and dtype; method and phase; the rows by contestant) of each step."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.benchmark == "steps" and row.phase in PHASES[row.method]:
            title = f"{row.net}, {row.batch}, {row.dtype}"
            found.setdefault((title, f"{row.method.upper()} {row.phase}"), {})[row.contestant] = row
    return [(*key, by_name) for key, by_name in found.items()]


def fastest(by_name: Mapping[str, Row], names: Iterable[str]) -> Row | None:
    """The fastest of these contestants, if any was measured."""
    return min((by_name[name] for name in names if name in by_name), key=lambda row: row.ms, default=None)
