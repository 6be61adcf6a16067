"""What happens once per step over a whole network, its activations, its images or its trigger."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from benchmarks.cases import Case, compiled, copy_of
from benchmarks.measure import Step
from benchmarks.problem import GAMMA, INNER_LR, LR
from maskops.arena import MaskArena
from maskops.functional import (
    effective_weight,
    prepare_images,
    project_onto_l1_ball,
    rescale_to_l1_ball,
    trigger_step_,
)
from maskops.optim import MaskAdam

RADIUS = 100.0
STORED = 4
"""Batches of images in storage."""
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

_ops = torch.ops.maskops
_aten = torch.ops.aten


def mask_cases(net: str, shapes: Sequence[torch.Size], device: torch.device) -> Iterator[Case]:
    """What happens once per mask update, over all convolutions of a network, in float32; masks per weight."""
    weights, masks, grads = _weights(shapes, device)
    count = sum(weight.numel() for weight in weights)

    def plain() -> list[Tensor]:
        return [weight * mask for weight, mask in zip(weights, masks, strict=True)]

    def ours() -> list[Tensor]:
        return [effective_weight(weight, mask) for weight, mask in zip(weights, masks, strict=True)]

    floor = copy_of(device, 6 * count)
    yield Case(net, "effective_weight", lambda: plain, lambda: ours, floor, partial(compiled, plain))
    plain_step = partial(_published_mask_step, weights, masks, grads)
    yield Case(
        net, "mask step", plain_step, partial(_our_mask_step, weights, masks, grads), copy_of(device, 17 * count)
    )


def neuron_mask_cases(net: str, shapes: Sequence[torch.Size], device: torch.device) -> Iterator[Case]:
    """The same with one mask per neuron: one launch of an arena over all layers."""
    weights, masks, grads = _weights(shapes, device)
    masks = [mask[:, :1, :1, :1].contiguous() for mask in masks]
    count = sum(weight.numel() for weight in weights)

    def plain() -> list[Tensor]:
        return [weight * mask for weight, mask in zip(weights, masks, strict=True)]

    def ours() -> Step:
        arena = _arena(weights, masks)

        def step() -> list[Tensor]:
            arena.refresh()
            return list(arena.effective_weights.values())

        return step

    floor = copy_of(device, 4 * count)
    yield Case(net, "effective_weight of neuron masks", lambda: plain, ours, floor, partial(compiled, plain))
    plain_step = partial(_published_mask_step, weights, masks, grads)
    our_step = partial(_our_mask_step, weights, masks, grads)
    yield Case(net, "mask step of neuron masks", plain_step, our_step, copy_of(device, 10 * count))


def _weights(shapes: Sequence[torch.Size], device: torch.device) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, masks per weight and gradients of the effective weights."""
    weights = [torch.randn(shape, device=device) / 10 for shape in shapes]
    weights = [weight.contiguous(memory_format=torch.channels_last) for weight in weights]
    return weights, [torch.rand_like(weight) for weight in weights], [torch.randn_like(weight) for weight in weights]


def _arena(weights: list[Tensor], masks: list[Tensor]) -> MaskArena:
    names = [str(index) for index in range(len(weights))]
    return MaskArena(dict(zip(names, weights, strict=True)), dict(zip(names, masks, strict=True)))


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
    arena = _arena(weights, masks)
    adam = MaskAdam(arena, lr=LR, l1=GAMMA)
    for effective, grad in zip(arena.effective_weights.values(), grads, strict=True):
        effective.grad.copy_(grad)  # for the first step; all later ones find zeros

    def step() -> list[Tensor]:
        adam.step()
        return list(arena.masks.values())

    return step


