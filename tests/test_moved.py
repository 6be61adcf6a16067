"""What the picture of moved bytes is drawn from."""

import csv
from dataclasses import asdict

import torch

from benchmarks import moved
from benchmarks.cases import Case, copy_of
from maskops.functional import effective_weight


def test_bytes_are_counted_as_read_and_written():
    weight, mask = torch.ones(100), torch.ones(100)
    case = Case(
        "100 weights",
        "effective_weight",
        plain=lambda: lambda: [(weight * mask).to(torch.float64)],
        ours=lambda: lambda: [effective_weight(weight, mask)],
        floor=copy_of(weight.device, 600),
    )
    assert moved._amounts(case) == [2, 1, 1200 + 1200, 1200, 1200]


def test_the_recorded_rows_are_those_of_the_plan():
    rows = moved.read()
    assert {row.net for row in rows} == {"resnet18"} and len({row.op for row in rows}) == len(rows) > 20
    assert all(row.launches <= row.plain_launches and row.floor_bytes > 0 for row in rows)
    with moved.FILE.open(encoding="utf-8", newline="") as file:
        assert [{name: str(value) for name, value in asdict(row).items()} for row in rows] == list(csv.DictReader(file))
