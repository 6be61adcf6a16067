"""The README's tables, from the results."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks import large, plots
from benchmarks.groups import COMPILED, EAGER, fastest, measured_steps
from benchmarks.ops import BACKENDS
from benchmarks.results import Row, read
from benchmarks.steps import AGAIN

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def main(readme: Path, folder: Path, check: bool = False) -> int:
    """Write the tables between the two marks of the README, and of docs/large.md beside it, and a picture for each CSV.

    check: only find out whether the tables are up to date
    """
    contents, memory = {readme: report(folder)}, readme.parent / "docs" / "large.md"
    if memory.exists():
        contents[memory] = large.report(folder / "large")
    for path, content in contents.items():
        if not path.exists():
            print(f"report: there is no {path}", file=sys.stderr)
            return 1
        before = path.read_text()
        after = between_marks(before, content)
        if check and after != before:
            print(f"report: {path} is out of date; run python -m benchmarks report", file=sys.stderr)
            return 1
        if not check:
            path.write_text(after)
    if check:
        return 0
    for path in sorted(folder.glob("*.csv")):
        bars = plots.bars_of(measured_steps(read(path)))
        reason = plots.write(path.with_suffix(".svg"), path.stem, bars) if bars else None
        if reason is not None:
            print(f"report: {reason}", file=sys.stderr)
            return 1
    return 0


def between_marks(text: str, content: str) -> str:
    """The text with the content between the two marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"report: expected one {BEGIN} and, after it, one {END}")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return "\n".join([before + BEGIN, *([content] if content else []), END + after])


def report(folder: Path) -> str:
    """A table for each CSV in the folder, with what we lose below it."""
    devices = [device_report(rows) for path in sorted(folder.glob("*.csv")) if (rows := read(path))]
    return "\n\n".join(devices)


def device_report(rows: list[Row]) -> str:
    """The table of one device."""
    threads, torch, triton, maskops, revision, date = (
        " and ".join(dict.fromkeys(getattr(row, column) or "none" for row in rows))
        for column in ("threads", "torch", "triton", "maskops", "revision", "date")
    )
    head = f"**{rows[0].device}**, threads {threads}, torch {torch}, Triton {triton}, maskops {maskops}"
    head += f" at revision {revision}, {date}"
    lines = [
        "| network, batch, dtype | step | official ms | best eager | best compiled | maskops | official / maskops "
        "| floor | peak MB, official | peak MB, maskops |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for title, step, by_name in measured_steps(rows):
        official, ours, floor = (by_name.get(name) for name in ("official", "maskops", "floor"))
        if official is None or ours is None:
            continue
        plain = [fastest(by_name, names) for names in (EAGER, COMPILED)]
        cells = [title, step, official.ms_p50, *map(_ms, plain), f"**{ours.ms_p50}**", f"{official.ms / ours.ms:.2f}"]
        lines.append(f"| {' | '.join([*cells, _ms(floor), official.peak_mb, ours.peak_mb])} |")
        best = min((row for row in plain if row is not None), key=lambda row: row.ms, default=None)
        if best is not None and best.ms < ours.ms:
            times = f"{best.ms_p50} against {ours.ms_p50} ms"
            notes.append(f"{title}, {step}: `{best.contestant}` is faster than maskops, {times}")
    notes += _noise(rows) + _lost_ops(rows)
    return "\n".join([head, "", *lines, "", *(f"- {note}." for note in notes)]).strip()


def _noise(rows: Iterable[Row]) -> list[str]:
    """How far two timings of one contestant are apart, at worst."""
    apart = [
        abs(by_name[AGAIN].ms / by_name["maskops"].ms - 1)
        for _, _, by_name in measured_steps(rows)
        if AGAIN in by_name and "maskops" in by_name
    ]
    return [f"Noise: maskops timed twice in one run differs by up to {max(apart):.0%}"] if apart else []


def _lost_ops(rows: Iterable[Row]) -> list[str]:
    """On how many single ops plain torch is faster than the backend that serves them, the first there is; the worst."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row.benchmark == "ops":
            found.setdefault((row.phase, row.net, row.dtype), {})[row.contestant] = row
    slower = {}
    for key, by_name in found.items():
        ours = next((by_name[name] for name in BACKENDS if name in by_name), None)
        plain = [by_name[name].ms for name in ("eager", "compile") if name in by_name]
        if ours is not None and plain:
            slower[key] = ours.ms / min(plain)
    lost = {key: ratio for key, ratio in slower.items() if ratio > 1.05}
    if not lost:
        return [f"Single ops: none of {len(slower)} is more than 5 % slower than plain torch"] if slower else []
    (phase, shape, dtype), ratio = max(lost.items(), key=lambda item: item[1])
    where = f"{phase} on {shape}, {dtype}"
    return [
        f"Single ops: {len(lost)} of {len(slower)} are slower than plain torch, at worst {ratio:.2f} times ({where})"
    ]


def _ms(row: Row | None) -> str:
    return "" if row is None else row.ms_p50
