"""Masked layers as the kernels take them: two-dimensional convolutions over views of the op's tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from maskops.backends.triton import depthwise
from maskops.backends.triton.weights import spread

_FEW_CHANNELS = 16
"""Below so many input channels a step of the sum runs over several taps."""


class Layer(NamedTuple):
    """A masked layer: weight (O, C / groups, R, S), the factors with strides of 0 where they are broadcast.

    mask:       None where the weight is the effective weight already; then there is no noise either
    transposed: the layer is the transpose of this convolution: O counts its input's channels
    precision:  of float32 products, "ieee" or "tf32"
    """

    weight: Tensor
    mask: Tensor | None
    noise: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    precision: str

    @property
    def pointwise(self) -> bool:
        """Whether every output pixel sees one input pixel, which is there."""
        return self.weight.shape[2:] == (1, 1) and self.padding == (0, 0)

    @property
    def flat(self) -> bool:
        """Whether a step of the sum runs over several taps, as few channels would not fill it."""
        _, channels, r, s = self.weight.shape
        return channels < _FEW_CHANNELS and r * s > 1

    @property
    def phases(self) -> int:
        """How many residues the input's pixels have modulo the stride; each has taps of its own."""
        return math.prod(self.stride)

    @property
    def tap_step(self) -> tuple[int, ...]:
        """How far apart the taps are that reach the pixels of one phase."""
        return tuple(step // math.gcd(step, gap) for step, gap in zip(self.stride, self.dilation, strict=True))

    @property
    def per_neuron(self) -> bool:
        """Whether mask and noise are one number per neuron, at most."""
        return not any(any(factor[1:]) for factor in self.steps()[1:])

    @property
    def entry_bytes(self) -> int:
        """What a kernel loads for each weight: the weight, and of the factors what isn't one number per neuron."""
        factors = [self.weight] if self.per_neuron else [factor for factor in self[:3] if factor is not None]
        return sum(factor.element_size() for factor in factors)

    def steps(self) -> tuple[tuple[int, ...], ...]:
        """The steps of weight, mask and noise, as the kernels take them."""
        return tuple((0, 0, 0, 0) if factor is None else steps(factor) for factor in self[:3])


class Op(NamedTuple):
    """A layer for the kernels, and what leads from the op's tensors to theirs and back."""

    layer: Layer
    weight: Tensor
    mask: Tensor | None
    noise: Tensor | None
    image: Callable[[Tensor], Tensor]
    """An activation as (images, channels, rows, columns)."""

    def without_noise(self) -> Op:
        return self._replace(layer=self.layer._replace(noise=None), noise=None)

    @property
    def depthwise(self) -> bool:
        return depthwise.serves(self.layer.weight, self.layer.groups, self.layer.transposed)


def convolution_op(weight, mask, noise, stride, padding, dilation, transposed, output_padding, groups) -> Op:
    """A convolution over one or two dimensions, or the transpose of one."""
    factors = (weight, spread(mask, weight), spread(noise, weight))
    geometry = (stride, padding, dilation)
    image = _itself
    if weight.dim() == 3:
        factors = [None if factor is None else factor.unsqueeze(2) for factor in factors]
        geometry = ((1, *stride), (0, *padding), (1, *dilation))
        image = _row
    precision = _precision(torch.backends.cudnn.conv)
    layer = Layer(*factors, *(tuple(numbers) for numbers in geometry), groups, transposed, precision)
    return Op(layer, weight, mask, noise, image)


def linear_op(weight, mask, noise) -> Op:
    """A linear layer, as a convolution of 1x1 over images of one pixel."""
    factors = (weight, spread(mask, weight), spread(noise, weight))
    factors = [None if factor is None else factor[:, :, None, None] for factor in factors]
    precision = _precision(torch.backends.cuda.matmul)
    return Op(Layer(*factors, (1, 1), (0, 0), (1, 1), 1, False, precision), weight, mask, noise, _pixels)


def steps(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's strides, 0 in dimensions of one entry: torch has anything there, which would hide the alignment."""
    return tuple(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def in_a_row(vector: Tensor | None) -> Tensor | None:
    """One number per channel, neighbours in memory."""
    return None if vector is None else vector.contiguous()


def are_wide(*tensors: Tensor) -> bool:
    """Whether channels are neighbours in memory, in rows that start at multiples of sixteen."""
    for image, channel, row, column in map(steps, tensors):
        if channel != 1 or image % 16 or row % 16 or column % 16:
            return False
    return True


def _itself(activation: Tensor) -> Tensor:
    return activation


def _row(activation: Tensor) -> Tensor:
    return activation.unsqueeze(2)


def _pixels(activation: Tensor) -> Tensor:
    """Rows of features as images of one pixel."""
    rows = math.prod(activation.shape[:-1])
    return activation.reshape(rows, activation.shape[-1])[:, :, None, None]


def _precision(backend) -> str:
    """How the user wants float32 to be multiplied."""
    return "tf32" if backend.fp32_precision == "tf32" else "ieee"
