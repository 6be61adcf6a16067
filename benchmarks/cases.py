"""The public functions, each on the shapes of real networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from benchmarks.measure import Step
from benchmarks.problem import GAMMA, LR
from maskops.arena import MaskArena
from maskops.functional import (
    dual_masked_conv2d,
    effective_weight,
    masked_conv2d,
    masked_linear,
    project_onto_l1_ball,
    rescale_to_l1_ball,
)
from maskops.models import build
from maskops.optim import MaskAdam

RADIUS = 100.0

Function = Callable[..., Any]
Make = Callable[[], Step]
"""Makes a step, with a state of its own where it has one. A step returns the tensors that are compared."""


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    plain:    what anyone would write; its results are right
    ours:     the public function
    floor:    what nobody can avoid; its results are others
    compiled: ``torch.compile`` of plain, where that makes sense
    """

    shape: str
    phase: str
    plain: Make
    ours: Make
    floor: Make
    compiled: Make | None = None


def cases(nets: Sequence[str], batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every op on every different layer of the networks, the ops on whole networks, and the L1 balls."""
    layers = {}
    for net in nets:
        layers |= {_title(layer, shape): (layer, shape) for layer, shape in layers_of(net, batch)}
    for title, (layer, shape) in layers.items():
        make = _conv_cases if isinstance(layer, nn.Conv2d) else _linear_cases
        yield from make(title, layer, shape, dtype, device)
    for net in nets:
        weights = [layer.weight.shape for layer, _ in layers_of(net, batch) if isinstance(layer, nn.Conv2d)]
        yield from _network_cases(net, [torch.randn(shape, device=device) / 10 for shape in weights])
    for shape in ((1, 3, 32, 32), (batch, 3, 32, 32), (1, 3, 224, 224)):
        yield from _l1_cases(torch.randn(shape, device=device))


def layers_of(net: str, batch: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """The convolutions and linear layers of a network, each with the shape of its input."""
    found = []
    with torch.device("meta"):
        model, images = build(net), torch.empty(batch, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda layer, inputs, output: found.append((layer, tuple(inputs[0].shape))))
    model.eval()(images)
    return found


def _title(layer: nn.Module, shape: tuple[int, ...]) -> str:
    times = "x".join(map(str, shape))
    if isinstance(layer, nn.Linear):
        return f"linear {times} to {layer.out_features}"
    stride = f" stride {layer.stride[0]}" if layer.stride[0] > 1 else ""
    return f"conv {times} to {layer.out_channels}, {layer.kernel_size[0]}x{layer.kernel_size[1]}{stride}"


def _conv_cases(title, layer, shape, dtype, device) -> Iterator[Case]:
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    inputs = _layer_inputs(shape, layer.weight.shape, dtype, device)
    dual = {**inputs, "noise": torch.randn_like(inputs["mask"]) / 10}
    floor = {"input": inputs["input"], "mask": (inputs["weight"] * inputs["mask"]).to(dtype)}

    def plain(input, weight, mask):
        return F.conv2d(input, (weight * mask).to(input.dtype), None, *geometry)

    def ours(input, weight, mask):
        return masked_conv2d(input, weight, mask, None, *geometry)

    def unmasked(input, mask):
        return F.conv2d(input, mask, None, *geometry)

    def plain_dual(input, weight, mask, noise):
        return plain(input, weight, mask), plain(input, weight, mask + noise)

    def our_dual(input, weight, mask, noise):
        return dual_masked_conv2d(input, weight, mask, None, *geometry, noise=noise)

    def unmasked_twice(input, mask):
        return unmasked(input, mask), unmasked(input, mask)

    for wanted in (None, "input", "mask"):
        yield _case(title, "masked_conv2d", wanted, (plain, ours, unmasked), inputs, floor)
    for wanted in (None, "mask"):
        yield _case(title, "dual_masked_conv2d", wanted, (plain_dual, our_dual, unmasked_twice), dual, floor)


def _linear_cases(title, layer, shape, dtype, device) -> Iterator[Case]:
    inputs = _layer_inputs(shape, layer.weight.shape, dtype, device)

    def plain(input, weight, mask):
        return F.linear(input, (weight * mask).to(input.dtype))

    def unmasked(input, mask):
        return F.linear(input, mask)

    floor = {"input": inputs["input"], "mask": (inputs["weight"] * inputs["mask"]).to(dtype)}
    for wanted in (None, "input", "mask"):
        yield _case(title, "masked_linear", wanted, (plain, masked_linear, unmasked), inputs, floor)


def _layer_inputs(shape, weight_shape, dtype, device) -> dict[str, Tensor]:
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    inputs = {
        "input": torch.randn(shape, device=device, dtype=dtype),
        "weight": torch.randn(weight_shape, device=device) / 10,
        "mask": torch.rand(weight_shape, device=device),
    }
    return {name: tensor.contiguous(memory_format=memory_format) for name, tensor in inputs.items()}


def _case(title: str, op: str, wanted: str | None, functions: tuple[Function, ...], inputs, floor_inputs) -> Case:
    """A layer's forward, or its forward and the gradient of one of its inputs."""
    plain, ours, floor = functions
    with torch.no_grad():
        upstream = [torch.randn_like(output) for output in _as_tuple(plain(**inputs))]
    make = partial(_layer_step, wanted=wanted, upstream=upstream)
    return Case(
        title,
        f"{op} forward" if wanted is None else f"{op} forward, {wanted} gradient",
        partial(make, plain, inputs),
        partial(make, ours, inputs),
        partial(make, floor, floor_inputs),
        lambda: make(_compiled(plain), inputs),
    )


def _layer_step(function: Function, inputs: dict[str, Tensor], wanted: str | None, upstream: list[Tensor]) -> Step:
    inputs = {name: tensor.detach().requires_grad_(name == wanted) for name, tensor in inputs.items()}

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return _as_tuple(function(**inputs))

    def forward_and_gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(_as_tuple(function(**inputs)), inputs[wanted], upstream)

    return forward if wanted is None else forward_and_gradient


def _compiled(function: Function) -> Function:
    torch.compiler.reset()  # the limit of recompilations is per function, and this one has been made for other shapes
    return torch.compile(function, dynamic=False, fullgraph=True)


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _network_cases(net: str, weights: list[Tensor]) -> Iterator[Case]:
    """What happens once per mask update, over all convolutions of a network, in float32."""
    weights = [weight.contiguous(memory_format=torch.channels_last) for weight in weights]
    masks, grads = [torch.rand_like(weight) for weight in weights], [torch.randn_like(weight) for weight in weights]
    count = sum(weight.numel() for weight in weights)

    def plain() -> list[Tensor]:
        return [weight * mask for weight, mask in zip(weights, masks, strict=True)]

    def ours() -> list[Tensor]:
        return [effective_weight(weight, mask) for weight, mask in zip(weights, masks, strict=True)]

    yield Case(
        net,
        "effective_weight",
        lambda: plain,
        lambda: ours,
        _copy(weights[0].device, 6 * count),
        partial(_compiled, plain),
    )
    yield Case(
        net,
        "mask step",
        partial(_published_mask_step, weights, masks, grads),
        partial(_our_mask_step, weights, masks, grads),
        _copy(weights[0].device, 17 * count),
    )


def _published_mask_step(weights: list[Tensor], masks: list[Tensor], grads: list[Tensor]) -> Step:
    """From the gradients of the effective weights to new masks: products, L1 term, Adam, clamp, tensor by tensor."""
    masks = [Parameter(mask.clone()) for mask in masks]
    adam = torch.optim.Adam(masks, lr=LR)

    def step() -> list[Tensor]:
        adam.zero_grad()
        effective = [weight * mask for weight, mask in zip(weights, masks, strict=True)]
        l1 = GAMMA * sum(mask.abs().sum() for mask in masks)
        torch.autograd.backward([*effective, l1], [*grads, None])
        adam.step()
        with torch.no_grad():
            for mask in masks:
                mask.clamp_(0, 1)
        return masks

    return step


def _our_mask_step(weights: list[Tensor], masks: list[Tensor], grads: list[Tensor]) -> Step:
    names = [str(index) for index in range(len(weights))]
    arena = MaskArena(dict(zip(names, weights, strict=True)), dict(zip(names, masks, strict=True)))
    adam = MaskAdam(arena, lr=LR, l1=GAMMA)
    for name, grad in zip(names, grads, strict=True):
        arena.effective_weights[name].grad.copy_(grad)  # for the first step; all later ones find zeros

    def step() -> list[Tensor]:
        adam.step()
        return list(arena.masks.values())

    return step


def _l1_cases(input: Tensor) -> Iterator[Case]:
    rows = input.flatten(1)

    def rescale() -> Tensor:
        return (rows * (RADIUS / rows.abs().sum(1, keepdim=True)).clamp(max=1)).view(input.shape)

    def project() -> Tensor:
        """Duchi et al. 2008, Figure 1."""
        size = rows.abs()
        descending = size.sort(dim=1, descending=True).values
        thresholds = (descending.cumsum(1) - RADIUS) / torch.arange(1, rows.shape[1] + 1, device=rows.device)
        last = (descending > thresholds).sum(1, keepdim=True) - 1
        return (rows.sign() * (size - thresholds.gather(1, last).clamp(min=0)).clamp(min=0)).view(input.shape)

    title = "balls " + "x".join(map(str, input.shape))
    for op, plain in ((rescale_to_l1_ball, rescale), (project_onto_l1_ball, project)):

        def ours(op=op):
            return (op(input, RADIUS, batch_dims=1),)

        yield Case(
            title,
            op.__name__,
            lambda plain=plain: lambda: (plain(),),
            lambda ours=ours: ours,
            _copy(input.device, input.numel() * input.element_size()),
        )


def _copy(device: torch.device, size: int) -> Make:
    """A copy of so many bytes: as many read as written."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: lambda: target.copy_(source)
