"""Launches of the matrix-product kernels: a masked layer as a two-dimensional convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from maskops.backends.triton import tuning
from maskops.backends.triton._launch import cdiv, run
from maskops.backends.triton.blocks import (
    Blocks,
    blocks,
    has_wgmma,
    kind_of_product,
    occupy,
    processors,
    registers,
    variants,
)
from maskops.backends.triton.convolution import conv_forward, conv_input_grad, conv_weight_grad
from maskops.backends.triton.layer_views import Layer, are_wide, in_a_row, steps
from maskops.backends.triton.sign_bits import NOTHING, Finish

Result = TypeVar("Result")

_WORKSPACE = 1 << 26
"""Bytes that all parts of one weight gradient may take, unless one part alone takes more."""


class Epilogue(NamedTuple):
    """What happens to a tile of outputs before it is written: ``relu(scale * output + shift + residual)``, one branch.

    bits:  where the ReLU's bits go, in whole bytes of neighbouring channels; None: nowhere
    upper: of the ReLU; None: nothing
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    bits: Tensor | None = None
    relu: bool = False
    upper: float | None = None


_PLAIN = Epilogue()


def forward(
    outputs: list[Tensor], inputs: list[Tensor], layer: Layer, bias: Tensor | None, epilogue: Epilogue = _PLAIN
) -> None:
    """Write the outputs: of one input with noise, or of two, the first without noise and the second with it."""
    images, _, rows, columns = outputs[0].shape
    out, channels, r, s = layer.weight.shape
    group_out, pixels = out // layer.groups, images * rows * columns
    two = len(outputs) == 2
    bias, scale, shift = (in_a_row(vector) for vector in (bias, epilogue.scale, epilogue.shift))
    device, kind = inputs[0].device, kind_of_product(inputs[0].dtype, layer.precision)
    scattered = layer.flat or not are_wide(inputs[0], layer.weight)
    programs = 1 if kind == "tf32" and not has_wgmma(device) else None

    def start(tile: Blocks) -> None:
        run(
            conv_forward,
            (cdiv(group_out, tile.left) * cdiv(pixels, tile.right), layer.groups),
            *(outputs[0], outputs[-1], inputs[0], inputs[-1]),
            *(layer.weight, layer.mask, layer.noise, bias, scale, shift, epilogue.residual, epilogue.bits),
            epilogue.upper,
            *(steps(outputs[0]), steps(inputs[0]), *layer.steps()),
            *(images, rows, columns, *inputs[0].shape[2:], group_out, channels),
            *(layer.stride, layer.padding, layer.dilation),
            *(r, s, layer.pointwise, layer.flat, layer.per_neuron, two, inputs[0] is inputs[-1]),
            *(epilogue.relu, layer.precision, tile.left, tile.right, tile.inner),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=registers(programs, tile.warps),
        )

    sizes = (group_out, pixels, channels * (r * s if layer.flat else 1))
    entry_bytes = (layer.entry_bytes, inputs[0].element_size() * (1 if inputs[0] is inputs[-1] else 2))
    tile = blocks(sizes, entry_bytes, kind, len(outputs), device, scattered)
    what = ("forward", *(part is None for part in epilogue[:4]), epilogue.upper is None)
    start_best(start, occupy(tile, out, pixels, device), entry_bytes, what, outputs, inputs, layer)


def input_grad(
    grad_inputs: list[Tensor],
    grads: list[Tensor],
    layer: Layer,
    bias: Tensor | None = None,
    finish: Finish = NOTHING,
) -> None:
    """Write the gradient of each input; of two gradients and one input the sum. With a bias: a transposed layer."""
    images, _, rows, columns = grads[0].shape
    input_rows, input_columns = grad_inputs[0].shape[2:]
    out, channels, r, s = layer.weight.shape
    group_out = out // layer.groups
    bias = in_a_row(bias)
    phases = layer.phases
    pixels = images * cdiv(input_rows, layer.stride[0]) * cdiv(input_columns, layer.stride[1])
    device, kind = grads[0].device, kind_of_product(grads[0].dtype, layer.precision)
    few_registers = len(grads) == 1 and layer.mask is not None and (layer.per_neuron or phases > 1)
    many_registers = kind == "tf32" and not has_wgmma(device)
    has_bits = finish.gate is not None and finish.gate.dtype == torch.uint8
    packed = has_bits and channels % 8 == 0 and grad_inputs[0].is_contiguous(memory_format=torch.channels_last)

    def start(tile: Blocks) -> None:
        programs = None
        if few_registers and tile.warps == 8:
            programs = 2
        elif many_registers or has_bits > packed:
            programs = 1
        elif layer.mask is None and kind == "ieee" and not has_wgmma(device):
            programs = 3
        run(
            conv_input_grad,
            (cdiv(channels, tile.left) * cdiv(pixels, tile.right), layer.groups, phases),
            *(grad_inputs[0], grad_inputs[-1], grads[0], grads[-1], layer.weight, layer.mask, layer.noise, bias),
            *finish[:3],
            *(steps(grad_inputs[0]), steps(grads[0]), *layer.steps()),
            *(images, rows, columns, input_rows, input_columns, group_out, channels),
            *(layer.stride, layer.padding, layer.dilation, layer.tap_step),
            *(r, s, layer.pointwise and phases == 1, layer.per_neuron, len(grads) == 2, len(grad_inputs) == 1),
            *(packed, layer.precision, tile.left, tile.right, tile.inner),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=registers(programs, tile.warps),
        )

    entry_bytes = (layer.entry_bytes, grads[0].element_size() * len(grads))
    scattered = phases > 1 or has_bits > packed or not are_wide(grads[0], layer.weight)
    tile = blocks((channels, pixels, group_out), entry_bytes, kind, len(grads), device, scattered)
    tile = occupy(tile, layer.groups * channels, phases * pixels, device)
    what = ("input gradient", finish.addend is None, finish.gate is None, has_bits, finish.upper is None)
    start_best(start, tile, entry_bytes, what, grad_inputs, grads, layer)