def relu_cases(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The ReLU that keeps one bit per element."""
    title = "relu " + "x".join(map(str, shape))
    input = _activation(shape, dtype, device)
    grad = torch.randn_like(input)
    output, bits = input.relu(), _ops.relu_bits(input, math.inf)[1]
    size = input.numel() * input.element_size()
    yield Case(
        title,
        "relu_bits forward",
        lambda: lambda: (F.relu(input),),
        lambda: lambda: _ops.relu_bits(input, math.inf)[:1],
        copy_of(device, size),
    )
    yield Case(
        title,
        "relu_bits backward",
        lambda: lambda: (_aten.threshold_backward(grad, output, 0),),
        lambda: lambda: (_ops.relu_bits_backward(grad, bits),),
        copy_of(device, size),
    )


def max_pool_cases(
    title: str, layer: nn.MaxPool2d, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """The max-pool that keeps one byte per window."""
    window = [
        [value, value] if isinstance(value, int) else list(value)
        for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    ]
    input = _activation(shape, dtype, device)
    output, indices = _aten.max_pool2d_with_indices(input, *window, layer.ceil_mode)
    winners = _ops.max_pool_winners(input, *window, layer.ceil_mode)[1]
    grad = torch.randn_like(output)
    moved = (input.numel() + output.numel()) * input.element_size() / 2

    def plain_backward() -> tuple[Tensor]:
        return (_aten.max_pool2d_with_indices_backward(grad, input, *window, layer.ceil_mode, indices),)

    yield Case(
        title,
        "max_pool forward",
        lambda: lambda: (_aten.max_pool2d_with_indices(input, *window, layer.ceil_mode)[0],),
        lambda: lambda: _ops.max_pool_winners(input, *window, layer.ceil_mode)[:1],
        copy_of(device, moved),
    )
    yield Case(
        title,
        "max_pool backward",
        lambda: plain_backward,
        lambda: lambda: (_ops.max_pool_winners_backward(grad, winners, list(shape), *window),),
        copy_of(device, moved),
    )


def _activation(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)


def image_cases(batch: int, size: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """A batch with the trigger from stored bytes, and the gradient of the trigger."""
    title = f"images {batch}x3x{size}x{size}"
    stored = torch.randint(256, (STORED * batch, 3, size, size), dtype=torch.uint8, device=device)
    stored = stored.contiguous(memory_format=torch.channels_last)
    index = torch.randint(len(stored), (batch,), device=device)
    trigger = 0.1 * torch.randn(1, 3, size, size, device=device)
    mean, std = (torch.tensor(values, device=device) for values in (MEAN, STD))
    upstream = torch.randn(batch, 3, size, size, device=device).to(dtype)
    upstream = upstream.contiguous(memory_format=torch.channels_last)
    numel = upstream.numel()

    def plain(trigger: Tensor) -> Tensor:
        images = (stored[index].float() / 255 + trigger).clamp(0, 1)
        return ((images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).to(dtype)

    def ours(trigger: Tensor) -> Tensor:
        return prepare_images(stored, index, trigger, low=0, high=1, mean=mean, std=std, dtype=dtype)

    def gradient(function: Callable[[Tensor], Tensor]) -> Step:
        leaf = trigger.clone().requires_grad_()
        return lambda: torch.autograd.grad(function(leaf), leaf, upstream)

    yield Case(
        title,
        "prepare_images forward",
        lambda: lambda: (plain(trigger),),
        lambda: lambda: (ours(trigger),),
        copy_of(device, numel * (1 + dtype.itemsize) / 2),
    )
    yield Case(
        title,
        "prepare_images forward, trigger gradient",
        partial(gradient, plain),
        partial(gradient, ours),
        copy_of(device, numel * (2 + 2 * dtype.itemsize) / 2),
    )


def trigger_cases(batch: int, size: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """One ascent step of a trigger from the gradients of a batch, rescaled into the L1 ball."""
    start = 0.1 * torch.randn(1, 3, size, size, device=device)
    grad = torch.randn(batch, 3, size, size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    def plain() -> Step:
        trigger = start.clone()

        def step() -> tuple[Tensor]:
            trigger.add_(grad.sum(0, keepdim=True, dtype=torch.float32), alpha=INNER_LR)
            trigger.mul_((RADIUS / trigger.abs().sum()).clamp(max=1))
            return (trigger,)

        return step

    def ours() -> Step:
        trigger = start.clone()
        return lambda: (trigger_step_(trigger, grad, INNER_LR, projection="rescale", radius=RADIUS),)

    moved = copy_of(grad.device, grad.numel() * grad.element_size() / 2)
    yield Case(f"gradients {batch}x3x{size}x{size}", "trigger_step_", plain, ours, moved)


def l1_cases(shape: tuple[int, ...], device: torch.device) -> Iterator[Case]:
    input = torch.randn(shape, device=device)
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

    title = "balls " + "x".join(map(str, shape))
    for op, plain in ((rescale_to_l1_ball, rescale), (project_onto_l1_ball, project)):

        def ours(op=op):
            return (op(input, RADIUS, batch_dims=1),)

        yield Case(
            title,
            op.__name__,
            lambda plain=plain: lambda: (plain(),),
            lambda ours=ours: ours,
            copy_of(device, input.numel() * input.element_size()),
        )
