"""The masked layers, each on the shapes of real networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Step
from maskops.functional import (
    dual_masked_conv2d,
    many_masked_conv2d,
    masked_conv2d,
    masked_conv2d_relu,
    masked_linear,
)

MASKS = 4
"""How many masks share a weight in many_masked_conv2d."""

Function = Callable[..., Any]
Make = Callable[[], Step]
"""Makes a step, with a state of its own where it has one. A step returns the tensors that are compared."""


class Unmasked(NamedTuple):
    """A layer whose mask is a single number, which a kernel need not load for every weight."""

    plain: Make
    ours: Make


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    plain:    what anyone would write; its results are right
    ours:     the public function
    floor:    what nobody can avoid; its results are others
    compiled: ``torch.compile`` of plain, where that makes sense
    ways:     whether a backend may compute it fused or materialised
    unmasked: the same with a mask of one number, where that is the same computation
    """

    shape: str
    phase: str
    plain: Make
    ours: Make
    floor: Make
    compiled: Make | None = None
    ways: bool = False
    unmasked: Unmasked | None = None


def layer_title(layer: nn.Module, shape: tuple[int, ...]) -> str:
    times = "x".join(map(str, shape))
    if isinstance(layer, nn.Linear):
        return f"linear {times} to {layer.out_features}"
    if isinstance(layer, nn.MaxPool2d):
        return f"max-pool {times}, {layer.kernel_size}x{layer.kernel_size} stride {layer.stride}"
    stride = f" stride {layer.stride[0]}" if layer.stride[0] > 1 else ""
    groups = f", {layer.groups} groups" if layer.groups > 1 else ""
    return f"conv {times} to {layer.out_channels}, {layer.kernel_size[0]}x{layer.kernel_size[1]}{stride}{groups}"


def conv_cases(title, layer, shape, dtype, device) -> Iterator[Case]:
    geometry = _geometry(layer)
    inputs = _layer_inputs(shape, layer.weight.shape, dtype, device)

    def plain(input, weight, mask):
        return F.conv2d(input, (weight * mask).to(input.dtype), None, *geometry)

    def ours(input, weight, mask):
        return masked_conv2d(input, weight, mask, None, *geometry)

    functions = plain, ours, partial(_unmasked_conv, geometry=geometry)
    for wanted in (None, "input", "mask"):
        yield _case(title, "masked_conv2d", wanted, functions, inputs, _floor_inputs(inputs, dtype))


def dual_conv_cases(title, layer, shape, dtype, device) -> Iterator[Case]:
    geometry = _geometry(layer)
    inputs = _layer_inputs(shape, layer.weight.shape, dtype, device)
    dual = {**inputs, "noise": torch.randn_like(inputs["mask"]) / 10}

    def plain(input, weight, mask, noise):
        factors = mask, mask + noise
        return tuple(F.conv2d(input, (weight * factor).to(input.dtype), None, *geometry) for factor in factors)

    def ours(input, weight, mask, noise):
        return dual_masked_conv2d(input, weight, mask, None, *geometry, noise=noise)

    def unmasked_twice(input, mask):
        return _unmasked_conv(input, mask, geometry), _unmasked_conv(input, mask, geometry)

    for wanted in (None, "mask"):
        functions = plain, ours, unmasked_twice
        yield _case(title, "dual_masked_conv2d", wanted, functions, dual, _floor_inputs(inputs, dtype))


def conv_relu_cases(title, layer, shape, dtype, device) -> Iterator[Case]:
    """A residual block's end: convolution, frozen batch norm, residual and ReLU."""
    geometry = _geometry(layer)
    inputs = _layer_inputs(shape, layer.weight.shape, dtype, device)
    floor_inputs = _floor_inputs(inputs, dtype)
    convolved = _unmasked_conv(**floor_inputs, geometry=geometry).float()
    var, mean = torch.var_mean(convolved, (0, 2, 3))
    gamma, beta = torch.empty_like(var).uniform_(0.5, 1), 0.1 * torch.randn_like(var)
    scale = gamma * (var + 1e-5).rsqrt()
    shift = beta - mean * scale
    # far from 0 on either side, so that no rounding turns a ReLU over
    inputs["residual"] = (8 * torch.randn_like(convolved).sign()).to(dtype)

    def plain(input, weight, mask, residual):
        output = F.conv2d(input, (weight * mask).to(input.dtype), None, *geometry)
        return F.relu(F.batch_norm(output, mean, var, gamma, beta) + residual)

    def ours(input, weight, mask, residual):
        factors = {"scale": scale, "shift": shift, "residual": residual}
        return masked_conv2d_relu(input, weight, mask, None, *geometry, **factors)

    functions = plain, ours, partial(_unmasked_conv, geometry=geometry)
    for wanted in (None, "input"):
        yield _case(title, "masked_conv2d_relu", wanted, functions, inputs, floor_inputs, one_kernel=False)


