"""How every kernel is launched, and the sizes that every launch counts in."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET=1 was set when the kernels were defined: they then run on CPU tensors, in numpy."""


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first tensor. An empty grid launches nothing."""
    if 0 in grid:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        launch(kernel, grid, arguments, options)


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> None:
    """The one place where a kernel starts."""
    kernel[grid](*arguments, **options)


@lru_cache(maxsize=4096)
def collapse(sizes: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The sizes of an index space and the strides of the tensors over it, in as few dimensions as they all allow.

    The first of the returned dimensions is the innermost one, by the strides of the first tensor.

    >>> collapse((2, 3, 4), (12, 4, 1), (12, 4, 1))
    ((24,), (1,), (1,))
    >>> collapse((2, 3, 4), (12, 4, 1), (1, 0, 0))
    ((12, 2), (1, 12), (0, 1))
    """
    order = sorted((i for i, size in enumerate(sizes) if size != 1), key=lambda i: (strides[0][i], sizes[i]))
    merged: list[list[int]] = []
    for i in order:
        step = [stride[i] for stride in strides]
        if merged and all(s == inner * merged[-1][0] for s, inner in zip(step, merged[-1][1:], strict=True)):
            merged[-1][0] *= sizes[i]
        else:
            merged.append([sizes[i], *step])
    return tuple(zip(*(merged or [[1, *(0 for _ in strides)]]), strict=True))


def cdiv(count: int, block: int) -> int:
    """How many blocks hold ``count`` elements."""
    return -(-count // block)


def power_of_two(count: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``count``, within [least, most]."""
    return min(most, max(least, 1 << max(count - 1, 0).bit_length()))
