"""The rows of one run of steps as a person reads them."""

from __future__ import annotations

from benchmarks.ceilings import NAME
from benchmarks.results import Outcome, Row, aligned

HEAD = ["", "ms", "20 %", "80 %", "official/", "/floor", "TFLOP/s", "% matmul", "% copy", "launches"]
HEAD += ["saved MB", "peak MB", "reserved MB"]


def table(outcome: Outcome) -> str:
    """A table per phase, each contestant beside the published procedure and the floor, and what else was found."""
    phases: dict[str, dict[str, Row]] = {}
    notes = []
    for row in outcome.rows:
        if row.contestant == NAME:
            rate = f"{row.tflops} TFLOP/s" if row.gflop else f"{float(row.gb) / row.ms * 1e3:.4g} GB/s read and written"
            notes.append(f"{NAME}, {row.phase}: {rate}")
        elif row.phase in ("compilation", "capture"):
            notes.append(f"{row.contestant}: {row.ms / 1e3:.1f} s of {row.phase}")
        else:
            phases.setdefault(row.phase, {})[row.contestant] = row
    blocks = []
    for phase, rows in phases.items():
        first = next(iter(rows.values()))
        head = f"{first.method} on {first.net}, batch {first.batch}, {first.dtype}: {phase} on {first.device}"
        lines = [HEAD]
        for name, row in rows.items():
            ratios = _ratio(rows.get("official"), row), _ratio(row, rows.get("floor"))
            shares = (_percent(share) for share in (row.of_matmul, row.of_copy))
            times = row.ms_p50, row.ms_p20, row.ms_p80
            memory = row.saved_mb, row.peak_mb, row.reserved_mb
            lines.append([name, *times, *ratios, row.tflops, *shares, row.launches, *memory])
        blocks.append(f"{head}\n{aligned(lines)}")
    by_reason: dict[str, list[str]] = {}
    for name, reason in outcome.absent.items():
        by_reason.setdefault(reason, []).append(name)
    notes += [f"{'; '.join(names)}: no numbers, {reason}" for reason, names in by_reason.items()]
    return "\n\n".join([*blocks, "\n".join(notes)]).strip()


def _ratio(row: Row | None, other: Row | None) -> str:
    return "" if row is None or other is None else f"{row.ms / other.ms:.2f}"


def _percent(share: str) -> str:
    return f"{100 * float(share):.0f}" if share else ""
