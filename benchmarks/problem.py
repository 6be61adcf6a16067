"""What the contestants of the AWM benchmark work on: one network, one clean set and one state to start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskops.models import build

ALPHA, BETA = 0.9, 0.1
INNER_LR, LR = 10.0, 0.01
STEPS = 15
"""Steps of a phase: five passes over 500 images in batches of 128, as published."""
GAMMA = 1e-4
"""Weight of the L1 term: not the published 1e-8, which no comparison could see. No time depends on it."""
SECOND_MOMENT = 3e-11
"""Where Adam's second moment begins. From zero, the first step would be the mere sign of the gradient, and a rounding
in a small gradient a full step in the mask; from here, 999 times this being a squared gradient, it is smooth."""
ROTATION = 4
"""Different batches that the timed steps go through."""


@dataclass(frozen=True)
class Problem:
    """What every contestant is given, and leaves as it is.

    model:   plain, in eval mode, with random weights, and batch norms as after training
    images:  (N, 3, H, W) float32 in [0, 1], as many for the batch as the published 500 for 128; labels (N,)
    indices: (ROTATION, B) batches of them
    masks:   by the name of the layer
    trigger: (1, 3, H, W)
    dtype:   of the contestants that have a choice; the published procedure is float32 whatever this says
    """

    net: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    indices: Tensor
    masks: dict[str, Tensor]
    trigger: Tensor
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.images.device

    def batches(self, memory_format: torch.memory_format) -> list[tuple[Tensor, Tensor]]:
        """The batches, ready made."""
        return [
            (self.images[index].contiguous(memory_format=memory_format), self.labels[index]) for index in self.indices
        ]


def make_problem(net: str, batch: int, dtype: torch.dtype, device: torch.device, size: int = 32) -> Problem:
    """The same problem on every device; ``net`` is a name that :func:`maskops.models.build` knows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        count = max(batch * 125 // 32, batch)
        # coarse, so that images differ in more than noise and 16-bit rounding leaves most predictions alone
        images = F.interpolate(torch.rand(count, 3, 4, 4), size=size, mode="bilinear")
        labels = torch.randint(10, (count,))
        model = build(net)
        _train_batch_norms(model, images[:64])
        convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        masks = {name: torch.empty_like(layer.weight).uniform_(0.5, 1) for name, layer in convolutions.items()}
        indices = torch.randint(count, (ROTATION, batch))
        trigger = 0.1 * torch.randn(1, 3, size, size)
    return Problem(
        net,
        model.to(device).eval(),
        images.to(device),
        labels.to(device),
        indices.to(device),
        {name: mask.detach().to(device) for name, mask in masks.items()},
        trigger.to(device),
        dtype,
    )


@torch.no_grad()
def _train_batch_norms(model: nn.Module, images: Tensor) -> None:
    """Statistics of the images that come by, scales around 1 and shifts around 0, as a trained network has them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches: here of one
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
    model.train()(images)


def adam_state(mask: Tensor, step_device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Adam's state for a mask, as torch's and ours name it, where everybody's first step begins."""
    return {
        "step": torch.zeros((), device=step_device),
        "exp_avg": torch.zeros_like(mask, requires_grad=False),
        "exp_avg_sq": torch.full_like(mask, SECOND_MOMENT, requires_grad=False),
    }


def result(trigger: Tensor, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a contestant has learned, by name, for the comparison."""
    return {name: tensor.detach().clone() for name, tensor in {"trigger": trigger, **masks}.items()}


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why timing this dtype on this device would mean nothing, or None."""
    if dtype == torch.float32 or device.type != "cpu":
        return None
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if dtype == torch.bfloat16 and flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return None
    return f"this CPU has no arithmetic of its own in {str(dtype).removeprefix('torch.')}"
