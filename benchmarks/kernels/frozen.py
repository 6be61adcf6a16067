"""Frozen layers: a convolution with its residual and ReLU, and its input gradient with the ReLU before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.kernels.cases import BFLOAT16, FLOAT16, FLOAT32, KINDS, LAST, TF32, Case, Kind, empty, multiplied
from maskops.backends import triton as ops


def _layout(input: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
    """That of a convolution's output: cuDNN's, while torch would have all outputs contiguous where there is no data."""
    last = any(tensor.is_contiguous(memory_format=LAST) for tensor in (input, weight))
    return LAST if last else torch.contiguous_format


@contextmanager
def _as_computed(kind: Kind) -> Iterator[None]:
    with multiplied(kind.precision), patch.object(torch._C, "_conv_determine_backend_memory_format", _layout):
        yield


@dataclass(frozen=True)
class Frozen:
    """A convolution in channels_last, with a window that keeps the size at a stride of one."""

    words: str
    input: tuple[int, ...] = (128, 128, 32, 32)
    weight: tuple[int, ...] = (128, 128, 3, 3)
    kind: Kind = BFLOAT16
    stride: int = 1
    groups: int = 1
    layout: torch.memory_format = LAST

    def forward(self, residual: bool = False, upper: float = float("inf")) -> Case:
        def call() -> None:
            added = self._output() if residual else None
            bias = empty(self.weight[0], dtype=self.kind.dtype)
            with _as_computed(self.kind):
                ops.conv_relu(self._input(), self._weight(), bias, added, *self._geometry(), upper)

        also = ", residual" * residual + (", relu" if upper == float("inf") else ", relu6")
        return Case(self.kind.words, f"{self.words}{also}", call)

    def backward(self, gate: str | None, addend: bool = False, upper: float = float("inf")) -> Case:
        """The gate: ``"bits"`` or ``"output"``."""

        def call() -> None:
            input = self._input()
            bits = empty(input.numel() // 8, dtype=torch.uint8)
            chosen = {"bits": bits, "output": input, None: None}[gate]
            added = self._input() if addend else None
            given = self._output(), self._weight(), chosen, added, list(self.input)
            with _as_computed(self.kind):
                ops.conv_input_grad(*given, *self._geometry(), upper)

        also = (f", {gate} of the relu before" if gate else "") + ", addend" * addend
        return Case(self.kind.words, f"{self.words}, input gradient{also}", call)

    def _tensor(self, *size: int) -> Tensor:
        return empty(*size, dtype=self.kind.dtype, memory_format=self.layout)

    def _input(self) -> Tensor:
        return self._tensor(*self.input)

    def _weight(self) -> Tensor:
        return self._tensor(*self.weight)

    def _output(self) -> Tensor:
        images, _, *sides = self.input
        return self._tensor(images, self.weight[0], *(-(-side // self.stride) for side in sides))

    def _geometry(self) -> tuple:
        padding = [side // 2 for side in self.weight[2:]]
        return [self.stride, self.stride], padding, [1, 1], self.groups


USUAL = Frozen("frozen 3x3")


def all_cases() -> Iterator[Case]:
    for kind in KINDS:
        layer = replace(USUAL, kind=kind)
        yield layer.forward(residual=True)
        yield layer.backward("bits", addend=True)
        if kind != FLOAT16:
            yield from _both(
                replace(layer, words="frozen 3x3, few pixels", input=(16, 512, 4, 4), weight=(512, 512, 3, 3))
            )
    for kind in (BFLOAT16, TF32, FLOAT32):
        layer = replace(USUAL, kind=kind)
        yield layer.forward()
        yield layer.backward(None, addend=True)
        yield layer.backward("output", addend=True, upper=6.0)
        yield from _both(replace(layer, words="frozen 3x3, contiguous", layout=torch.contiguous_format))
        yield Frozen("frozen first layer 7x7", (128, 3, 224, 224), (64, 3, 7, 7), kind, stride=2).forward()
        yield from _both(replace(layer, words="frozen 1x1", weight=(128, 128, 1, 1)))
        yield from _both(replace(layer, words="frozen 3x3, stride 2", stride=2))
    yield from _both(replace(USUAL, words="frozen 1x1, stride 2", weight=(256, 128, 1, 1), stride=2))
    yield from _both(replace(USUAL, words="frozen 3x3, 8 groups", weight=(128, 16, 3, 3), groups=8))
    yield from _both(Frozen("frozen 1x1, odd sizes", (127, 127, 31, 32), (125, 127, 1, 1)))
    for side in (3, 5, 7):
        layer = Frozen(f"frozen depthwise {side}x{side}", (128, 192, 32, 32), (192, 1, side, side), groups=192)
        for kind in (BFLOAT16, FLOAT32):
            yield from _both(replace(layer, kind=kind))
            yield replace(layer, kind=kind).backward("output", addend=True, upper=6.0)
        if side == 3:
            yield from _both(replace(layer, words=f"{layer.words}, stride 2", stride=2))
            yield from _both(replace(layer, words=f"{layer.words}, contiguous", layout=torch.contiguous_format))


def _both(layer: Frozen) -> Iterator[Case]:
    yield layer.forward(residual=True, upper=6.0)
    yield layer.backward("bits", addend=True)
