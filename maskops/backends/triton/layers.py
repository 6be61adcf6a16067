"""Masked convolution and linear layers: the ops, and which kernels serve them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskops.backends._outputs import outputs
from maskops.backends.triton import dense, depthwise, sign_bits
from maskops.backends.triton.layer_views import Op, convolution_op, linear_op, steps
from maskops.backends.triton.ways import either_way
from maskops.backends.triton.weights import write_factor_grads

_BRANCHED = ("input", "perturbed_input", "weight", "mask", "noise", "bias")


@either_way
def masked_conv(input, weight, mask, noise, bias, *geometry) -> Tensor:
    """``conv(input, weight * (mask + noise), bias)`` in one launch, with no effective weight in memory."""
    made = outputs("masked_conv", input, weight, mask, noise, bias, *geometry)
    write_outputs(convolution_op(weight, mask, noise, *geometry), made, [input], bias)
    return made[0]


def masked_conv_relu(
    input, weight, mask, noise, bias, scale, shift, residual, stride, padding, dilation, groups
) -> tuple[Tensor, Tensor]:
    """``relu(scale * conv(input, weight * (mask + noise), bias) + shift + residual)`` in one launch, with its bits.

    Bytes of bits are made of eight output channels that are neighbours in memory; for others a second launch packs.
    """
    geometry = (stride, padding, dilation, groups)
    arguments = (input, weight, mask, noise, bias, scale, shift, residual)
    output, bits = outputs("masked_conv_relu", *arguments, *geometry)
    if residual is not None and residual.stride() != output.stride():
        residual = torch.empty_like(output, dtype=residual.dtype).copy_(residual)
    op = convolution_op(weight, mask, noise, stride, padding, dilation, False, [0, 0], groups)
    if not output.numel():
        return output, bits
    packs = groups == 1 and output.shape[1] % 8 == 0 and output.is_contiguous(memory_format=torch.channels_last)
    epilogue = dense.Epilogue(scale, shift, residual, bits if packs else None, relu=True)
    dense.forward([output], [input], op.layer, bias, epilogue)
    return output, bits if packs else sign_bits.relu_bits_(output, math.inf)


@either_way
def masked_linear(input, weight, mask, noise, bias) -> Tensor:
    """``linear(input, weight * (mask + noise), bias)`` in one launch, with no effective weight in memory."""
    made = outputs("masked_linear", input, weight, mask, noise, bias)
    write_outputs(linear_op(weight, mask, noise), made, [input], bias)
    return made[0]


@either_way
def dual_masked_conv(input, perturbed_input, weight, mask, noise, bias, *geometry) -> tuple[Tensor, Tensor]:
    """Both branches in one launch: every tile of θ, m and δ is read once."""
    made = outputs("dual_masked_conv", input, perturbed_input, weight, mask, noise, bias, *geometry)
    write_outputs(convolution_op(weight, mask, noise, *geometry), made, [input, perturbed_input], bias)
    return made[0], made[1]


@either_way
def dual_masked_linear(input, perturbed_input, weight, mask, noise, bias) -> tuple[Tensor, Tensor]:
    """Both branches in one launch: every tile of θ, m and δ is read once."""
    made = outputs("dual_masked_linear", input, perturbed_input, weight, mask, noise, bias)
    write_outputs(linear_op(weight, mask, noise), made, [input, perturbed_input], bias)
    return made[0], made[1]


@either_way
def masked_conv_backward(grad, input, weight, mask, noise, input_size, *geometry_and_needs) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order input, weight, mask, noise, bias."""
    *geometry, needs = geometry_and_needs
    made = outputs("masked_conv_backward", grad, input, weight, mask, noise, input_size, *geometry_and_needs)
    _backward(convolution_op(weight, mask, noise, *geometry), _named(made, [needs[0], False, *needs[1:]]), grad, input)
    return made


@either_way
def masked_linear_backward(grad, input, weight, mask, noise, input_size, needs) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order input, weight, mask, noise, bias."""
    made = outputs("masked_linear_backward", grad, input, weight, mask, noise, input_size, needs)
    _backward(linear_op(weight, mask, noise), _named(made, [needs[0], False, *needs[1:]]), grad, input)
    return made


@either_way
def dual_masked_conv_backward(
    grad, perturbed_grad, input, perturbed_input, one_input, weight, mask, noise, input_size, *geometry_and_needs
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order input, perturbed_input, weight, mask, noise, bias."""
    *geometry, needs = geometry_and_needs
    branches = (grad, perturbed_grad, input, perturbed_input, one_input)
    made = outputs("dual_masked_conv_backward", *branches, weight, mask, noise, input_size, *geometry_and_needs)
    _dual_backward(convolution_op(weight, mask, noise, *geometry), _named(made, needs), *branches)
    return made


