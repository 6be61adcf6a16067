"""The CSV of a table, a row for each run and measurement, and the markdown made from it."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.results import revision
from benchmarks.tables.cells import ASR_EXCL, TABLES, Cell, figure, figures
from maskops import __version__
from maskops.backdoor import Metrics

KEY = ("net", "attack", "n", "method", "seed", "preset", "changes", "victim")
_OTHER_MODELS = "The paper's ASR is this package's `{}`; its models are other ones than these. "
_COST = (
    "Seconds and memory (on a CPU the most that the process ever had) are those of runs as they happened, other work"
    " beside them: no benchmark."
)
COLUMNS = (
    *(*KEY, "part"),
    *("acc_before", "asr_all_before", "acc", "asr_all", "asr_excl", "ra"),
    *("seconds", "peak_mib", "device", "threads", "torch", "maskops", "revision"),
)


class Record:
    """``TABLE.csv`` in a folder: rows are only ever added, so that an interrupted table goes on where it stopped."""

    def __init__(self, folder: Path, table: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{table}.csv"
        self._done = {tuple(row[name] for name in KEY) for row in read(self.path)}

    def has(self, cell: Cell) -> bool:
        return cell.key in self._done

    def add(
        self,
        cell: Cell,
        before: Mapping[str, Metrics],
        after: Mapping[str, Metrics],
        timings: Mapping[str, float],
        device: str,
    ) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self.path.exists():
            writer.writerow(COLUMNS)
        for part, metrics in after.items():
            rates = (before[part].acc, before[part].asr_all, metrics.acc, metrics.asr_all, metrics.asr_excl)
            numbers = [f"{100 * rate:.2f}" for rate in (*rates, metrics.ra)]
            cost = f"{timings['total']:.1f}", f"{timings['peak_bytes'] / 2**20:.0f}"
            where = device, torch.get_num_threads(), torch.__version__, __version__, revision()
            writer.writerow([*cell.key, part, *numbers, *cost, *where])
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())  # all parts at once: a run is there or it isn't
        self._done.add(cell.key)


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def markdown(folder: Path, table: str) -> str:
    """Write ``TABLE.md`` from ``TABLE.csv``: the paper's figures and ours, mean ± spread over seeds; return it."""
    rows, paper = read(folder / f"{table}.csv"), figures(table)
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        place = tuple(row[name] for name in ("net", "part", "n", "method", "preset", "changes", "victim"))
        groups.setdefault(place, []).append(row)
    asr = "asr_excl" if table in ASR_EXCL else "asr_all"
    other = "asr_all" if asr == "asr_excl" else "asr_excl"
    about = _OTHER_MODELS.format(asr) if paper else ""
    lines = [
        f"# {TABLES[table]}",
        "",
        f"In percent. {about}Made by `python -m benchmarks tables --table {table}`.",
        "",
        f"| net | attack | before: ACC / asr_all | n | method | paper: ACC / ASR | ACC | {asr} | {other} | s | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (net, part, n, method, preset, changes, _), runs in groups.items():
        before = f"{runs[0]['acc_before']} / {runs[0]['asr_all_before']}"
        named = " ".join(filter(None, (method, "" if preset == "paper" else f"({preset})", changes)))
        shown = figure(paper, net, part, n, method)
        numbers = [_spread(runs, name) for name in ("acc", asr, other)]
        cost = [f"{statistics.fmean(float(run[name]) for run in runs):.0f}" for name in ("seconds", "peak_mib")]
        lines.append("| " + " | ".join([net, part, before, n, named, shown, *numbers, *cost]) + " |")
    if rows:
        lines += ["", f"{_where(rows)}; mean ± standard deviation where several seeds ran. {_COST}"]
    text = "\n".join(lines) + "\n"
    (folder / f"{table}.md").write_text(text, encoding="utf-8")
    return text


def _spread(runs: list[dict[str, str]], name: str) -> str:
    values = [float(run[name]) for run in runs]
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 and not math.isnan(mean) else f"{mean:.1f}"


def _where(rows: list[dict[str, str]]) -> str:
    places = {f"{row['device']}, {row['threads']} threads, torch {row['torch']}" for row in rows}
    return "; ".join(sorted(places))
