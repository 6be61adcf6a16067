"""Layers with many masks over one weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.cases import BFLOAT16, FLOAT16, FLOAT32, LAST, TF32, Case, Kind, empty, multiplied
from maskops.backends import triton as ops

PASSES = ("forward", "input gradient", "mask gradient")


@dataclass(frozen=True)
class ManyMasks:
    """A 3x3 convolution in channels_last, or a linear layer; every mask with an input of its own, or one for all."""

    kind: Kind
    masks: int
    linear: bool = False
    own: bool = True
    noise: bool = False
    batch: int = 128

    @property
    def words(self) -> str:
        layer = "linear" if self.linear else "3x3"
        noise = ", noise" if self.noise else ""
        return f"{layer}, {self.masks} masks{noise}, {'inputs of their own' if self.own else 'one input'}"

    def cases(self, passes: tuple[str, ...] = PASSES[:2]) -> Iterator[Case]:
        for name in passes:

            def call(name: str = name) -> None:
                with multiplied(self.kind.precision):
                    self._call(name)

            yield Case(self.kind.words, f"{self.words}, {name}", call)

    def _call(self, name: str) -> None:
        op = "many_masked_linear" if self.linear else "many_masked_conv"
        shape = (512, 512) if self.linear else (128, 128, 3, 3)
        layout = torch.contiguous_format if self.linear else LAST
        weight = empty(*shape, dtype=self.kind.dtype, memory_format=layout)
        masks = self._each(empty(*shape, memory_format=layout))
        parameters = weight, masks, masks.clone() if self.noise else None
        geometry = () if self.linear else ([1, 1], [1, 1], [1, 1], 1)
        size = (self.batch, 512) if self.linear else (self.batch, 128, 32, 32)
        one = empty(*size, dtype=self.kind.dtype, memory_format=layout)
        grad = self._each(one)
        input = grad if self.own else one
        if name == "forward":
            getattr(ops, op)(input, *parameters, None, *geometry)
        else:
            for_input = name == "input gradient"
            needs = [for_input, False, not for_input, False, False]
            getattr(ops, f"{op}_backward")(grad, input, *parameters, list(input.shape), *geometry, needs)

    def _each(self, tensor: Tensor) -> Tensor:
        """As many of the tensor as there are masks, each laid out as it."""
        strides = tensor.numel(), *tensor.stride()
        return torch.empty_strided((self.masks, *tensor.shape), strides, dtype=tensor.dtype, device="meta")


def all_cases() -> Iterator[Case]:
    for kind in (BFLOAT16, TF32, FLOAT32):
        for masks in (2, 4):
            yield from ManyMasks(kind, masks).cases()
    for kind in (BFLOAT16, TF32):
        yield from ManyMasks(kind, 4, own=False, noise=True).cases()
    yield from ManyMasks(BFLOAT16, 10).cases(PASSES)
    yield from ManyMasks(BFLOAT16, 4, linear=True, batch=2048).cases()
    yield from ManyMasks(FLOAT16, 4).cases(PASSES[:1])
