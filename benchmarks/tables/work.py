"""How long a part of a table will take: forward and backward passes, times what one takes here."""

from __future__ import annotations

import math
import time
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.tables.cells import Cell, subjects
from benchmarks.tables.victims import Source
from maskops.purify.methods import METHODS

BATCH = 128
PASSES = {
    "anp": 3,
    "swm": 3,
    "nft": 1,
    "ft": 1,
    "ft_sam": 2,
    "nad": 3,
    "mcr": 2,
    "rnp": 2,
    "fine_pruning": 2,
    "ibau": 8,
}
"""Forward and backward passes of a batch in each step of a method, roughly."""


def estimate(cells: list[Cell], source: Source, device: torch.device) -> float:
    """Seconds."""
    nets = {cell.net for cell in cells}
    seconds = {net: _pass_seconds(source.network(net).to(device), source.image_shape(net), device) for net in nets}
    purifying = sum(seconds[cell.net] * passes(cell) for cell in cells)
    trained = [net for net, attack in subjects(cells) if source.trains(net, attack)]
    batches = source.options.train_epochs * source.training_count() / BATCH if trained else 0
    return purifying + sum(seconds[net] * batches for net in trained)


def passes(cell: Cell) -> float:
    """Passes of 128 images that a run takes."""
    options = METHODS[cell.algorithm].presets[cell.preset].options
    known = {field.name for field in fields(options)}
    options = replace(options, **{name: value for name, value in cell.changes.items() if name in known})
    n = 100 if cell.n == "one-shot" else int(cell.n)
    if cell.algorithm == "awm":
        options = options.for_images(torch.empty(n, 3, 32, 32))
        steps = options.epochs * (options.inner_steps + 2 * options.outer_steps)
        return steps * options.batch_size / BATCH
    batch = min(options.batch_size, n)
    steps = getattr(options, "steps", "auto")
    steps = math.ceil(n / batch) if steps == "auto" else steps
    extra = getattr(options, "noise_steps", 1) - 1
    return options.epochs * steps * (PASSES.get(cell.algorithm, 2) + extra) * batch / BATCH


def _pass_seconds(model: nn.Module, shape: tuple[int, int, int], device: torch.device, repeats: int = 3) -> float:
    images, labels = torch.rand(BATCH, *shape, device=device), torch.zeros(BATCH, dtype=torch.long, device=device)
    times: list[Any] = []
    for _ in range(repeats):
        start = time.perf_counter()
        F.cross_entropy(model(images), labels).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