def weight_grad(
    grads: list[Tensor], inputs: list[Tensor], layer: Layer, separate: bool, per_neuron: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Parts (parts, O, C / groups, R, S) in float32 whose sums are the gradient of the effective weight.

    The first are those of the total over the branches; ``separate``: the second are those of the second branch alone.
    per_neuron: parts (parts, O) instead, whose sums are the gradient of one mask per neuron
    """
    images, _, rows, columns = grads[0].shape
    out, channels, r, s = layer.weight.shape
    group_out, pixels = out // layer.groups, images * rows * columns
    taps, width = (1, channels * r * s) if layer.flat else (r * s, channels)
    device, kind = grads[0].device, kind_of_product(grads[0].dtype, layer.precision)
    scattered = layer.flat or layer.stride != (1, 1) or not are_wide(grads[0], inputs[0])
    programs = None  # else as many as 99 KiB of shared memory have room for
    if not has_wgmma(device) and separate and kind == "half":
        programs = 3
    elif not has_wgmma(device) and len(grads) == 1 and kind == "ieee" and not scattered:
        programs = 5

    def start(tile: Blocks) -> tuple[Tensor, Tensor | None]:
        tiles = cdiv(group_out, tile.left) * taps * cdiv(width, tile.right)
        part_pixels = _part_pixels(pixels, tiles * layer.groups, tile.inner, layer.weight.numel(), device)
        parts = max(1, cdiv(pixels, part_pixels))
        shape = (parts * tiles // cdiv(group_out, tile.left), out) if per_neuron else (parts, out, r, s, channels)
        total = torch.empty(shape, dtype=torch.float32, device=device)
        perturbed = torch.empty_like(total) if separate else None
        run(
            conv_weight_grad,
            (tiles, layer.groups, parts),
            *(total, perturbed, grads[0], grads[-1], inputs[0], inputs[-1], layer.weight),
            *(steps(grads[0]), steps(inputs[0]), steps(layer.weight)),
            *(images, rows, columns, *inputs[0].shape[2:], group_out, channels),
            *(layer.stride, layer.padding, layer.dilation, part_pixels, layer.weight.numel()),
            *(r, s, layer.pointwise, layer.flat, len(grads) == 2, inputs[0] is inputs[-1]),
            *(separate, per_neuron, layer.precision, tile.left, tile.right, tile.inner),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=registers(programs, tile.warps) if tile.warps == 4 else None,
        )
        return total, perturbed

    entry_bytes = (2 * grads[0].element_size() * len(grads), inputs[0].element_size() * len(inputs))
    tile = blocks((group_out, width, pixels), entry_bytes, kind, 2 if separate else 1, device, scattered)
    what = ("weight gradient", separate, per_neuron)
    found = start_best(start, tile, entry_bytes, what, grads, inputs, layer)
    if per_neuron:
        return found
    return tuple(None if parts is None else parts.permute(0, 1, 4, 2, 3) for parts in found)


def _part_pixels(pixels: int, tiles: int, block: int, weights: int, device: torch.device) -> int:
    """How many pixels a part sums over: so many that all parts together occupy the device twice, and fit in memory."""
    most = min(cdiv(pixels, 4 * block), _WORKSPACE // max(4 * weights, 1))
    parts = max(1, min(most, cdiv(2 * processors(device), max(tiles, 1))))
    return max(1, cdiv(cdiv(pixels, parts), block)) * block


def start_best(
    start: Callable[[Blocks], Result],
    tile: Blocks,
    entry_bytes: tuple[int, int],
    what: tuple[str | bool | int, ...],
    results: list[Tensor],
    activations: list[Tensor],
    layer: Layer,
) -> Result:
    """Start with the tile, or with one that was measured to be faster for this computation on these shapes.

    what: says what is computed, beside the shapes and dtypes
    """
    device = results[0].device
    if not tuning.is_used(device):
        return start(tile)
    described = ((*_described(t[0]), len(t), t[0] is t[-1]) for t in (results, activations))
    key = (*what, *described, *map(_described, layer[:3]), *layer[3:], layer.per_neuron)
    return start(tuning.best(key, variants(tile, entry_bytes, device), start, device))


def _described(tensor: Tensor | None) -> tuple | None:
    return None if tensor is None else (tensor.dtype, tuple(tensor.shape), are_wide(tensor))
