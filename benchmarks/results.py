"""The rows of the benchmarks: one CSV per device, and the table on the screen."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import maskops

FOLDER = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Row:
    """One measurement; numbers that don't exist are empty.

    net:       a network, or the shape that an op works on
    dtype:     of the run; the official contestant is float32 in every run
    phase:     what was timed
    saved_mb:  most megabytes (10⁶) that autograd held for a backward
    peak_mb:   most megabytes of memory beyond the plain model and its images
    """

    benchmark: str
    net: str
    batch: str
    dtype: str
    contestant: str
    phase: str
    ms_p50: str
    ms_p20: str
    ms_p80: str
    saved_mb: str
    peak_mb: str
    device: str
    threads: str
    torch: str
    triton: str
    maskops: str
    revision: str
    date: str

    @property
    def run(self) -> tuple[str, ...]:
        """What is measured together, and so replaced together: times of two runs can't be compared."""
        return self.benchmark, self.net, self.batch, self.dtype

    @property
    def ms(self) -> float:
        return float(self.ms_p50)


@dataclass
class Outcome:
    """What a run found: rows; who has none, and why; failed is true when somebody's results were wrong."""

    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    failed: bool = False


COLUMNS = [column.name for column in fields(Row)]


def make_row(
    benchmark: str,
    net: str,
    batch: int | str,
    dtype: torch.dtype,
    contestant: str,
    phase: str,
    percentiles: tuple[float, float, float],
    device: torch.device,
    saved: float | None = None,
    peak: float | None = None,
) -> Row:
    """A row of the present machine, versions and revision; percentiles (20, 50, 80) in ms, memory in bytes."""
    p20, p50, p80 = (_number(value) for value in percentiles)
    saved_mb, peak_mb = ("" if value is None else _number(value / 1e6) for value in (saved, peak))
    what = benchmark, net, str(batch), str(dtype).removeprefix("torch."), contestant, phase
    return Row(*what, p50, p20, p80, saved_mb, peak_mb, *environment(device))


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def environment(device: torch.device) -> tuple[str, ...]:
    """Device, threads, versions of torch, Triton and maskops, git revision and date."""
    versions = torch.__version__, _triton_version(), maskops.__version__
    today = datetime.date.today().isoformat()
    return device_name(device), str(torch.get_num_threads()), *versions, revision(), today


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def file_name(device: str) -> str:
    """The name of a device as the name of a file.

    >>> file_name("Intel(R) Xeon(R) Processor @ 2.80GHz")
    'intel-xeon-processor-2.80ghz.csv'
    """
    plain = re.sub(r"\((R|TM)\)", " ", device, flags=re.I)
    return re.sub(r"[^a-z0-9.]+", "-", plain.lower()).strip("-.") + ".csv"


def revision() -> str:
    """The commit, with a plus when files differ from it; empty outside a repository."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--exclude=*", "--dirty=+"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip()


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def write(rows: Iterable[Row], out: Path | None = None) -> Path | None:
    """Write rows into their device's CSV, in the place of those that an earlier run of the same left there.

    out:     a CSV, or a folder of them; benchmarks/results by default
    returns: the CSV, or None when there are no rows
    """
    rows = list(rows)
    if not rows:
        return None
    out = FOLDER if out is None else out
    path = out if out.suffix == ".csv" else out / file_name(rows[0].device)
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = {row.run for row in rows}
    kept = [row for row in (read(path) if path.exists() else []) if row.run not in runs]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in sorted(kept + rows, key=lambda row: row.run))
    return path


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}; got {reader.fieldnames}")
        return [Row(**row) for row in reader]


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def say(what: str) -> None:
    """Progress, beside the tables."""
    print(what, file=sys.stderr, flush=True)


def aligned(table: list[list[Any]]) -> str:
    """A table as text: the first column to the left, all others to the right.

    >>> print(aligned([["net", "ms"], ["small_vgg", "12.5"]]))
    net          ms
    small_vgg  12.5
    """
    widths = [max(len(str(row[column])) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        first, *others = (str(cell) for cell in row)
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
