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

    method:      whose steps they are; empty for ops
    net:         a network, or the shape that an op works on
    dtype:       of the run; the official contestant is float32 in every run
    phase:       what was timed
    gflop, gb:   floating-point operations and bytes of tensors, counted, in 10⁹
    tflops:      10¹² floating-point operations a second
    of_matmul, of_copy: share of the rates of a large matrix product, and of a large copy, in the same run
    launches:    kernels that ran on a GPU; elsewhere the ops that would each be at least one
    saved_mb:    most megabytes (10⁶) that autograd held for a backward
    peak_mb:     most megabytes of memory beyond the plain model and its images
    reserved_mb: the same, of what torch's allocator took from a GPU
    """

    benchmark: str
    method: str
    net: str
    batch: str
    dtype: str
    contestant: str
    phase: str
    ms_p50: str
    ms_p20: str
    ms_p80: str
    gflop: str
    gb: str
    tflops: str
    of_matmul: str
    of_copy: str
    launches: str
    saved_mb: str
    peak_mb: str
    reserved_mb: str
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
        return self.benchmark, self.method, self.net, self.batch, self.dtype

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


@dataclass(frozen=True)
class Extent:
    """How much a step is, beside its time; None for what isn't known. Memory in bytes."""

    flops: float | None = None
    bytes: float | None = None
    launches: int | None = None
    saved: float | None = None
    peak: float | None = None
    reserved: float | None = None


@dataclass(frozen=True)
class Ceilings:
    """What the device was seen to reach: floating-point operations, and bytes read and written, in a millisecond."""

    flops: float
    bytes: float


def make_row(
    benchmark: str,
    net: str,
    batch: int | str,
    dtype: torch.dtype,
    contestant: str,
    phase: str,
    percentiles: tuple[float, float, float],
    device: torch.device,
    method: str = "",
    extent: Extent | None = None,
    ceilings: Ceilings | None = None,
) -> Row:
    """A row of the present machine, versions and revision; percentiles (20, 50, 80) in ms."""
    extent = extent or Extent()
    p20, ms, p80 = percentiles
    flops = extent.flops or None
    shares = (None, None)
    if ceilings is not None:
        shares = _ratio(flops, ms * ceilings.flops), _ratio(extent.bytes, ms * ceilings.bytes)
    amounts = _ratio(flops, 1e9), _ratio(extent.bytes, 1e9), _ratio(flops, 1e9 * ms), *shares, extent.launches
    memory = (_ratio(size, 1e6) for size in (extent.saved, extent.peak, extent.reserved))
    what = benchmark, method, net, str(batch), str(dtype).removeprefix("torch."), contestant, phase
    return Row(*what, *map(_number, (ms, p20, p80, *amounts, *memory)), *environment(device))


def _ratio(value: float | None, unit: float) -> float | None:
    return None if value is None or not unit else value / unit


def _number(value: float | None) -> str:
    if value is None:
        return ""
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
