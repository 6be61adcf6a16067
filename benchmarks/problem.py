"""What the contestants of a benchmark of steps work on: one network, one clean set and one state to start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import build, image_size, masked_layers

ALPHA, BETA = 0.9, 0.1
INNER_LR, LR = 10.0, 0.01
STEPS = 15
"""Steps of a phase of AWM: five passes over 500 images in batches of 128, as published."""
GAMMA = 1e-4
"""Weight of AWM's L1 term: not the published 1e-8, which no comparison could see. No time depends on it."""
SECOND_MOMENT = 3e-11
"""Where Adam's second moment begins. From zero, the first step would be the mere sign of the gradient, and a rounding
in a small gradient a full step in the mask; from here, 999 times this being a squared gradient, it is smooth."""
EPSILON = 0.4
"""Bound of ANP's noise."""
ROTATION = 4
"""Different batches that the timed steps go through."""


@dataclass(frozen=True)
class Draws:
    """The random draws of the first step, for the comparison; timed steps draw their own.

    noise:  ANP's, of each mask and of each bias, by the name of the norm, as it is drawn
    moved:  the same after the ascent. Its direction is the gradient's sign, in which a rounding can be a whole step: so
            the signs are compared by themselves, and everybody goes on from here
    weight: NFT's λ
    order:  (B,) with whom NFT blends each image
    """

    noise: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    moved: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    weight: float = 1.0
    order: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """What every contestant is given, and leaves as it is.

    model:   plain, in eval mode, with random weights, and batch norms as after training
    images:  (N, 3, H, W) float32 in [0, 1], as many for the batch as the published 500 for 128; labels (N,)
    indices: (ROTATION, B) batches of them
    masks:   by the name of the layer; of ANP and NFT those of the batch norms
    trigger: (1, 3, H, W), of AWM
    dtype:   of the contestants that have a choice; the published procedure is float32 whatever this says
    as_gpu:  whether what torch or we do otherwise on a GPU is done so: optimisers over lists of tensors, two branches
             as one batch
    """

    net: str
    method: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    indices: Tensor
    masks: dict[str, Tensor]
    trigger: Tensor
    dtype: torch.dtype
    as_gpu: bool
    draws: Draws

    @property
    def device(self) -> torch.device:
        return self.images.device

    def batches(self, memory_format: torch.memory_format) -> list[tuple[Tensor, Tensor]]:
        """The batches, ready made."""
        return [
            (self.images[index].contiguous(memory_format=memory_format), self.labels[index]) for index in self.indices
        ]


def make_problem(
    net: str, batch: int, dtype: torch.dtype, device: torch.device, method: str = "awm", as_gpu: bool | None = None
) -> Problem:
    """The same problem on every device.

    net:    a name that :func:`benchmarks.networks.build` knows
    as_gpu: by default whether the device is one
    errors: ValueError for ANP and NFT on a network without batch norms, which they don't know
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = image_size(net)
        count = max(batch * 125 // 32, batch)
        # coarse, so that images differ in more than noise and 16-bit rounding leaves most predictions alone
        images = F.interpolate(torch.rand(count, 3, 4, 4), size=size, mode="bilinear")
        labels = torch.randint(10, (count,))
        model = build(net)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # its draws can't be compared where a method runs in train mode
        _train_batch_norms(model, images[: 64 if size == 32 else 16])
        masks, draws = _masks_of(net, method, model, batch)
        indices = torch.randint(count, (ROTATION, batch))
        trigger = 0.1 * torch.randn(1, 3, size, size)
    return Problem(
        net,
        method,
        model.to(device).eval(),
        images.to(device),
        labels.to(device),
        indices.to(device),
        {name: mask.detach().to(device) for name, mask in masks.items()},
        trigger.to(device),
        dtype,
        device.type == "cuda" if as_gpu is None else as_gpu,
        Draws(
            *(
                {name: (mask.to(device), bias.to(device)) for name, (mask, bias) in noise.items()}
                for noise in (draws.noise, draws.moved)
            ),
            draws.weight,
            None if draws.order is None else draws.order.to(device),
        ),
    )


def _masks_of(net: str, method: str, model: nn.Module, batch: int) -> tuple[dict[str, Tensor], Draws]:
    if method == "awm":
        layers = masked_layers(net, model)
        return {name: torch.empty_like(layer.weight).uniform_(0.5, 1) for name, layer in layers.items()}, Draws()
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    if not norms:
        raise ValueError(f"{method}: as published it masks batch norms, and {net} has none")
    masks = {name: torch.empty_like(norm.weight).uniform_(0.5, 1) for name, norm in norms.items()}
    if method == "nft":
        masks[next(iter(masks))].fill_(1)  # the first norm's is none
        return masks, Draws(weight=0.7, order=torch.randperm(batch))
    noise, moved = {}, {}
    for name, mask in masks.items():
        drawn = [torch.empty_like(mask, requires_grad=False).uniform_(-EPSILON, EPSILON) for _ in range(2)]
        noise[name] = tuple(drawn)
        moved[name] = tuple(each + EPSILON * (2 * torch.randint(2, each.shape) - 1) for each in drawn)
    return masks, Draws(noise, moved)


@torch.no_grad()
def _train_batch_norms(model: nn.Module, images: Tensor) -> None:
    """Statistics of the images that come by, scales around 1 and shifts around 0, as a trained network has them."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the mean over all batches: here of one
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.1)
    if norms:
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def adam_state(mask: Tensor, step_device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Adam's state for a mask, as torch's and ours name it, where everybody's first step begins."""
    return {
        "step": torch.zeros((), device=step_device),
        "exp_avg": torch.zeros_like(mask, requires_grad=False),
        "exp_avg_sq": torch.full_like(mask, SECOND_MOMENT, requires_grad=False),
    }


def result(trigger: Tensor | None, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a contestant has learned, by name, for the comparison."""
    learned = {**({} if trigger is None else {"trigger": trigger}), **masks}
    return {name: tensor.detach().clone() for name, tensor in learned.items()}


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why timing this dtype on this device would mean nothing, or None."""
    if dtype == torch.float32 or device.type != "cpu":
        return None
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if dtype == torch.bfloat16 and flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return None
    return f"this CPU has no arithmetic of its own in {str(dtype).removeprefix('torch.')}"
