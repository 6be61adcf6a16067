"""Many masks over one weight: the ops, and the launches of their kernels.

The gradients of the masks are computed mask by mask, by the kernels of a single layer: their products share nothing but
the last step, which reads θ once per mask, a small part of what that step moves. So are depthwise layers, of which θ is
next to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskops.backends._outputs import outputs
from maskops.backends.triton import layers
from maskops.backends.triton._launch import cdiv, run
from maskops.backends.triton._many_kernels import many_forward, many_input_grad
from maskops.backends.triton.blocks import Blocks, blocks, has_wgmma, kind_of_product, occupy, registers
from maskops.backends.triton.dense import start_best
from maskops.backends.triton.layer_views import Layer, Op, convolution_op, in_a_row, linear_op, steps

_MOST_MASKS = 4
"""How many masks share a tile of θ: as many tiles of results are held in registers."""


def many_masked_conv(input, weight, masks, noise, bias, stride, padding, dilation, groups) -> Tensor:
    """``conv(input[j], weight * (masks[j] + noise[j]), bias)`` for every j, or of one input for all j: one launch."""
    (output,) = outputs("many_masked_conv", input, weight, masks, noise, bias, stride, padding, dilation, groups)
    geometry = (stride, padding, dilation, False, [0, 0], groups)
    ops = [convolution_op(weight, *factors, *geometry) for factors in _each(masks, noise)]
    _forward(ops, output, input, masks, noise, bias)
    return output


def many_masked_linear(input, weight, masks, noise, bias) -> Tensor:
    """``linear(input[j], weight * (masks[j] + noise[j]), bias)`` for every j, or of one input for all j: one launch."""
    (output,) = outputs("many_masked_linear", input, weight, masks, noise, bias)
    ops = [linear_op(weight, *factors) for factors in _each(masks, noise)]
    _forward(ops, output, input, masks, noise, bias)
    return output


def many_masked_conv_backward(
    grad, input, weight, masks, noise, input_size, stride, padding, dilation, groups, needs
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order input, weight, masks, noise, bias."""
    arguments = (grad, input, weight, masks, noise, input_size, stride, padding, dilation, groups, needs)
    made = outputs("many_masked_conv_backward", *arguments)
    geometry = (stride, padding, dilation, False, [0, 0], groups)
    ops = [convolution_op(weight, *factors, *geometry) for factors in _each(masks, noise)]
    _backward(ops, made, grad, input, masks, noise, needs)
    return made


def many_masked_linear_backward(grad, input, weight, masks, noise, input_size, needs) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order input, weight, masks, noise, bias."""
    made = outputs("many_masked_linear_backward", grad, input, weight, masks, noise, input_size, needs)
    ops = [linear_op(weight, *factors) for factors in _each(masks, noise)]
    _backward(ops, made, grad, input, masks, noise, needs)
    return made


def _each(masks: Tensor, noise: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Each mask with its noise."""
    return [(masks[j], None if noise is None else noise[j]) for j in range(masks.shape[0])]


def _of(tensor: Tensor, j: int, many: bool) -> Tensor:
    """The tensor of mask j; one tensor for all masks is that of each."""
    return tensor[j] if many else tensor


def _is_own(activation: Tensor, op: Op) -> bool:
    return activation.dim() > op.weight.dim()


