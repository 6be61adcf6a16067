"""What a run that is stopped leaves in its results' folder: its state, and what --curves has measured so far."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskops._text import one_line
from maskops.backdoor import Metrics

STATE, CURVES = "unfinished.safetensors", "unfinished.json"


def move(folder: Path, to: Path) -> None:
    for file in _there(folder):
        os.replace(file, to / file.name)


def remove(folder: Path) -> None:
    for file in _there(folder):
        file.unlink()


def _there(folder: Path) -> Iterator[Path]:
    return (folder / name for name in (STATE, CURVES) if (folder / name).exists())


class Curves:
    """Measurements by epoch, which are in a file as soon as they are made.

    folder:  where the file is
    staging: a folder beside it, where it is written before it takes its place
    resume:  go on with those that are there
    errors:  ValueError for a file that can't be read
    """

    def __init__(self, folder: Path, staging: Path, resume: bool) -> None:
        self._file, self._new = folder / CURVES, staging / f"new-{CURVES}"
        self.measured = _read(self._file) if resume else []
        self._write()

    def add(self, epoch: int, metrics: Metrics) -> None:
        self.measured = [*self.measured[:epoch], metrics]  # of a run that goes on, the last epoch may come again
        self._write()

    def _write(self) -> None:
        content = json.dumps([asdict(metrics) for metrics in self.measured], default=Tensor.tolist)
        self._new.write_text(content, encoding="utf-8")
        os.replace(self._new, self._file)


def _read(file: Path) -> list[Metrics]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return [Metrics(**{field.name: _value(each[field.name]) for field in fields(Metrics)}) for each in found]
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"{file} can't be read ({one_line(error)}); give --overwrite to begin anew") from None


def _value(value: Any) -> Any:
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
