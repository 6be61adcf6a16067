"""Masked convolution and linear layers, forward and backward, and the effective weight they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops.backends.reference.sign_bits import relu_bits_

aten = torch.ops.aten


def effective_weight(weight: Tensor, mask: Tensor, noise: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``weight * mask``, or ``weight * (mask + noise)``."""
    return (weight * _factor(mask, noise)).to(dtype)


def _factor(mask: Tensor, noise: Tensor | None) -> Tensor:
    mask = mask_value(mask)
    return mask if noise is None else mask + noise


def mask_value(mask: Tensor) -> Tensor:
    """The mask; one of bytes, which count in steps of 1/255, as float32."""
    return mask.float() / 255 if mask.dtype == torch.uint8 else mask


def effective_weight_backward(
    grad: Tensor, weight: Tensor, mask: Tensor, noise: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    """``grad * (mask + noise)`` for the weight; ``grad * weight``, summed where broadcast, for mask and noise."""
    need_weight, need_mask, need_noise = needs
    # in the widest dtype, so that a float32 mask over 16-bit weights has a float32 gradient
    grad = grad.to(reduce(torch.promote_types, [t.dtype for t in (grad, weight, mask, noise) if t is not None]))
    grads = []
    if need_weight:
        grads.append((grad * _factor(mask, noise)).to(weight.dtype))
    # a product each, because no two outputs of an op may share their memory
    for factor, need in ((mask, need_mask), (noise, need_noise)):
        if need:
            grads.append((grad * weight).sum_to_size(factor.shape).to(factor.dtype))
    return grads


class Weighting(NamedTuple):
    """Who makes the effective weights of a layer, and the gradients of their factors."""

    forward: Callable[..., Tensor]
    backward: Callable[..., list[Tensor]]


_PLAIN = Weighting(effective_weight, effective_weight_backward)


def masked_conv(input, weight, mask, noise, bias, *geometry, weighting=_PLAIN) -> Tensor:
    """``conv(input, effective_weight(weight, mask, noise), bias)``.

    geometry: stride, padding, dilation, transposed, output_padding, groups
    """
    return torch.convolution(input, weighting.forward(weight, mask, noise, input.dtype), bias, *geometry)


def before_relu(input, weight, mask, noise, bias, scale, shift, residual, stride, padding, dilation, groups) -> Tensor:
    """``scale * masked_conv(…) + shift + residual``, scale and shift one number per channel."""
    output = masked_conv(input, weight, mask, noise, bias, stride, padding, dilation, False, [0, 0], groups)
    if scale is not None:
        output = output * scale.view(-1, 1, 1)
    if shift is not None:
        output = output + shift.view(-1, 1, 1)
    if residual is not None:
        output = output + residual
    return output.to(input.dtype)


def masked_conv_relu(*arguments) -> tuple[Tensor, Tensor]:
    """``relu(before_relu(…))`` and its bits."""
    output = before_relu(*arguments)
    return output, relu_bits_(output, math.inf)


def masked_conv_backward(
    grad, input, weight, mask, noise, input_size, *geometry_and_needs, weighting=_PLAIN
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order input, weight, mask, noise, bias."""
    *geometry, needs = geometry_and_needs
    *_, transposed, _, groups = geometry
    need_input, *need_factors, need_bias = needs
    if need_input:
        effective = weighting.forward(weight, mask, noise, grad.dtype)
    else:
        effective = weight.to(grad.dtype)
    if input is None:
        input = _of_size(input_size, grad)
    bias_size = [weight.shape[1] * groups if transposed else weight.shape[0]]
    grad_input, grad_effective, grad_bias = aten.convolution_backward(
        grad, input, effective, bias_size, *geometry, [need_input, any(need_factors), need_bias]
    )
    return _gather(grad_input, grad_effective, grad_bias, weight, mask, noise, needs, weighting)


def _of_size(size: list[int], like: Tensor) -> Tensor:
    """Unwritten memory in the layout of ``like``, for an op that reads of its input only the size."""
    channels_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last and not like.is_contiguous() else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def masked_linear(input, weight, mask, noise, bias, *, weighting=_PLAIN) -> Tensor:
    """``linear(input, effective_weight(weight, mask, noise), bias)``."""
    return F.linear(input, weighting.forward(weight, mask, noise, input.dtype), bias)


def masked_linear_backward(grad, input, weight, mask, noise, input_size, needs, *, weighting=_PLAIN) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order input, weight, mask, noise, bias."""
    need_input, *need_factors, need_bias = needs
    grad_input = grad_effective = grad_bias = None
    if need_input:
        grad_input = grad @ weighting.forward(weight, mask, noise, grad.dtype)
    rows = _rows(grad)
    if any(need_factors):
        grad_effective = rows.t() @ _rows(input)
    if need_bias:
        grad_bias = rows.sum(0)
    return _gather(grad_input, grad_effective, grad_bias, weight, mask, noise, needs, weighting)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _gather(grad_input, grad_effective, grad_bias, weight, mask, noise, needs, weighting) -> list[Tensor]:
    need_input, *need_factors, need_bias = needs
    grads = [grad_input] if need_input else []
    if any(need_factors):
        grads += weighting.backward(grad_effective, weight, mask, noise, need_factors)
    return [*grads, grad_bias] if need_bias else grads


def dual_masked_conv(
    input, perturbed_input, weight, mask, noise, bias, *geometry, weighting=_PLAIN
) -> tuple[Tensor, Tensor]:
    """``masked_conv`` of the input without noise, and of the perturbed input (or the same input) with noise."""
    perturbed_input = input if perturbed_input is None else perturbed_input
    clean = masked_conv(input, weight, mask, None, bias, *geometry, weighting=weighting)
    return clean, masked_conv(perturbed_input, weight, mask, noise, bias, *geometry, weighting=weighting)


def dual_masked_conv_backward(
    grad,
    perturbed_grad,
    input,
    perturbed_input,
    one_input,
    weight,
    mask,
    noise,
    input_size,
    *geometry_and_needs,
    weighting=_PLAIN,
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order input, perturbed_input, weight, mask, noise, bias."""
    *geometry, needs = geometry_and_needs

    def branch(grad, input, noise, needs):
        layer = (weight, mask, noise, input_size, *geometry, needs)
        return masked_conv_backward(grad, input, *layer, weighting=weighting)

    return dual_backward(branch, grad, perturbed_grad, input, perturbed_input, one_input, noise, needs)


def dual_masked_linear(input, perturbed_input, weight, mask, noise, bias, *, weighting=_PLAIN) -> tuple[Tensor, Tensor]:
    """``masked_linear`` of the input without noise, and of the perturbed input (or the same input) with noise."""
    perturbed_input = input if perturbed_input is None else perturbed_input
    clean = masked_linear(input, weight, mask, None, bias, weighting=weighting)
    return clean, masked_linear(perturbed_input, weight, mask, noise, bias, weighting=weighting)


def dual_masked_linear_backward(
    grad,
    perturbed_grad,
    input,
    perturbed_input,
    one_input,
    weight,
    mask,
    noise,
    input_size,
    needs,
    *,
    weighting=_PLAIN,
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order input, perturbed_input, weight, mask, noise, bias."""

    def branch(grad, input, noise, needs):
        return masked_linear_backward(grad, input, weight, mask, noise, input_size, needs, weighting=weighting)

    return dual_backward(branch, grad, perturbed_grad, input, perturbed_input, one_input, noise, needs)


def dual_backward(branch, grad, perturbed_grad, input, perturbed_input, one_input, noise, needs) -> list[Tensor]:
    """The gradients of both branches, added: ``branch(grad, input, noise, needs)`` gives those of one."""
    order = ("input", "perturbed_input", "weight", "mask", "noise", "bias")
    need = dict(zip(order, needs, strict=True))
    totals: dict[str, Tensor] = {}

    def add(grad, input, noise, names):
        needed = [need[name] and not (name == "noise" and noise is None) for name in names]
        wanted = [name for name, is_needed in zip(names, needed, strict=True) if is_needed]
        for name, value in zip(wanted, branch(grad, input, noise, needed), strict=True):
            totals[name] = totals[name] + value if name in totals else value

    factors = ("weight", "mask", "noise", "bias")
    if grad is not None:
        add(grad, input, None, ("input", *factors))
    if perturbed_grad is not None:
        if one_input:
            add(perturbed_grad, input, noise, ("input", *factors))
        else:
            add(perturbed_grad, perturbed_input, noise, ("perturbed_input", *factors))
    return [totals[name] for name in order if need[name]]
