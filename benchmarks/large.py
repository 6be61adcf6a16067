"""What memory AWM needs for large networks: as published, by default, and with a plan for GPUs of several sizes."""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import maskops
from benchmarks import networks
from benchmarks.dry import without_memory
from benchmarks.measure import first_line
from benchmarks.problem import make_problem
from benchmarks.published import Official
from benchmarks.results import FOLDER, aligned, device_name, file_name, revision, say
from maskops.purify._meter import Meter
from maskops.purify._plan import Plan, _first_epoch, plans
from maskops.purify.awm import AWM

NETS = ("vit_l", "vit_h", "vit_g", "convnext_xl")
BUDGETS = (12.0, 24.0, 40.0, 80.0, 141.0)
"""Gigabytes (10⁹) of GPUs."""
BATCH, IMAGES = 32, 100
STEPS = 8
"""Of each kind, that are timed: after as many others, among which one is recorded."""
PREDICTED = "predicted"
"""In the place of a device where nothing was measured."""
PUBLISHED = 36
"""Bytes that the published code holds for each masked parameter: weight, mask, noise, the gradients of weight and mask,
Adam's two moments, and the product of weight and mask in the graphs of two branches, four each."""
PARTS = ("weights", "masks", "effective weights", "gradients", "optimiser")


@dataclass(frozen=True)
class Row:
    """Gigabytes are 10⁹ bytes; what wasn't found out is empty.

    parameters: masked ones, in millions
    contestant: ``official``, ``maskops``, or ``maskops`` in so many GB
    options:    what the plan has chosen
    predicted:  gigabytes at most, by its plan
    bytes:      that are held throughout for each masked parameter
    parts:      of these, gigabytes by name
    inner, outer: gigabytes that a step needs beside what is held
    measured:   gigabytes at most, by torch's allocator
    step:       time of an inner and an outer step, of that without options
    """

    net: str
    parameters: str
    contestant: str
    options: str
    predicted: str
    bytes: str
    parts: str
    inner: str
    outer: str
    fits: str
    measured: str
    step: str
    device: str
    torch: str
    maskops: str
    revision: str


