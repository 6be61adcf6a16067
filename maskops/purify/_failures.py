"""What processes that compute one run tell each other when one of them fails alone: a note in their group's store."""

from __future__ import annotations

import time
from contextlib import suppress

import torch.distributed as dist

_PATIENCE = 5.0
"""Seconds for which a process that ends waits for the others to find out why: the store may end with it."""

_begun = [0]
"""How many runs have begun so far; the same in all processes, so that each run has notes of its own."""


def _notes() -> dist.Store:
    return dist.PrefixStore(f"maskops/{_begun[0]}", dist.distributed_c10d._get_default_store())


def begin() -> None:
    """Begin a run, as all processes do: what ended the one before is no news to it."""
    _begun[0] += 1


def heard() -> str | None:
    """What another process has said it ends by; None also where nobody is left who could be asked."""
    with suppress(RuntimeError, ValueError):
        notes = _notes()
        if notes.check(["failed"]):
            return notes.get("failed").decode()
    return None


def leave(size: int, reason: str | None = None) -> None:
    """End a run in one of so many processes, by a reason of its own or because another has ended it."""
    with suppress(RuntimeError, ValueError):
        notes = _notes()
        if reason is not None:
            notes.compare_set("failed", "", reason)  # the first reason stays
        left, end = notes.add("left", 1), time.monotonic() + _PATIENCE
        while left < size and time.monotonic() < end:
            time.sleep(0.02)
            left = notes.add("left", 0)