@either_way
def dual_masked_linear_backward(
    grad, perturbed_grad, input, perturbed_input, one_input, weight, mask, noise, input_size, needs
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order input, perturbed_input, weight, mask, noise, bias."""
    branches = (grad, perturbed_grad, input, perturbed_input, one_input)
    made = outputs("dual_masked_linear_backward", *branches, weight, mask, noise, input_size, needs)
    _dual_backward(linear_op(weight, mask, noise), _named(made, needs), *branches)
    return made


def _named(made: list[Tensor], needs: list[bool]) -> dict[str, Tensor]:
    wanted = (name for name, need in zip(_BRANCHED, needs, strict=True) if need)
    return dict(zip(wanted, made, strict=True))


def write_outputs(op: Op, made: list[Tensor], inputs: list[Tensor | None], bias: Tensor | None) -> None:
    """Write the output of one branch, with noise, or those of two, the first without noise and the second with it."""
    targets = [op.image(output) for output in made]
    sources = _images(op, inputs)
    if not _alike(targets) or not _alike(sources):
        _write(op.without_noise(), targets[:1], sources[:1], bias)
        _write(op, targets[1:], sources[1:], bias)
    else:
        _write(op, targets, sources, bias)


def _images(op: Op, activations: list[Tensor | None]) -> list[Tensor]:
    """The activations as images; a missing second one is the first, the same object."""
    first = op.image(activations[0])
    return [first, *(first if other is None else op.image(other) for other in activations[1:])]


def _alike(tensors: list[Tensor]) -> bool:
    return steps(tensors[0]) == steps(tensors[-1])


def _write(op: Op, targets: list[Tensor], sources: list[Tensor], bias: Tensor | None) -> None:
    layer = op.layer
    if op.depthwise:
        depthwise.forward(targets, sources, *layer[:3], bias, *layer[3:6])
    elif layer.transposed:
        dense.input_grad(targets, sources, layer, bias)
    else:
        dense.forward(targets, sources, layer, bias)


def _dual_backward(op, made, grad, perturbed_grad, input, perturbed_input, one_input) -> None:
    if grad is None:
        _backward(op, made, perturbed_grad, input if one_input else perturbed_input)
        return
    if perturbed_grad is None:
        _backward(op.without_noise(), made, grad, input)
        return
    grads = _images(op, [grad, perturbed_grad])
    if not _alike(grads):
        grads = [grad.contiguous() for grad in grads]
    if one_input and "input" in made:
        write_input_grads(op, [made["input"]], grads)
    elif "input" in made and "perturbed_input" in made:
        write_input_grads(op, [made["input"], made["perturbed_input"]], grads)
    elif "input" in made:
        write_input_grads(op.without_noise(), [made["input"]], grads[:1])
    elif "perturbed_input" in made:
        write_input_grads(op, [made["perturbed_input"]], grads[1:])
    write_other_grads(op, made, grads, [input, None if one_input else perturbed_input])


def _backward(op: Op, made: dict[str, Tensor], grad: Tensor, input: Tensor | None) -> None:
    """The gradients of one branch."""
    grads = [op.image(grad)]
    for name in ("input", "perturbed_input"):
        if name in made:
            write_input_grads(op, [made[name]], grads)
    write_other_grads(op, made, grads, [input])


def write_input_grads(op: Op, made: list[Tensor], grads: list[Tensor]) -> None:
    """Write the gradient of each input; of two gradients and one input the sum. The gradients have equal strides."""
    targets = [op.image(target) for target in made]
    layer = op.layer
    if not _alike(targets):
        write_input_grads(op.without_noise(), made[:1], grads[:1])
        write_input_grads(op, made[1:], grads[1:])
    elif op.depthwise:
        depthwise.input_grad(targets, grads, *layer[:6])
    elif layer.transposed:
        total = targets if len(grads) == len(targets) else [*targets, torch.empty_like(targets[0])]
        dense.forward(total, grads, layer, None)
        if len(grads) > len(targets):
            targets[0] += total[1]
    else:
        dense.input_grad(targets, grads, layer)


def write_other_grads(op: Op, made: dict[str, Tensor], grads: list[Tensor], inputs: list[Tensor | None]) -> None:
    """Write the gradients of weight, mask, noise and bias that are in ``made``. Those of outputs have equal strides."""
    names = ("weight", "mask", "noise")
    needs = [name in made for name in names]
    if any(needs):
        sources = _images(op, inputs)
        if not _alike(sources):
            sources = [source.contiguous() for source in sources]
        separate = len(grads) == 2 and op.noise is not None and ("noise" in made or "weight" in made)
        neurons = [made[name] for name in ("mask", "noise") if name in made]
        if "weight" not in made and not op.depthwise and all(_is_per_neuron(grad, op.weight) for grad in neurons):
            _write_neurons(op, made, grads, sources, separate)
        else:
            total, perturbed = _weight_grad(op, grads, sources, separate)
            factor_grads = [made[name] for name in names if name in made]
            perturbed = perturbed if separate else total
            write_factor_grads(factor_grads, total, perturbed, op.weight, op.mask, op.noise, needs)
    if "bias" in made:
        sums = [grad.sum((0, 2, 3), dtype=torch.float32) for grad in grads]
        made["bias"].copy_(sum(sums))


def _is_per_neuron(factor_grad: Tensor, weight: Tensor) -> bool:
    return factor_grad.shape == (weight.shape[0], *(1,) * (weight.dim() - 1))


def _write_neurons(op: Op, made: dict[str, Tensor], grads: list[Tensor], sources: list[Tensor], separate: bool) -> None:
    """The gradients of masks and noise of one number per neuron: the gradient of the weight is never in memory."""
    branches = (sources, grads) if op.layer.transposed else (grads, sources)
    total, perturbed = dense.weight_grad(*branches, op.layer, separate, per_neuron=True)
    for name, parts in (("mask", total), ("noise", perturbed if separate else total)):
        if name in made:
            made[name].copy_(parts.sum(0).view(made[name].shape))


def _weight_grad(op, grads, sources, separate) -> tuple[Tensor, Tensor | None]:
    """Parts of the weight's gradient, in its number of dimensions."""
    layer = op.layer
    if op.depthwise:
        found = depthwise.weight_grad(grads, sources, layer.weight.shape, *layer[3:6], separate)
    elif layer.transposed:
        found = dense.weight_grad(sources, grads, layer, separate)
    else:
        found = dense.weight_grad(grads, sources, layer, separate)
    return tuple(parts if parts is None else parts.reshape(parts.shape[0], *op.weight.shape) for parts in found)
