"""Layers whose weights are as they are: a convolution with its ReLU, and backwards with the ReLU before it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskops.backends.reference.sign_bits import relu_bits_backward

aten = torch.ops.aten


def conv_relu(input, weight, bias, residual, stride, padding, dilation, groups, upper) -> Tensor:
    """``clamp(conv2d(input, weight, bias) + residual, 0, upper)``; ``upper`` is infinite for plain ReLU."""
    output = aten.convolution(input, weight, bias, stride, padding, dilation, False, [0, 0], groups)
    if residual is not None:
        output = output.add_(residual)
    return output.relu_() if upper == math.inf else output.clamp_(0, upper)


def conv_input_grad(grad, weight, gate, addend, input_size, stride, padding, dilation, groups, upper) -> Tensor:
    """The gradient of a convolution's input, plus ``addend``, where the ReLU that made this input let it pass.

    ``gate`` and ``upper`` are as for ``relu_backward``; both without ReLU before, or where its gradient comes later.
    """
    result = input_gradient(grad, weight, input_size, stride, padding, dilation, groups)
    if gate is not None:
        return relu_backward(result, gate, addend, upper)
    return result if addend is None else result.add_(addend)


def input_gradient(grad, weight, input_size, stride, padding, dilation, groups) -> Tensor:
    """The gradient of a convolution's input, channels_last where ``grad`` is."""
    input = grad.new_empty(input_size)
    if grad.is_contiguous(memory_format=torch.channels_last):
        input = torch.empty_like(input, memory_format=torch.channels_last)
    geometry = stride, padding, dilation, False, [0, 0], groups
    return aten.convolution_backward(grad, input, weight, None, *geometry, [True, False, False])[0]


def relu_backward(grad: Tensor, gate: Tensor, addend: Tensor | None, upper: float) -> Tensor:
    """``grad + addend`` where the ReLU let its input pass, else 0.

    gate: the bits of ``relu_bits``, in the memory order of ``grad``; or the ReLU's output, which lies in memory as
    ``grad`` does, and ``upper`` with it: the gradient stops where the output is 0 or ``upper``
    """
    if addend is not None:
        grad = grad + addend
    if gate.dtype == torch.uint8:
        return relu_bits_backward(grad, gate)
    if upper == math.inf:
        return aten.threshold_backward(grad, gate, 0)
    # laid out as the gradient is, unlike masked_fill's result
    return torch.where((gate == 0) | (gate == upper), grad.new_zeros(()), grad)
