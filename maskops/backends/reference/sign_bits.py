"""ReLU that leaves one bit per element behind, and max-pooling that leaves one byte per window."""

from __future__ import annotations

from torch import Tensor

_GATHER = 0x0102040810204080
"""Multiplying eight bytes of 0 or 1, read as one integer, by this puts the eight bits into the highest byte."""


def relu_bits(input: Tensor, upper: float) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def relu_bits_(input: Tensor, upper: float) -> Tensor:
    raise NotImplementedError


def relu_bits_backward(grad: Tensor, bits: Tensor) -> Tensor:
    raise NotImplementedError


def max_pool_winners(input, kernel_size, stride, padding, dilation, ceil_mode) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def max_pool_winners_backward(grad, winners, input_size, kernel_size, stride, padding, dilation) -> Tensor:
    raise NotImplementedError
