"""The gradients: what a backward keeps is what the gradients that were asked for need, and nothing else.

With e = weight * (mask + noise), y = layer(input, e) + bias and g = dL/dy:

    dL/dinput  = layerᵀ(g, e)                             needs weight, mask, noise
    dL/de      = the plain layer's weight gradient        needs input
    dL/dmask   = dL/dnoise = reduce(weight * dL/de)       needs input, weight
    dL/dweight = (mask + noise) * dL/de                   needs input, mask, noise

e and dL/de are never kept. Under ``create_graph=True`` the same formulas run as plain, differentiable torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from maskops.backends import reference
from maskops.backends.reference.l1_ball import l1_norm
from maskops.backends.reference.layers import before_relu

_ops = torch.ops.maskops

Branches = tuple[Tensor | None, ...]
"""The input of a layer; of a dual one the clean and the perturbed input, None for the clean one."""


def _compute(op: str, *arguments: Any, backend: str | None) -> Any:
    """The op in a backward; as differentiable torch when a graph of the backward is being made."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return getattr(reference, op)(*arguments)
    return getattr(_ops, op)(*arguments, backend=backend)


def _deal(grads: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """The computed gradients at the places of the inputs that asked for them, None elsewhere."""
    remaining = iter(grads)
    return [next(remaining) if need else None for need in needs]


def run(function: type[Function], *arguments: Any) -> Any:
    """The function with its lean backward; under the transforms of torch.func its formula in differentiable torch."""
    # backend is the last argument of every function
    if torch._C._are_functorch_transforms_active():
        return function.formula(*arguments[:-1])
    return function.apply(*arguments)


def run_layer(function: type[Function], inputs: Branches, weight, mask, noise, bias, *options: Any) -> Any:
    """A masked layer, computed in the dtype of the inputs; under autocast in autocast's."""
    dtype, device = inputs[0].dtype, inputs[0].device.type
    # autocast knows no meta tensors, and leaves float64 alone
    if dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        inputs = each(lambda input: input.to(dtype), inputs)
        with torch.autocast(device, enabled=False):
            return run_layer(function, inputs, weight, mask, noise, bias, *options)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    return run(function, *inputs, weight, mask, noise, bias, *options)


def each(change: Callable[[Tensor], Tensor], inputs: Branches) -> Branches:
    """The changed inputs; a perturbed input that isn't there stays so."""
    return tuple(input if input is None else change(input) for input in inputs)


class EffectiveWeight(Function):
    """``weight * (mask + noise)`` in ``dtype``."""

    formula = staticmethod(reference.effective_weight)

    @staticmethod
    def forward(ctx, weight, mask, noise, dtype, backend):
        ctx.backend = backend
        ctx.save_for_backward(weight, mask, noise)
        return _ops.effective_weight(weight, mask, noise, dtype, backend=backend)

    @staticmethod
    def backward(ctx, grad):
        needs = list(ctx.needs_input_grad[:3])
        grads = _compute("effective_weight_backward", grad, *ctx.saved_tensors, needs, backend=ctx.backend)
        return *_deal(grads, needs), None, None


class EffectiveWeights(Function):
    """The effective weights of many layers; weights and scales are frozen."""

    @staticmethod
    def formula(count, has_noise, has_scales, dtype, *tensors):
        return tuple(reference.effective_weights(*_in_lists(count, has_noise, has_scales, tensors), dtype))

    @staticmethod
    def forward(ctx, count, has_noise, has_scales, dtype, *tensors_and_backend):
        *tensors, ctx.backend = tensors_and_backend
        ctx.lists = count, has_noise, has_scales
        ctx.save_for_backward(*tensors)
        return tuple(_ops.effective_weights(*_in_lists(*ctx.lists, tensors), dtype, backend=ctx.backend))

    @staticmethod
    def backward(ctx, *grads):
        count, _, has_scales = ctx.lists
        lists = _in_lists(*ctx.lists, ctx.saved_tensors)
        found = _compute("effective_weights_backward", list(grads), *lists, backend=ctx.backend)
        wanted = ctx.needs_input_grad[4 + count : 4 + count + len(found)]
        found = [grad if need else None for grad, need in zip(found, wanted, strict=True)]
        return *[None] * (4 + count), *found, *[None] * (count * has_scales), None


def _in_lists(count: int, has_noise: bool, has_scales: bool, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Weights, masks, noises and scales, of which the last two may be none."""
    counts = [count, count, count * has_noise, count * has_scales]
    ends = list(accumulate(counts))
    return [list(tensors[end - size : end]) for size, end in zip(counts, ends, strict=True)]


class MaskedLayer(Function):
    """A masked convolution (kind ``"conv"``, geometry as the op takes it) or linear layer (``"linear"``, ``()``)."""

    @staticmethod
    def formula(input, weight, mask, noise, bias, kind, geometry):
        return getattr(reference, f"masked_{kind}")(input, weight, mask, noise, bias, *geometry)

    @staticmethod
    def forward(ctx, input, weight, mask, noise, bias, kind, geometry, backend):
        ctx.kind, ctx.geometry, ctx.backend, ctx.input_size = kind, geometry, backend, input.shape
        need_factors = any(ctx.needs_input_grad[1:4])
        # weight, mask and noise are parameters: keeping them costs a reference each.
        ctx.save_for_backward(input if need_factors else None, weight, mask, noise)
        return getattr(_ops, f"masked_{kind}")(input, weight, mask, noise, bias, *geometry, backend=backend)

    @staticmethod
    def backward(ctx, grad):
        input, weight, mask, noise = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        grads = _compute(
            f"masked_{ctx.kind}_backward",
            *(grad, input, weight, mask, noise, ctx.input_size, *ctx.geometry, needs),
            backend=ctx.backend,
        )
        return *_deal(grads, needs), None, None, None


class MaskedConvReLU(Function):
    """``relu(scale * conv(input, weight * (mask + noise), bias) + shift + residual)``, of which backward keeps bits."""

    @staticmethod
    def formula(input, weight, mask, noise, bias, scale, shift, residual, geometry):
        return before_relu(input, weight, mask, noise, bias, scale, shift, residual, *geometry).relu()

    @staticmethod
    def forward(ctx, input, weight, mask, noise, bias, scale, shift, residual, geometry, backend):
        layer = (input, weight, mask, noise, bias, scale, shift, residual)
        output, bits = _ops.masked_conv_relu(*layer, *geometry, backend=backend)
        ctx.geometry, ctx.backend, ctx.input_size, ctx.strides = geometry, backend, input.shape, output.stride()
        ctx.residual_dtype = None if residual is None else residual.dtype
        need_factors = any(ctx.needs_input_grad[1:4])
        ctx.save_for_backward(input if need_factors else None, weight, mask, noise, scale, bits)
        return output

    @staticmethod
    def backward(ctx, grad):
        input, weight, mask, noise, scale, bits = ctx.saved_tensors
        grad = ReLUBackward.apply(grad, bits, ctx.strides, ctx.backend)
        grads = [None] * 5
        needs = list(ctx.needs_input_grad[:5])
        if any(needs):
            stride, padding, dilation, groups = ctx.geometry
            before = grad if scale is None else (grad * scale.view(-1, 1, 1)).to(grad.dtype)
            geometry = (stride, padding, dilation, False, [0, 0], groups)
            layer = (before, input, weight, mask, noise, ctx.input_size, *geometry, needs)
            grads = _deal(_compute("masked_conv_backward", *layer, backend=ctx.backend), needs)
        grad_residual = grad.to(ctx.residual_dtype) if ctx.needs_input_grad[7] else None
        return *grads, None, None, grad_residual, None, None


class ReLUBackward(Function):
    """The gradient where the bit is 1, else 0: linear in the gradient, and its own adjoint.

    strides: those of the ReLU's output, in whose memory order the bits are
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, bits, strides, backend):
        if grad.stride() != strides:
            grad = grad.new_empty_strided(grad.shape, strides).copy_(grad)
        return _ops.relu_bits_backward(grad, bits, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, bits, ctx.strides, ctx.backend = inputs
        ctx.save_for_backward(bits)

    @staticmethod
    def backward(ctx, grad):
        return ReLUBackward.apply(grad, *ctx.saved_tensors, ctx.strides, ctx.backend), None, None, None


class DualMaskedLayer(Function):
    """The clean and the perturbed output of a masked layer in one pass."""

    @staticmethod
    def formula(input, perturbed_input, weight, mask, noise, bias, kind, geometry):
        return getattr(reference, f"dual_masked_{kind}")(input, perturbed_input, weight, mask, noise, bias, *geometry)

    @staticmethod
    def forward(ctx, input, perturbed_input, weight, mask, noise, bias, kind, geometry, backend):
        ctx.kind, ctx.geometry, ctx.backend, ctx.input_size = kind, geometry, backend, input.shape
        ctx.one_input = perturbed_input is None
        ctx.set_materialize_grads(False)
        kept = (input, perturbed_input) if any(ctx.needs_input_grad[2:5]) else (None, None)
        ctx.save_for_backward(*kept, weight, mask, noise)
        op = getattr(_ops, f"dual_masked_{kind}")
        return op(input, perturbed_input, weight, mask, noise, bias, *geometry, backend=backend)

    @staticmethod
    def backward(ctx, grad, perturbed_grad):
        if grad is None and perturbed_grad is None:
            return (None,) * 9
        input, perturbed_input, weight, mask, noise = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:6])
        needs[0] &= grad is not None or ctx.one_input
        needs[1] &= perturbed_grad is not None
        needs[4] &= perturbed_grad is not None
        branches = (grad, perturbed_grad, input, perturbed_input, ctx.one_input)
        grads = _compute(
            f"dual_masked_{ctx.kind}_backward",
            *(*branches, weight, mask, noise, ctx.input_size, *ctx.geometry, needs),
            backend=ctx.backend,
        )
        return *_deal(grads, needs), None, None, None


