"""Choices by measurement: which of several ways to compute something is the fastest on this device, kept in a file.

With MASKOPS_MEASURE=1 every choice that is met for the first time is measured and kept; without it, what was measured
before is used, and the first candidate where nothing was. The file is in the folder MASKOPS_CACHE, else in the user's
cache folder.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Hashable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TypeVar

import torch
import triton
from triton.errors import TritonError

Candidate = TypeVar("Candidate")


def best(
    key: tuple[Hashable, ...],
    candidates: Sequence[Candidate],
    start: Callable[[Candidate], object],
    device: torch.device,
) -> Candidate:
    """The fastest of the candidates, by the kept measurement or by one made now; the first where there is neither.

    key:        says what is computed, and on which shape
    candidates: strings, or tuples of numbers
    start:      computes it in the way of a candidate, as often as it is called; a candidate that doesn't fit on the
                device is passed over
    """
    known = _known(_file(device)).get(_text(key))
    if known is None and measures(device):
        milliseconds = {index: _milliseconds(start, candidate, device) for index, candidate in enumerate(candidates)}
        fastest = min(milliseconds, key=lambda index: milliseconds[index])
        if milliseconds[fastest] < float("inf"):
            known = candidates[fastest]
            _keep(_file(device), _text(key), known)
    return next((candidate for candidate in candidates if candidate == known), candidates[0])


def is_used(device: torch.device) -> bool:
    """Whether there is any measurement for this device, or one would be made."""
    return measures(device) or bool(_known(_file(device)))


def was_measured(key: tuple[Hashable, ...], device: torch.device) -> bool:
    """Whether a measurement is kept for this key."""
    return _text(key) in _known(_file(device))


def measures(device: torch.device) -> bool:
    """Whether what isn't known yet is measured now: never while a CUDA graph is recorded."""
    if os.environ.get("MASKOPS_MEASURE") != "1" or device.type == "meta":
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=65536)
def _text(key: tuple[Hashable, ...]) -> str:
    return " ".join(map(str, key))


def _milliseconds(start: Callable[[Candidate], object], candidate: Candidate, device: torch.device) -> float:
    try:
        if device.type == "cuda":
            with torch.cuda.device(device):
                return triton.testing.do_bench(lambda: start(candidate), warmup=5, rep=20, return_mode="median")
        begin = time.perf_counter()
        start(candidate)
        return 1e3 * (time.perf_counter() - begin)
    except (TritonError, torch.OutOfMemoryError):
        return float("inf")


def _file(device: torch.device) -> Path:
    return _file_in(os.environ.get("MASKOPS_CACHE"), os.environ.get("XDG_CACHE_HOME"), device)


@cache
def _file_in(folder: str | None, caches: str | None, device: torch.device) -> Path:
    folder = folder or Path(caches or "~/.cache") / "maskops"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name = re.sub(r"[^a-z0-9]+", "-", f"{name} triton {triton.__version__}".lower())
    return Path(os.path.expanduser(folder)) / f"{name}.json"  # without a home, ~ stays, and nothing is found there


@cache
def _known(path: Path) -> dict[str, object]:
    return _read(path)


def _read(path: Path) -> dict[str, object]:
    """What the file holds, by key, tuples where JSON has lists; nothing where it can't be read."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: tuple(choice) if isinstance(choice, list) else choice for key, choice in known.items()}


def _keep(path: Path, key: str, value: object) -> None:
    """Add to the file what was measured, beside what other processes have added. Without the file it is kept here."""
    known = _known(path)
    known[key] = value
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump({**_read(path), **known}, file, indent=0, sort_keys=True)
        os.replace(file.name, path)
    except OSError:
        return
