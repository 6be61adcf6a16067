"""Bytes that each op reads and writes, counted on any machine, beside plain torch and the floor."""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import maskops
from benchmarks.cases import Case
from benchmarks.counting import Counts, count
from benchmarks.dry import without_memory
from benchmarks.measure import Step
from benchmarks.plan import plan
from benchmarks.results import FOLDER, aligned, revision

FILE = FOLDER / "moved" / "moved.csv"


@dataclass(frozen=True)
class Row:
    """One op on all different shapes of a network; what an op writes in place counts as read, too.

    plain_launches, plain_bytes: of what anyone would write in plain torch
    launches, bytes:             of the public function
    floor_bytes:                 of a masked layer, those of the plain layer; else of what has to be read and written
    """

    op: str
    net: str
    batch: int
    dtype: str
    plain_launches: int
    launches: int
    plain_bytes: int
    bytes: int
    floor_bytes: int
    torch: str
    maskops: str
    revision: str


KINDS = {field.name: {"str": str, "int": int}[field.type] for field in fields(Row)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--net", default="resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path, default=FILE)


def main(options: argparse.Namespace) -> int:
    """Write the CSV, and print it."""
    rows = list(run(options.net, options.batch))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    lines = [[row.op, row.plain_launches, row.launches, row.plain_bytes, row.bytes, row.floor_bytes] for row in rows]
    head = ["", "launches, plain", "maskops", "bytes, plain", "maskops", "floor"]
    print(aligned([head, *lines]))
    return 0


def read(path: Path = FILE) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        found = csv.DictReader(file)
        return [Row(**{name: KINDS[name](value) for name, value in row.items()}) for row in found]


def run(net: str, batch: int, dtype: torch.dtype = torch.float32) -> Iterator[Row]:
    """A row per op, in the order of the plan. Nothing is computed, and no memory is needed."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0] * 5)
    with without_memory():
        entries, _ = plan([net], [batch], dtype, torch.device("cpu"))
        for entry in entries:
            for case in entry.make():
                totals[case.phase] = [a + b for a, b in zip(totals[case.phase], _amounts(case), strict=True)]
    about = str(dtype).removeprefix("torch."), torch.__version__, maskops.__version__, revision()
    for op, amounts in totals.items():
        yield Row(op, net, batch, about[0], *amounts, *about[1:])


def _amounts(case: Case) -> list[int]:
    plain, ours, floor = (_second(make()) for make in (case.plain, case.ours, case.floor))
    # the target of a copy is only written
    least = floor.bytes * 2 // 3 if set(floor.by_op) == {"aten.copy_"} else floor.bytes
    return [plain.ops, ours.ops, plain.bytes, ours.bytes, least]


def _second(step: Step) -> Counts:
    """What a step takes beside what the first one left behind."""
    step()
    return count(step)
