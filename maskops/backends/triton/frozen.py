"""Layers whose weights are as they are: the kernels of masked layers without a mask, or cuDNN."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from maskops.backends import _frozen
from maskops.backends._outputs import outputs
from maskops.backends.triton import dense, depthwise
from maskops.backends.triton.layer_views import Op, convolution_op
from maskops.backends.triton.sign_bits import Finish, add_relu_, finite, in_step, relu_backward_
from maskops.backends.triton.ways import either_way_or


@either_way_or(partial(_frozen.conv_relu, add_relu_=add_relu_))
def conv_relu(input, weight, bias, residual, *geometry_and_upper) -> Tensor:
    """``clamp(conv2d(input, weight, bias) + residual, 0, upper)`` in one launch."""
    *geometry, upper = geometry_and_upper
    (output,) = outputs("conv_relu", input, weight, bias, residual, *geometry_and_upper)
    if not output.numel():
        return output
    residual = None if residual is None else in_step(residual, output)
    op = _op(weight, *geometry)
    if op.depthwise:
        finish = Finish(residual, upper=finite(upper), relu=True)
        depthwise.forward([output], [input], weight, None, None, bias, *geometry[:3], finish)
    else:
        epilogue = dense.Epilogue(residual=residual, relu=True, upper=finite(upper))
        dense.forward([output], [input], op.layer, bias, epilogue)
    return output


@either_way_or(partial(_frozen.conv_input_grad, relu_backward_=relu_backward_))
def conv_input_grad(grad, weight, gate, addend, input_size, *geometry_and_upper) -> Tensor:
    """The gradient of a convolution's input, plus ``addend``, where the ReLU before let it pass, in one launch."""
    *geometry, upper = geometry_and_upper
    (result,) = outputs("conv_input_grad", grad, weight, gate, addend, input_size, *geometry_and_upper)
    if not result.numel():
        return result
    addend = None if addend is None else in_step(addend, result)
    if gate is not None and gate.dtype != torch.uint8:
        gate = in_step(gate, result)
    finish = Finish(addend, gate, finite(upper))
    op = _op(weight, *geometry)
    if op.depthwise:
        depthwise.input_grad([result], [grad], weight, None, None, *geometry[:3], finish)
    else:
        dense.input_grad([result], [grad], op.layer, finish=finish)
    return result


def _op(weight, stride, padding, dilation, groups) -> Op:
    return convolution_op(weight, None, None, stride, padding, dilation, False, [0, 0], groups)