def many_conv_cases(title, layer, shape, dtype, device) -> Iterator[Case]:
    """Several masks over one weight, each with images of its own, against one layer after the other."""
    if layer.groups > 1:
        return
    geometry = _geometry(layer)
    inputs = _layer_inputs((MASKS * shape[0], *shape[1:]), layer.weight.shape, dtype, device)
    input, weight = inputs["input"].unflatten(0, (MASKS, shape[0])), inputs["weight"]
    masks = torch.stack([torch.rand_like(weight) for _ in range(MASKS)])
    ready = [(weight * mask).to(dtype) for mask in masks]

    def plain(masks):
        return [F.conv2d(input[j], (weight * masks[j]).to(dtype), None, *geometry) for j in range(MASKS)]

    def floor(weights):
        return [F.conv2d(input[j], weights[j], None, *geometry) for j in range(MASKS)]

    def ours(masks):
        return many_masked_conv2d(input, weight, masks, None, *geometry)

    with torch.no_grad():
        upstream = [torch.randn_like(output) for output in plain(masks)]
    together = torch.stack(upstream)

    def forward(function, factors):
        def step():
            with torch.no_grad():
                return tuple(function(factors))

        return step

    def one_by_one(function, factors):
        leaves = [factor.clone().requires_grad_() for factor in factors]
        return lambda: torch.autograd.grad(function(leaves), leaves, upstream)

    def at_once():
        leaf = masks.clone().requires_grad_()
        return lambda: torch.autograd.grad(ours(leaf), leaf, together)[0].unbind(0)

    title = f"{MASKS} masks, {title}"
    steps = partial(forward, plain, masks), partial(forward, ours, masks), partial(forward, floor, ready)
    yield Case(title, "many_masked_conv2d forward", *steps)
    steps = partial(one_by_one, plain, masks), at_once, partial(one_by_one, floor, ready)
    yield Case(title, "many_masked_conv2d forward, mask gradient", *steps)


def linear_cases(title, layer, shape, dtype, device) -> Iterator[Case]:
    inputs = _layer_inputs(shape, layer.weight.shape, dtype, device)

    def plain(input, weight, mask):
        return F.linear(input, (weight * mask).to(input.dtype))

    def unmasked(input, mask):
        return F.linear(input, mask)

    functions = plain, masked_linear, unmasked
    for wanted in (None, "input", "mask"):
        yield _case(title, "masked_linear", wanted, functions, inputs, _floor_inputs(inputs, dtype))


def _geometry(layer: nn.Conv2d) -> tuple[Any, ...]:
    return layer.stride, layer.padding, layer.dilation, layer.groups


def _unmasked_conv(input: Tensor, mask: Tensor, geometry: tuple[Any, ...]) -> Tensor:
    return F.conv2d(input, mask, None, *geometry)


def _layer_inputs(shape, weight_shape, dtype, device) -> dict[str, Tensor]:
    memory_format = torch.channels_last if len(weight_shape) == 4 else torch.contiguous_format
    inputs = {
        "input": torch.randn(shape, device=device, dtype=dtype),
        "weight": torch.randn(weight_shape, device=device) / 10,
        "mask": torch.rand(weight_shape, device=device),
    }
    return {name: tensor.contiguous(memory_format=memory_format) for name, tensor in inputs.items()}


def _floor_inputs(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {"input": inputs["input"], "mask": (inputs["weight"] * inputs["mask"]).to(dtype)}


def _case(
    title: str, op: str, wanted: str | None, functions: tuple[Function, ...], inputs, floor_inputs, one_kernel=True
) -> Case:
    """A layer's forward, or its forward and the gradient of one of its inputs.

    one_kernel: whether the op is one masked layer, of which there are two ways and a price of the mask
    """
    plain, ours, floor = functions
    with torch.no_grad():
        upstream = [torch.randn_like(output) for output in _as_tuple(plain(**inputs))]
    make = partial(_layer_step, wanted=wanted, upstream=upstream)
    unmasked = None
    if one_kernel and wanted != "mask":
        numbers = {
            name: torch.full((1,) * inputs["weight"].dim(), value, device=inputs["weight"].device)
            for name, value in (("mask", 0.5), ("noise", 0.1))
            if name in inputs
        }
        unmasked = Unmasked(partial(make, plain, {**inputs, **numbers}), partial(make, ours, {**inputs, **numbers}))
    return Case(
        title,
        f"{op} forward" if wanted is None else f"{op} forward, {wanted} gradient",
        partial(make, plain, inputs),
        partial(make, ours, inputs),
        partial(make, floor, floor_inputs),
        lambda: make(compiled(plain), inputs),
        one_kernel,
        unmasked,
    )


def _layer_step(function: Function, inputs: dict[str, Tensor], wanted: str | None, upstream: list[Tensor]) -> Step:
    inputs = {name: tensor.detach().requires_grad_(name == wanted) for name, tensor in inputs.items()}

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return _as_tuple(function(**inputs))

    def forward_and_gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(_as_tuple(function(**inputs)), inputs[wanted], upstream)

    return forward if wanted is None else forward_and_gradient


def compiled(function: Function) -> Function:
    torch.compiler.reset()  # the limit of recompilations is per function, and this one has been made for other shapes
    return torch.compile(function, dynamic=False, fullgraph=True)


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def copy_of(device: torch.device, size: float) -> Make:
    """A copy of so many bytes: as many read as written."""
    source = torch.empty(int(size), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: lambda: target.copy_(source)
