"""Masked convolution and linear layers: depthwise ones in kernels that apply the mask, all others materialised.

Materialised: a kernel writes the effective weight, then torch's own layer runs.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from maskops.backends import _frozen, reference
from maskops.backends._outputs import outputs
from maskops.backends.cuda._module import ops
from maskops.backends.reference.layers import Weighting, dual_backward

_KERNELS = Weighting(ops.effective_weight.default, ops.effective_weight_backward.default)

masked_linear = partial(reference.masked_linear, weighting=_KERNELS)
masked_linear_backward = partial(reference.masked_linear_backward, weighting=_KERNELS)
dual_masked_linear = partial(reference.dual_masked_linear, weighting=_KERNELS)
dual_masked_linear_backward = partial(reference.dual_masked_linear_backward, weighting=_KERNELS)


def masked_conv(input, weight, mask, noise, bias, *geometry) -> Tensor:
    """``conv(input, weight * (mask + noise), bias)``; a depthwise one with no effective weight in memory."""
    if not is_depthwise(weight, geometry[-1], geometry[3]):
        return reference.masked_conv(input, weight, mask, noise, bias, *geometry, weighting=_KERNELS)
    (output,) = outputs("masked_conv", input, weight, mask, noise, bias, *geometry)
    ops.depthwise_conv_(output, input, *_filter(weight, mask, noise), bias, *geometry[:3])
    return output


def masked_conv_backward(grad, input, weight, mask, noise, input_size, *geometry_and_needs) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order input, weight, mask, noise, bias."""
    *geometry, needs = geometry_and_needs
    arguments = (grad, input, weight, mask, noise, input_size, *geometry_and_needs)
    if not is_depthwise(weight, geometry[-1], geometry[3]):
        return reference.masked_conv_backward(*arguments, weighting=_KERNELS)
    made = outputs("masked_conv_backward", *arguments)
    need_input, *need_factors, need_bias = needs
    grads = []
    if need_input:
        ops.depthwise_conv_input_grad_(made[0], grad, *_filter(weight, mask, noise), *geometry[:3])
        grads.append(made[0])
    if any(need_factors):
        grad_effective = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        ops.depthwise_conv_weight_grad_(grad_effective, grad, input, *geometry[:3])
        grads += _KERNELS.backward(grad_effective, weight, mask, noise, need_factors)
    if need_bias:
        grads.append(grad.sum((0, 2, 3), dtype=torch.float32))
    return [_laid_out(value, like) for value, like in zip(grads, made, strict=True)]


def masked_conv_relu(
    input, weight, mask, noise, bias, scale, shift, residual, stride, padding, dilation, groups
) -> tuple[Tensor, Tensor]:
    """``relu(scale * conv(input, weight * (mask + noise), bias) + shift + residual)``, and its bits.

    Where cuDNN computes convolution, bias, residual and ReLU at once, the scale is folded into the effective weight.
    Else the rest is one pass over the convolution's output.
    """
    geometry = (stride, padding, dilation, groups)
    if _frozen.may_be_cudnns(input, weight, residual, *geometry):
        output = _cudnn_conv_relu(input, weight, mask, noise, bias, scale, shift, residual, geometry)
        if output is not None:
            return output, ops.relu_bits_(output, math.inf)
    output = masked_conv(input, weight, mask, noise, bias, stride, padding, dilation, False, [0, 0], groups)
    if scale is None and shift is None and residual is None:
        return output, ops.relu_bits_(output, math.inf)
    return output, ops.affine_relu_bits_(output, scale, shift, residual, math.inf)


def _cudnn_conv_relu(input, weight, mask, noise, bias, scale, shift, residual, geometry) -> Tensor | None:
    noises, scales = [] if noise is None else [noise], [] if scale is None else [scale]
    effective = ops.effective_weights([weight], [mask], noises, scales, input.dtype)[-1]
    if bias is not None and scale is not None:
        bias = bias * scale
    terms = [term for term in (bias, shift) if term is not None]
    bias = sum(terms) if terms else None
    return _frozen.cudnn_conv_relu(input, effective, bias, residual, *geometry)


def dual_masked_conv(input, perturbed_input, weight, mask, noise, bias, *geometry) -> tuple[Tensor, Tensor]:
    """``masked_conv`` of the input without noise, and of the perturbed input (or the same input) with noise."""
    perturbed_input = input if perturbed_input is None else perturbed_input
    clean = masked_conv(input, weight, mask, None, bias, *geometry)
    return clean, masked_conv(perturbed_input, weight, mask, noise, bias, *geometry)


def dual_masked_conv_backward(
    grad, perturbed_grad, input, perturbed_input, one_input, weight, mask, noise, input_size, *geometry_and_needs
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order input, perturbed_input, weight, mask, noise, bias."""
    *geometry, needs = geometry_and_needs

    def branch(grad, input, noise, needs):
        return masked_conv_backward(grad, input, weight, mask, noise, input_size, *geometry, needs)

    return dual_backward(branch, grad, perturbed_grad, input, perturbed_input, one_input, noise, needs)


def is_depthwise(weight: Tensor, groups: int, transposed: bool = False) -> bool:
    """Whether it is a convolution over images with one filter and one output channel per input channel."""
    return weight.dim() == 4 and weight.shape[1] == 1 and groups == weight.shape[0] and not transposed


def _filter(weight: Tensor, mask: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors in the weight's shape, with strides of 0 where they are broadcast, on the weight's device."""
    return weight, *(None if f is None else f.to(weight.device).expand(weight.shape) for f in (mask, noise))


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """The value in the dtype and strides of an output."""
    return value if (value.dtype, value.stride()) == (like.dtype, like.stride()) else like.copy_(value)
