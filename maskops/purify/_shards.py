"""Buffers that are spread over the processes of a run: each has its part of every layer."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops._memory import OnDevice

_BLOCK = 256
"""A part is a whole number of such blocks, so that states of eight bits have the scales that they have in one piece."""


class Gathers(Protocol):
    """Processes that put parts together, and sum what each gets a part of."""

    rank: int
    size: int

    def gather(self, whole: Tensor) -> None: ...

    def sum_part(self, whole: Tensor) -> Tensor: ...


class Shards(OnDevice):
    """Buffers on the device, with the team's parts of each layer side by side when it is whole.

    All processes must ask for the same layers in the same order.
    """

    def __init__(self, device: torch.device, team: Gathers) -> None:
        super().__init__(device)
        self._team, self.parts = team, team.size

    def length(self, entries: int) -> int:
        unit = _BLOCK * self.parts
        return -(-entries // unit) * unit

    def part(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.parts)[self._team.rank]

    def assemble(self, whole: Tensor) -> None:
        self._team.gather(whole)

    def split(self, whole: Tensor, unit: int, nothing: int = 0) -> Tensor:
        return self.part(F.pad(whole, (0, -len(whole) % (unit * self.parts)), value=nothing))

    def joined(self, part: Tensor, entries: int) -> Tensor:
        whole = part.new_zeros(len(part) * self.parts)
        self.part(whole).copy_(part)
        self.assemble(whole)
        return whole[:entries]

    def part_of_sum(self, whole: Tensor) -> Tensor:
        return self._team.sum_part(F.pad(whole, (0, -len(whole) % (_BLOCK * self.parts))))
