"""What a terminal shows of a purification: its measurements, its cost and the versions that decide its numbers."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from maskops._version import __version__
from maskops.purify import Purification

if TYPE_CHECKING:
    from maskops.backdoor import Metrics

RATES = {"acc": "ACC", "asr_all": "asr_all", "asr_excl": "asr_excl", "ra": "RA"}
"""The fields of measurements that are shares of images, and what they are called."""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned columns: the first to the left, the others to the right. The first row is the header.

    >>> print(table([("", "ACC %"), ("before", "98.8"), ("after", "7.0")]))
            ACC %
    before   98.8
    after     7.0
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def measured(before: Metrics, after: Metrics) -> str:
    """The table of ACC and, where a trigger was given, asr_all, asr_excl and RA, before and after, in percent."""
    names = [name for name in RATES if getattr(before, name) is not None]
    rows = [("", *(f"{RATES[name]} %" for name in names))]
    for title, metrics in (("before", before), ("after", after)):
        rows.append((title, *(f"{100 * getattr(metrics, name):.1f}" for name in names)))
    return table(rows)


def cost(result: Purification) -> str:
    """Seconds and peak memory of the run in words.

    >>> cost(Purification(None, {}, None, {}, {"total": 2.5, "peak_bytes": 3 << 20}, {"device": None}))
    '2.5 s, peak memory 3 MiB (whole process)'
    """
    on_gpu = torch.device(result.options["device"] or "cpu").type == "cuda"
    peak = f"{result.timings['peak_bytes'] / 2**20:.0f} MiB ({'on the GPU' if on_gpu else 'whole process'})"
    return f"{result.timings['total']:.1f} s, peak memory {peak}"


def versions() -> dict[str, str]:
    """Of everything that decides the numbers of a run."""
    return {
        "maskops": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
