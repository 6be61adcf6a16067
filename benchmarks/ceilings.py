"""What the device reaches at best, in the same run: a large matrix product and a large copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.measure import Samples, Timed
from benchmarks.published import fastest_float32
from benchmarks.results import Ceilings, Extent

NAME = "ceiling"
MATMUL, COPY = (NAME, "matmul"), (NAME, "copy")
SIZES = {"cpu": (1024, 2**26), "cuda": (8192, 2**28)}
"""Rows of the square matrices, and bytes that are copied: far more than any cache holds."""


def timed(dtype: torch.dtype, device: torch.device) -> dict[tuple[str, str], Timed]:
    rows, size = SIZES[device.type]
    # random, because arithmetic on zeros takes less power and so less time
    one, other = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    source, target = (torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(2))

    def multiply(repetition: int) -> None:
        with fastest_float32():
            torch.mm(one, other)

    return {MATMUL: Timed(multiply), COPY: Timed(lambda repetition: target.copy_(source))}


def extents(device: torch.device) -> dict[tuple[str, str], Extent]:
    rows, size = SIZES[device.type]
    return {MATMUL: Extent(flops=2 * rows**3), COPY: Extent(bytes=2 * size)}


def found(samples: Mapping[Any, Samples], device: torch.device) -> Ceilings | None:
    """The rates in these samples, or None where one of the two failed."""
    if MATMUL not in samples or COPY not in samples:
        return None
    extent = extents(device)
    flops, moved = extent[MATMUL].flops, extent[COPY].bytes
    return Ceilings(flops / samples[MATMUL].percentiles()[1], moved / samples[COPY].percentiles()[1])
