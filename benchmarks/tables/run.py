"""Runs the cells of a table, one row in the CSV as soon as each is done."""

from __future__ import annotations

import sys
from itertools import groupby

import torch

from benchmarks.tables.cells import Cell
from benchmarks.tables.record import Record
from benchmarks.tables.victims import Source
from maskops.purify import NonFiniteError
from maskops.purify.methods import METHODS


class Runner:
    def __init__(self, source: Source, record: Record, device: torch.device) -> None:
        self.source, self.record, self.device = source, record, device

    def run(self, cells: list[Cell]) -> None:
        for (net, attack), group in groupby(cells, key=lambda cell: (cell.net, cell.attack)):
            victim = self.source.victim(net, attack)
            before = victim.measure(victim.model)
            for cell in group:
                print(f"{net} {attack} n={cell.n} {cell.method} seed {cell.seed}", file=sys.stderr, flush=True)
                clean = victim.clean_images(cell.n, cell.seed)
                try:
                    result = METHODS[cell.algorithm].run(
                        victim.model,
                        clean,
                        preset=cell.preset,
                        seed=cell.seed,
                        device=self.device,
                        progress=False,
                        **cell.changes,
                    )
                except NonFiniteError as error:
                    print(f"no row: {error}", file=sys.stderr)
                    continue
                self.record.add(cell, before, victim.measure(result.model), result.timings, str(self.device))
