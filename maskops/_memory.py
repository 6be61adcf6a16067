"""Where the flat buffers of a run lie: on its device, or in the host's memory until a layer needs its part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

ALIGNMENT = 16  # elements: 16-byte vectors for every dtype down to one byte

_host_depth = [0]


@contextmanager
def host_memory() -> Iterator[None]:
    """Within, what is made is made in the host's memory, for who counts the device's."""
    _host_depth[0] += 1
    try:
        yield
    finally:
        _host_depth[0] -= 1


def on_host_now() -> bool:
    """Whether we are within :func:`host_memory`."""
    return _host_depth[0] > 0


class OnDevice:
    """Buffers on the device that computes with them."""

    elsewhere = False
    """Whether the buffers are in the host's memory, for a device that has its own."""
    parts = 1
    """Over how many processes each layer is spread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def zeros(self, length: int, dtype: torch.dtype) -> Tensor:
        """A new buffer."""
        return torch.zeros(length, dtype=dtype, device=self.device)

    def length(self, entries: int) -> int:
        """How much room a layer of so many entries takes."""
        return -(-entries // ALIGNMENT) * ALIGNMENT

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of a layer, which is flat and has its length."""
        return whole

    def assemble(self, whole: Tensor) -> None:
        """Fill a layer, of which this process has written its part."""

    def split(self, whole: Tensor, unit: int, nothing: int = 0) -> Tensor:
        """This process's part of values that all have, a part being a multiple of so many, filled up with nothing."""
        return whole

    def joined(self, part: Tensor, entries: int) -> Tensor:
        """So many values, of which each process has its part."""
        return part

    def part_of_sum(self, whole: Tensor) -> Tensor:
        """This process's part of what all have of a layer, summed where each has its own rows of a batch."""
        return whole

    def keep(self, value: Tensor) -> Tensor:
        """A copy of a tensor where buffers lie, and of a single number on the device."""
        return value.to(self.device, copy=True)

    def fetch(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """Parts of buffers on the device."""
        return list(parts)

    def put_back(self, fetched: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Parts of buffers as what was fetched of them has become."""

    def settle(self) -> None:
        """Wait until the host finds in buffers what was put back."""


class OnHost(OnDevice):
    """Buffers in the host's memory, of which a layer's parts are copied to the device and back.

    For a GPU the memory is pinned: copies are queued on the stream that computes, in whose order they happen, nobody
    waits for them, and they can be recorded in a CUDA graph.
    """

    elsewhere = True

    def zeros(self, length: int, dtype: torch.dtype) -> Tensor:
        with host_memory():
            return torch.zeros(length, dtype=dtype, device="cpu", pin_memory=self.device.type == "cuda")

    def keep(self, value: Tensor) -> Tensor:
        return self.zeros(len(value), value.dtype).copy_(value) if value.dim() else super().keep(value)

    def fetch(self, parts: Iterable[Tensor]) -> list[Tensor]:
        return [part.to(self.device, non_blocking=True, copy=True) for part in parts]

    def put_back(self, fetched: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        for copied, part in zip(fetched, parts, strict=True):
            part.copy_(copied, non_blocking=True)

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
