"""Outputs for kernels to write to, laid out as the reference's."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from maskops.backends import reference


def outputs(op: str, *arguments: Any) -> list[Tensor]:
    """Unwritten tensors of the sizes, strides and dtypes that the reference would return for these arguments."""
    return [
        torch.empty_strided(size, stride, dtype=dtype, device=device)
        for size, stride, dtype, device in layouts(op, *arguments)
    ]


def layouts(op: str, *arguments: Any) -> tuple[tuple, ...]:
    """Size, strides, dtype and device of each tensor that the reference would return for these arguments."""
    key = tuple(
        (argument.shape, argument.stride(), argument.dtype, argument.device)
        if isinstance(argument, Tensor)
        else tuple(argument)
        if isinstance(argument, (list, tuple))
        else argument
        for argument in arguments
    )
    return _describe(op, key)


@lru_cache(maxsize=4096)
def _describe(op: str, key: tuple) -> tuple[tuple, ...]:
    # on the CPU, where tests run kernels, fake convolutions of grouped channels_last weights have other strides than
    # real ones
    is_test = any(_is_tensor(item) and item[3].type == "cpu" for item in key)
    with nullcontext() if is_test else FakeTensorMode():
        arguments = [
            torch.empty_strided(*item[:2], dtype=item[2], device=item[3]) if _is_tensor(item) else item for item in key
        ]
        results = getattr(reference, op)(*arguments)
    results = (results,) if isinstance(results, Tensor) else results
    return tuple((tuple(t.shape), tuple(t.stride()), t.dtype, t.device) for t in results)


def _is_tensor(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 4 and isinstance(item[2], torch.dtype)
