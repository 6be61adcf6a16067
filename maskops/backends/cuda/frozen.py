"""Layers whose weights are as they are: depthwise ones in kernels, all others by torch's own convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskops.backends import _frozen
from maskops.backends._outputs import outputs
from maskops.backends.cuda._module import ops
from maskops.backends.cuda.layers import is_depthwise
from maskops.backends.reference.frozen import input_gradient


def conv_relu(input, weight, bias, residual, *geometry_and_upper) -> Tensor:
    """``clamp(conv2d(input, weight, bias) + residual, 0, upper)``; all but the convolution in cuDNN, or in one pass."""
    *geometry, upper = geometry_and_upper
    if not is_depthwise(weight, geometry[-1]):
        return _frozen.conv_relu(input, weight, bias, residual, *geometry_and_upper, add_relu_=_add_relu_)
    (output,) = outputs("conv_relu", input, weight, bias, residual, *geometry_and_upper)
    ops.depthwise_conv_(output, input, weight, None, None, bias, *geometry[:3])
    return _add_relu_(output, residual, upper)


def conv_input_grad(grad, weight, gate, addend, input_size, *geometry_and_upper) -> Tensor:
    """The gradient of a convolution's input, plus ``addend``, where the ReLU before let it pass: in one pass more."""
    gradient = _depthwise_input_grad if is_depthwise(weight, geometry_and_upper[-2]) else input_gradient
    arguments = grad, weight, gate, addend, input_size, *geometry_and_upper
    return _frozen.conv_input_grad(*arguments, relu_backward_=_relu_backward_, gradient=gradient)


def _depthwise_input_grad(grad, weight, input_size, *geometry) -> Tensor:
    (result,) = outputs("conv_input_grad", grad, weight, None, None, input_size, *geometry, math.inf)
    ops.depthwise_conv_input_grad_(result, grad, weight, None, None, *geometry[:3])
    return result


def relu_backward(grad: Tensor, gate: Tensor, addend: Tensor | None, upper: float) -> Tensor:
    """``grad + addend`` where the gate, bits or a ReLU's output, lets it pass, else 0: one launch."""
    (result,) = outputs("relu_backward", grad, gate, addend, upper)
    ops.relu_backward_(result, grad, gate, addend, upper)
    return result


def _relu_backward_(grad: Tensor, gate: Tensor, addend: Tensor | None, upper: float) -> Tensor:
    """``relu_backward``, over ``grad``, which has no gaps in memory, where the result has its dtype."""
    if addend is not None and torch.promote_types(grad.dtype, addend.dtype) != grad.dtype:
        return relu_backward(grad, gate, addend, upper)
    ops.relu_backward_(grad, grad, gate, addend, upper)
    return grad


def _add_relu_(output: Tensor, residual: Tensor | None, upper: float) -> Tensor:
    if residual is None:
        return output.relu_() if upper == math.inf else output.clamp_(0, upper)
    ops.add_relu_(output, residual, upper)
    return output
