"""Masked layers: convolutions of every shape and of one and two branches, linear and depthwise ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.kernels.cases import BFLOAT16, FLOAT16, FLOAT32, KINDS, LAST, TF32, Case, Kind, empty, multiplied
from maskops.backends import triton as ops

PASSES = ("forward", "input gradient", "mask gradient")


@dataclass(frozen=True)
class Layer:
    """A masked layer over a batch of images, or over rows of features where the weight has no window.

    branches: "" for one; "two inputs" and "one input" of the dual ops
    factors:  shape of mask and noise: "weight" or "neuron"
    """

    words: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    kind: Kind = BFLOAT16
    branches: str = ""
    weight_dtype: torch.dtype | None = None
    mask_dtype: torch.dtype = torch.float32
    factors: str = "weight"
    noise: bool = False
    bias: bool = False
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    transposed: bool = False
    layout: torch.memory_format = LAST

    def cases(self, passes: tuple[str, ...] = PASSES, noise_gradient: bool = False) -> Iterator[Case]:
        for name in passes:

            def call(name: str = name) -> None:
                with multiplied(self.kind.precision):
                    self._call(name, noise_gradient)

            words = ", ".join(filter(None, (self.words, self.branches, name)))
            yield Case(self.kind.words, words, call)

    def _call(self, name: str, noise_gradient: bool) -> None:
        op = ("dual_" if self.branches else "") + ("masked_conv" if self._windowed else "masked_linear")
        input, parameters = self._input(), self._parameters()
        second = self._input() if self.branches == "two inputs" else None
        inputs = (input, second) if self.branches else (input,)
        geometry = self._geometry() if self._windowed else ()
        if name == "forward":
            bias = empty(self._outputs, dtype=self.kind.dtype) if self.bias else None
            getattr(ops, op)(*inputs, *parameters, bias, *geometry)
            return
        for_input = name == "input gradient"
        needs = [False, not for_input, noise_gradient, False]
        grads = self._grad(), self._grad()
        if self.branches:
            one = second is None
            branches = (*grads, input, second, one)
            needs = [for_input, for_input and not one, *needs]
        else:
            branches = (grads[0], input)
            needs = [for_input, *needs]
        getattr(ops, f"{op}_backward")(*branches, *parameters, list(self.input), *geometry, needs)

    @property
    def _windowed(self) -> bool:
        return len(self.weight) > 2

    @property
    def _outputs(self) -> int:
        return self.weight[1] * self.groups if self.transposed else self.weight[0]

    def _tensor(self, *size: int, dtype: torch.dtype) -> Tensor:
        return empty(*size, dtype=dtype, memory_format=self.layout if len(size) == 4 else None)

    def _input(self) -> Tensor:
        return self._tensor(*self.input, dtype=self.kind.dtype)

    def _parameters(self) -> tuple[Tensor, Tensor, Tensor | None]:
        neuron = (self.weight[0], *(1 for _ in self.weight[1:]))
        factors = self.weight if self.factors == "weight" else neuron
        weight = self._tensor(*self.weight, dtype=self.weight_dtype or self.kind.dtype)
        mask, noise = (self._tensor(*factors, dtype=self.mask_dtype) for _ in range(2))
        return weight, mask, noise if self.noise else None

    def _geometry(self) -> tuple:
        sides = len(self.weight) - 2
        padding = [self.dilation * (size // 2) for size in self.weight[2:]]
        numbers = [self.stride] * sides, padding, [self.dilation] * sides
        return *numbers, self.transposed, [0] * sides, self.groups

    def _grad(self) -> Tensor:
        if not self._windowed:
            return empty(self.input[0], self._outputs, dtype=self.kind.dtype)
        geometry = self._geometry()
        sizes = zip(self.input[2:], self.weight[2:], *geometry[:3], strict=True)
        return self._tensor(self.input[0], self._outputs, *map(self._output, sizes), dtype=self.kind.dtype)

    def _output(self, side: tuple[int, ...]) -> int:
        size, taps, stride, padding, dilation = side
        rim = dilation * (taps - 1) - 2 * padding
        return (size - 1) * stride + rim + 1 if self.transposed else (size - rim - 1) // stride + 1


BRANCHES = ("", "two inputs", "one input")
USUAL = Layer("3x3", (128, 128, 32, 32), (128, 128, 3, 3))


def all_cases() -> Iterator[Case]:
    for kind in KINDS:
        yield from _tiles(kind)
    yield from _factors()
    yield from _shapes()
    yield from _epilogues()
    yield from _depthwise()


def _tiles(kind: Kind) -> Iterator[Case]:
    """What takes each entry of the table of blocks, whole and cut to fewer columns."""
    # a tile depends on the bytes of an entry, so float16's are bfloat16's
    for branches in BRANCHES if kind != FLOAT16 else ("",):
        yield from replace(USUAL, kind=kind, branches=branches, noise=bool(branches)).cases()
    if kind != FLOAT16:
        few = replace(USUAL, words="3x3, few pixels", input=(16, 512, 4, 4), weight=(512, 512, 3, 3), kind=kind)
        yield from few.cases()
        yield from Layer("linear", (2048, 512), (512, 512), kind=kind, bias=True).cases()


def _factors() -> Iterator[Case]:
    """Every dtype and granularity of weight, mask and noise."""
    for kind, weight, mask in (
        (BFLOAT16, torch.float32, torch.float32),
        (BFLOAT16, torch.bfloat16, torch.bfloat16),
        (BFLOAT16, torch.bfloat16, torch.uint8),
        (FLOAT16, torch.float32, torch.float16),
        (TF32, torch.bfloat16, torch.uint8),
    ):
        names = (str(dtype).removeprefix("torch.") for dtype in (weight, mask))
        words = "3x3, weight {}, mask {}".format(*names)
        # the gradient of the effective weight is the same for all
        passes = PASSES if kind == FLOAT16 else PASSES[:2]
        yield from replace(USUAL, words=words, kind=kind, weight_dtype=weight, mask_dtype=mask).cases(passes)
    neuron = replace(USUAL, words="3x3, mask per neuron", factors="neuron", bias=True)
    yield from neuron.cases()
    yield from replace(neuron, words=f"{neuron.words} with noise", branches="two inputs", noise=True).cases()
    yield from replace(USUAL, words="3x3 with noise and bias", noise=True, bias=True).cases(PASSES[:2])
    for kind in (BFLOAT16, TF32, FLOAT32):
        both = replace(USUAL, words="3x3, mask and noise gradient", kind=kind, branches="two inputs", noise=True)
        yield from both.cases(PASSES[2:], noise_gradient=True)


def _shapes() -> Iterator[Case]:
    """Every way to address an image."""
    for kind in (BFLOAT16, TF32, FLOAT32):
        yield from replace(USUAL, words="3x3, contiguous", kind=kind, layout=torch.contiguous_format).cases()
        yield from Layer("first layer 3x3", (128, 3, 32, 32), (64, 3, 3, 3), kind).cases(("forward", "mask gradient"))
    yield from Layer("1x1", (128, 128, 32, 32), (256, 128, 1, 1)).cases()
    yield from replace(USUAL, words="3x3, stride 2", stride=2).cases()
    yield from Layer("1x1, stride 2", (128, 128, 32, 32), (256, 128, 1, 1), stride=2).cases()
    yield from Layer("3x3, 8 groups", (128, 256, 32, 32), (256, 32, 3, 3), groups=8).cases()
    yield from replace(USUAL, words="3x3, dilation 2", dilation=2).cases()
    yield from replace(USUAL, words="3x3, stride 2, transposed", stride=2, transposed=True, bias=True).cases()
    yield from Layer("3, one side", (128, 128, 1024), (128, 128, 3), bias=True).cases(PASSES[:1])
    yield from Layer("1x1, odd sizes", (127, 127, 31, 31), (125, 127, 1, 1)).cases()


def _epilogues() -> Iterator[Case]:
    """What follows a convolution before its output is written."""
    for kind in (BFLOAT16, TF32, FLOAT32):
        channels = empty(128)
        output = empty(128, 128, 32, 32, dtype=kind.dtype, memory_format=LAST)
        for words, scale, residual in (("relu", None, None), ("scale, shift, residual, relu", channels, output)):

            def call(kind: Kind = kind, scale: Tensor | None = scale, residual: Tensor | None = residual) -> None:
                layer = replace(USUAL, kind=kind)
                given = layer._input(), *layer._parameters(), None, scale, scale, residual
                with multiplied(kind.precision):
                    ops.masked_conv_relu(*given, [1, 1], [1, 1], [1, 1], 1)

            yield Case(kind.words, f"3x3, {words}", call)


def _depthwise() -> Iterator[Case]:
    layer = Layer("depthwise 3x3", (128, 192, 32, 32), (192, 1, 3, 3), groups=192)
    for side in (3, 5, 7):
        sized = replace(layer, words=f"depthwise {side}x{side}", weight=(192, 1, side, side))
        for branches in BRANCHES:
            yield from replace(sized, branches=branches, noise=bool(branches)).cases()
        yield from replace(sized, kind=FLOAT32, bias=True).cases()
    for kind in (FLOAT16, FLOAT32):
        contiguous = torch.contiguous_format
        yield from replace(layer, words=f"{layer.words}, contiguous", kind=kind, layout=contiguous).cases()
    yield from replace(layer, words=f"{layer.words}, stride 2", stride=2).cases()
    coarse = replace(layer, words=f"{layer.words}, mask per neuron in bytes", factors="neuron", mask_dtype=torch.uint8)
    yield from coarse.cases(PASSES[:2])
    yield from replace(layer, words="depthwise 9x9", weight=(192, 1, 9, 9)).cases()
