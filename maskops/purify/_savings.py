"""Options that save memory, and what is said when it runs out all the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from maskops._text import one_line

SAVINGS: tuple[tuple[str, Any], ...] = (
    ("branches", "sequential"),
    ("gate", "bits"),
    ("micro_batch_size", 1 / 4),
    ("recompute", True),
    ("micro_batch_size", 0),
    ("step_in_backward", True),
    ("remake_weights", True),
    ("state_bits", 8),
    ("dtype", torch.bfloat16),
    ("weight_dtype", torch.bfloat16),
    ("mask_bits", 16),
    ("shard", True),
    ("offload", True),
)
"""Options of methods and settings with the values that save memory, in the order in which a plan adds them: from those
that cost little to those that change the result, and at last those that cost much; ``shard`` is for several processes.
Of ``micro_batch_size`` it is the share of a batch that it may come down to, but for one image."""


def savings_of(processes: int) -> list[tuple[str, Any]]:
    """Those that so many processes have."""
    return [(option, value) for option, value in SAVINGS if option != "shard" or processes > 1]


def out_of_memory(
    method: str,
    reason: str,
    options: Any,
    setting: Any,
    shape: Sequence[int] | None = None,
    where: str = "",
    processes: int = 1,
) -> torch.OutOfMemoryError:
    """The error of a run that memory isn't enough for, with what could still be done.

    reason:          what was said when it ran out
    options, setting: of the run
    shape:           (C, H, W) of an image, if that is known
    where:           what there is to say about the moment, and about what is left
    processes:       of the run
    """
    left_out = {"micro_batch_size"}  # which has been as small as can be
    if any(getattr(options, option, False) for option in ("offload", "shard")):
        left_out |= {"offload", "shard"}  # which exclude each other
    unused = [
        f"{option}={value!r}"
        for option, value in savings_of(processes)
        for of in (options, setting)
        if option not in left_out and getattr(of, option, value) != value
    ]
    left = f"not in use yet: {', '.join(unused)}" if unused else "all that saves memory is in use"
    size = "…" if shape is None else tuple(shape)
    several = "" if processes == 1 else f", processes={processes}"
    call = f"maskops.plan(model, {method!r}, shape={size}, classes=…, memory=…{several})"
    return torch.OutOfMemoryError(f"{method}: memory ran out{where}; {left}; see {call} ({one_line(reason)})")