def _forward(ops, output, input, masks, noise, bias) -> None:
    own = _is_own(input, ops[0])
    if ops[0].depthwise:
        for j, op in enumerate(ops):
            layers.write_outputs(op, [output[j]], [_of(input, j, own)], bias)
        return
    layer, image = ops[0].layer, ops[0].image
    target, source = image(output[0]), image(_of(input, 0, own))
    images, _, rows, columns = target.shape
    out, channels, r, s = layer.weight.shape
    group_out, pixels = out // layer.groups, images * rows * columns
    block, mask_blocks = _mask_blocks(len(ops))
    kind = kind_of_product(input.dtype, layer.precision)
    apart = _apart(output, input if own else None, masks, noise)

    def start(tile: Blocks) -> None:
        run(
            many_forward,
            (cdiv(group_out, tile.left) * cdiv(pixels, tile.right), layer.groups, mask_blocks),
            *(target, source, layer.weight, layer.mask, layer.noise, in_a_row(bias)),
            *(steps(target), steps(source), *layer.steps(), apart, len(ops)),
            *(images, rows, columns, *source.shape[2:], group_out, channels),
            *(layer.stride, layer.padding, layer.dilation),
            *(r, s, layer.pointwise, layer.flat, layer.per_neuron, not own, layer.precision, block),
            *(tile.left, tile.right, tile.inner),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=_registers(kind, tile, input.device),
        )

    sizes = (group_out, pixels, channels * (r * s if layer.flat else 1))
    entry_bytes = (_entry_bytes(layer, block), input.itemsize * (block if own else 1))
    tile = blocks(sizes, entry_bytes, kind, block, input.device)
    tile = occupy(tile, mask_blocks * out, pixels, input.device)
    if own and layer.per_neuron:  # no factors to hold, but the addresses of as many inputs as there are masks
        tile = tile._replace(right=max(tile.right // 2, 16))
    start_best(start, tile, entry_bytes, ("forward of masks", len(ops), own), [target], [source], layer)


def _backward(ops, made, grad, input, masks, noise, needs) -> None:
    names = ("input", "weight", "masks", "noise", "bias")
    found = dict(zip((name for name, need in zip(names, needs, strict=True) if need), made, strict=True))
    if "input" in found:
        _input_grad(ops, found["input"], grad, masks, noise)
    if any(name in found for name in names[1:4]):
        _factor_grads(ops, found, grad, input)
    if "bias" in found:
        dims = [d for d in range(grad.dim()) if d != 2]
        found["bias"].copy_(grad.sum(dims, dtype=torch.float32))


def _input_grad(ops, grad_input, grad, masks, noise) -> None:
    own = _is_own(grad_input, ops[0])
    if ops[0].depthwise:
        parts = grad_input if own else grad_input.new_empty((len(ops), *grad_input.shape))
        for j, op in enumerate(ops):
            layers.write_input_grads(op, [parts[j]], [grad[j]])
        if not own:
            grad_input.copy_(parts.sum(0, dtype=torch.float32))
        return
    layer, image = ops[0].layer, ops[0].image
    target, source = image(_of(grad_input, 0, own)), image(grad[0])
    images, _, rows, columns = source.shape
    input_rows, input_columns = target.shape[2:]
    out, channels, r, s = layer.weight.shape
    group_out, phases = out // layer.groups, layer.phases
    pixels = images * cdiv(input_rows, layer.stride[0]) * cdiv(input_columns, layer.stride[1])
    block, mask_blocks = _mask_blocks(len(ops))
    mask_programs = mask_blocks if own else 1
    kind = kind_of_product(grad.dtype, layer.precision)
    apart = _apart(grad_input if own else None, grad, masks, noise)

    def start(tile: Blocks) -> None:
        run(
            many_input_grad,
            (cdiv(channels, tile.left) * cdiv(pixels, tile.right), layer.groups, phases * mask_programs),
            *(target, source, layer.weight, layer.mask, layer.noise),
            *(steps(target), steps(source), *layer.steps(), apart, len(ops)),
            *(images, rows, columns, input_rows, input_columns, group_out, channels),
            *(layer.stride, layer.padding, layer.dilation, layer.tap_step),
            *(r, s, layer.pointwise and phases == 1, layer.per_neuron, not own, layer.precision, block),
            *(tile.left, tile.right, tile.inner),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=_registers(kind, tile, grad.device),
        )

    entry_bytes = (_entry_bytes(layer, block), grad.itemsize * block)
    # the sum over all masks is one tile of results
    tile = blocks((channels, pixels, group_out), entry_bytes, kind, block if own else 1, grad.device)
    tile = occupy(tile, mask_programs * layer.groups * channels, phases * pixels, grad.device)
    start_best(start, tile, entry_bytes, ("input gradient of masks", len(ops), own), [target], [source], layer)


def _factor_grads(ops, found, grad, input) -> None:
    """The gradients of weight, masks and noise, mask by mask."""
    own = _is_own(input, ops[0])
    weight = ops[0].weight
    parts = None
    if "weight" in found:
        parts = torch.empty((len(ops), *weight.shape), dtype=torch.float32, device=weight.device)
    for j, op in enumerate(ops):
        made = {name: found[key][j] for key, name in (("masks", "mask"), ("noise", "noise")) if key in found}
        if parts is not None:
            made["weight"] = parts[j]
        layers.write_other_grads(op, made, [op.image(grad[j])], [_of(input, j, own)])
    if parts is not None:
        found["weight"].copy_(parts.sum(0))


def _apart(result: Tensor | None, activation: Tensor | None, masks: Tensor, noise: Tensor | None) -> tuple[int, ...]:
    """How far apart in memory the tensors of neighbouring masks are; 0 for one tensor for all masks."""
    return tuple(
        0 if tensor is None or len(tensor) == 1 else tensor.stride(0) for tensor in (result, activation, masks, noise)
    )


def _mask_blocks(count: int) -> tuple[int, int]:
    """How many masks a program serves, and how many blocks of so many there are."""
    mask_blocks = cdiv(count, _MOST_MASKS)
    return cdiv(count, mask_blocks), mask_blocks


def _registers(kind: str, tile: Blocks, device: torch.device) -> int | None:
    """All registers where the factors of several masks leave shared memory for one program alone."""
    return registers(1 if kind == "half" and not has_wgmma(device) else None, tile.warps)


def _entry_bytes(layer: Layer, block: int) -> int:
    """What is loaded for each weight: the weight, and what of the factors of a block of masks isn't per neuron."""
    factors = [] if layer.per_neuron else [factor for factor in (layer.mask, layer.noise) if factor is not None]
    return layer.weight.itemsize + block * sum(factor.itemsize for factor in factors)
