"""How every kernel is launched, and what every launch needs: outputs laid out as the reference's, and block sizes."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from maskops.backends import reference

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


def outputs(op: str, *arguments: Any) -> list[Tensor]:
    """Unwritten tensors of the sizes, strides and dtypes that the reference would return for these arguments."""
    key = tuple(
        (argument.shape, argument.stride(), argument.dtype, argument.device)
        if isinstance(argument, Tensor)
        else tuple(argument)
        if isinstance(argument, (list, tuple))
        else argument
        for argument in arguments
    )
    return [
        torch.empty_strided(size, stride, dtype=dtype, device=device)
        for size, stride, dtype, device in _describe(op, key)
    ]


@lru_cache(maxsize=4096)
def _describe(op: str, key: tuple) -> tuple[tuple, ...]:
    # on the CPU, fake convolutions of grouped channels_last weights have other strides than real ones
    with nullcontext() if INTERPRETED else FakeTensorMode():
        arguments = [
            torch.empty_strided(*item[:2], dtype=item[2], device=item[3]) if _is_tensor(item) else item for item in key
        ]
        results = getattr(reference, op)(*arguments)
    results = (results,) if isinstance(results, Tensor) else results
    return tuple((tuple(t.shape), tuple(t.stride()), t.dtype, t.device) for t in results)


def _is_tensor(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 4 and isinstance(item[2], torch.dtype)


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
