"""Calls of the Triton backend on tensors without data, which between them launch every kernel in every guise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

LAST = torch.channels_last


class Case(NamedTuple):
    """A call, and the words for it: the dtype it works on, and what is special about it."""

    dtype: str
    words: str
    call: Callable[[], object]


class Kind(NamedTuple):
    """A dtype of activations, and how float32 is multiplied."""

    words: str
    dtype: torch.dtype
    precision: str = "ieee"


BFLOAT16 = Kind("bfloat16", torch.bfloat16)
FLOAT16 = Kind("float16", torch.float16)
TF32 = Kind("float32 tf32", torch.float32, "tf32")
FLOAT32 = Kind("float32", torch.float32)
KINDS = (BFLOAT16, FLOAT16, TF32, FLOAT32)


def empty(*size: int, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format | None = None) -> Tensor:
    made = torch.empty(size, dtype=dtype, device="meta")
    return made if memory_format is None else made.contiguous(memory_format=memory_format)


@contextmanager
def multiplied(precision: str) -> Iterator[None]:
    """Convolutions and products of float32 in this precision."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = precision
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