COLUMNS = [field.name for field in fields(Row)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--net", nargs="+", default=list(NETS), help=f"of {', '.join(networks.OTHERS)}")
    parser.add_argument("--budget", nargs="+", type=float, default=list(BUDGETS), help="gigabytes of a GPU")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--dry", action="store_true", help="predict only, as where torch sees no CUDA device")
    parser.add_argument("--out", type=Path, default=FOLDER / "large", help="folder of a CSV per device")


def main(options: argparse.Namespace) -> int:
    """0 when all is well; 1 when a network gave no numbers."""
    dry = options.dry or not torch.cuda.is_available()
    failed = False
    for net in options.net:
        reason = networks.why_not(net)
        if reason is not None:
            print(f"{net}: no numbers, {reason}\n")
            failed = True
            continue
        rows = list(_rows(net, options.batch, options.budget, None if dry else torch.device("cuda")))
        print(f"{net}, batch {options.batch}\n{table(rows)}\n", flush=True)
        write(rows, options.out)
    return int(failed)


def _rows(net: str, batch: int, budgets: Sequence[float], device: torch.device | None) -> Iterator[Row]:
    where = PREDICTED if device is None else device_name(device), torch.__version__, maskops.__version__, revision()
    say(f"{net}: the published code")
    model = networks.build_without_data(net)
    size, usual = networks.image_size(net), {"layers": networks.masked_kinds(net), "batch_size": batch}
    about = {"shape": (3, size, size), "classes": 1000, "images": IMAGES}
    parameters = sum(layer.weight.numel() for layer in networks.masked_layers(net, model).values())
    millions = _number(parameters / 1e6)
    official = _number(published_peak(net, batch) / 1e9)
    yield Row(net, millions, "official", "", official, str(PUBLISHED), *[""] * 6, *where)
    say(f"{net}: plans")
    found = plans(model, "awm", [None, *(1e9 * budget for budget in budgets)], **about, **usual)
    names = ["maskops", *(f"maskops, {budget:g} GB" for budget in budgets)]
    unhindered = None
    for name, plan in zip(names, found, strict=True):
        chosen = {option: value for option, value in plan.options.items() if option not in usual}
        row = _predicted(net, millions, name, plan, chosen, where)
        row = row if name != "maskops" else replace(row, fits="")
        if device is not None:
            say(f"{net}: {name}")
            row, seconds = _measured(row, net, {**usual, **chosen}, device)
            unhindered = seconds if name == "maskops" else unhindered
            if seconds is not None and unhindered is not None:
                row = replace(row, step=f"{seconds / unhindered:.2f}")
        yield row


def published_peak(net: str, batch: int) -> int:
    """The most bytes of tensors at one time of the published steps, beside the clean images."""
    with without_memory(), Meter() as meter:
        problem = make_problem(net, batch, torch.float32, torch.device("cpu"), as_gpu=True)
        there = meter.now()
        official = Official(problem)
        spare = sum(images.nbytes for images, _ in official.batches[1:])
        official.reset()
        meter.begin()
        for index in range(2):
            official.inner(index)
        for index in range(2):
            official.outer(index)
        return meter.peak - there - spare


def _predicted(net: str, millions: str, name: str, plan: Plan, chosen: dict[str, Any], where: Sequence[str]) -> Row:
    options = ", ".join(f"{option}={str(value).removeprefix('torch.')}" for option, value in chosen.items())
    parts = " + ".join(_number(plan.kept[part] / 1e9) for part in PARTS)
    phases = (_number(plan.phases[phase] / 1e9) for phase in ("inner", "outer"))
    amounts = _number(plan.peak / 1e9), f"{plan.bytes_per_parameter:.1f}", parts
    return Row(net, millions, name, options, *amounts, *phases, "yes" if plan.fits else "no", "", "", *where)


def _measured(row: Row, net: str, options: dict[str, Any], device: torch.device) -> tuple[Row, float | None]:
    """The row with what torch's allocator counts, and the seconds of an inner and an outer step."""
    try:
        peak, seconds = _run(net, options, device)
    except (torch.OutOfMemoryError, ValueError) as error:
        found = None, first_line(error)
    else:
        return replace(row, measured=_number(peak / 1e9)), seconds
    say(f"{net}: {found[1]}")
    torch.cuda.empty_cache()
    return replace(row, measured="out of memory"), None


def _run(net: str, options: dict[str, Any], device: torch.device) -> tuple[int, float]:
    torch.cuda.empty_cache()
    size = networks.image_size(net)
    with torch.device(device):
        model = networks.build(net)
    data = (torch.rand(IMAGES, 3, size, size) * 255).round() / 255, torch.arange(IMAGES)
    steps = {"epochs": 1, "inner_steps": STEPS, "outer_steps": STEPS, "progress": False}
    torch.cuda.reset_peak_memory_stats(device)
    algorithm = AWM(model, data, "paper", None, {**options, **steps})
    phases = list(_first_epoch(algorithm))
    for _ in range(2):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for phase in phases:
            with algorithm.run.quiet(), phase.around():
                phase.run()
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device), (time.perf_counter() - start) / STEPS


def write(rows: Sequence[Row], folder: Path) -> None:
    """Rows into their device's CSV, in the place of those of the same network."""
    path = folder / file_name(rows[0].device)
    folder.mkdir(parents=True, exist_ok=True)
    new = {row.net for row in rows}
    kept = [row for row in (read(path) if path.exists() else []) if row.net not in new]
    order = {net: place for place, net in enumerate(NETS)}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, sorted([*kept, *rows], key=lambda row: order.get(row.net, len(order)))))


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [Row(**row) for row in csv.DictReader(file)]


HEAD = ["", "predicted GB", "bytes/parameter", "θ + m + θ⊙m + gradient + Adam", "inner", "outer", "fits"]
MEASURED = ["measured GB", "predicted / measured", "step"]


def table(rows: Sequence[Row]) -> str:
    """On the screen."""
    return aligned([[*HEAD, "options"], *([row.contestant, *_cells(row), row.options] for row in rows)])


def report(folder: Path) -> str:
    """A table for each device's CSV in a folder, as markdown."""
    return "\n\n".join(_markdown(rows) for path in sorted(folder.glob("*.csv")) if (rows := read(path)))


def _markdown(rows: Sequence[Row]) -> str:
    measured = any(row.measured for row in rows)
    head = ["network", "masked parameters, 10⁶", *HEAD, *(MEASURED if measured else []), "options"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row.net, row.parameters, row.contestant, *_cells(row)]
        cells += [row.measured, _ratio(row), row.step] if measured else []
        lines.append("| " + " | ".join([*cells, row.options]) + " |")
    versions = ", ".join(dict.fromkeys(f"torch {row.torch}, maskops {row.maskops} at {row.revision}" for row in rows))
    return "\n".join([f"{rows[0].device}: {versions}", "", *lines])


def _cells(row: Row) -> list[str]:
    return [row.predicted, row.bytes, row.parts, row.inner, row.outer, row.fits]


def _ratio(row: Row) -> str:
    try:
        return f"{float(row.predicted) / float(row.measured):.2f}"
    except ValueError:
        return ""


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