class RescaleToL1Ball(Function):
    """Outside the ball, with n = sum|x| and s = sign(x): dx = radius / n * (g - s * sum(g * x) / n)."""

    formula = staticmethod(reference.rescale_to_l1_ball)

    @staticmethod
    def forward(ctx, input, radius, backend):
        ctx.radius = radius
        ctx.save_for_backward(input)
        return _ops.rescale_to_l1_ball(input, radius, backend=backend)

    @staticmethod
    def backward(ctx, grad):
        (input,) = ctx.saved_tensors
        norm = l1_norm(input)
        radial = input.sign() * (grad.double() * input).sum(1, keepdim=True) / norm
        scale = ctx.radius / norm.clamp_min(ctx.radius)
        return (scale * (grad - radial * (norm > ctx.radius))).to(grad.dtype), None, None


class ProjectOntoL1Ball(Function):
    """Outside the ball, with the support S = {y != 0} and s = sign(y): dx = 1_S * (g - s * sum_S(g * s) / |S|)."""

    formula = staticmethod(reference.project_onto_l1_ball)

    @staticmethod
    def forward(ctx, input, radius, backend):
        output = _ops.project_onto_l1_ball(input, radius, backend=backend)
        ctx.radius = radius
        ctx.save_for_backward(input, output)
        return output

    @staticmethod
    def backward(ctx, grad):
        input, output = ctx.saved_tensors
        sign = output.sign()
        support = sign.abs().double()
        mean = (grad * sign).sum(1, keepdim=True, dtype=torch.float64) / support.sum(1, keepdim=True).clamp_min(1)
        outside = support * (grad - sign * mean)
        return torch.where(l1_norm(input) <= ctx.radius, grad, outside).to(grad.dtype), None, None
