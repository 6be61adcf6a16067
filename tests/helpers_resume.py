"""A small purification that another process can run, be killed in and go on with."""

from __future__ import annotations

import torch
from torch import nn

from maskops.purify.methods import METHODS

STEPS = {"inner_steps": 2, "outer_steps": 2}
RUNS = {
    "awm": (
        "awm",
        {"epochs": 4, "inner_steps": 2, "outer_steps": 2, "lr_decay_epochs": 2, "inner_labels": "predicted"},
    ),
    "awm augmented": ("awm", {**STEPS, "epochs": 3, "crop": 1, "flip": True}),
    "swm": ("swm", {"epochs": 4, "steps": 2, "lr_decay_epochs": 2}),
    "anp": ("anp", {"epochs": 4, "steps": 2, "threshold": "auto"}),
    "nft": ("nft", {"epochs": 4, "steps": 2, "tune_bias": True, "cosine_to": 0.01}),
    "nft cutmix": ("nft", {"epochs": 4, "steps": 2, "augmentation": "cutmix", "lr_decay": 0.5, "lr_decay_epochs": 2}),
}
"""Name -> method and options."""

BASELINES = {
    "ft": ("ft", {"epochs": 3, "cosine": True}),
    "ft with replacement": ("ft", {"epochs": 2, "steps": 2, "crop": 1, "flip": True}),
    "fine_pruning": ("fine_pruning", {"epochs": 2, "budget": 0.5, "step": 0.2}),
    "ibau": ("ibau", {"epochs": 2, "share": 0.5, "flip": True}),
    "rnp": ("rnp", {"epochs": 2, "unlearn_epochs": 3, "least_accuracy": 0.9}),
    "rnp to the end": ("rnp", {"epochs": 2, "unlearn_epochs": 2, "least_accuracy": 0.0, "threshold": 0.5}),
    "ft_sam": ("ft_sam", {"epochs": 3, "cosine_steps": 4}),
    "nad": ("nad", {"epochs": 2, "teacher_epochs": 2, "lr": 0.01}),
    "mcr": ("mcr", {"epochs": 2, "end_epochs": 2}),
}
"""The same of the methods that train weights."""


def network() -> nn.Module:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    head = nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    return nn.Sequential(*convolutions, *head)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(24, 3, 8, 8, generator=generator), torch.arange(24) % 4


def purify(name: str, **more):
    method, options = {**RUNS, **BASELINES}[name]
    return METHODS[method].run(network(), images(), progress=False, batch_size=8, **{**options, **more})


def run_and_save(name: str, checkpoint: str, out: str, more: dict) -> None:
    """A process of its own: the run, or what is left of it, and its results."""
    torch.set_num_threads(1)
    result = purify(name, checkpoint=checkpoint, resume=True, **more)
    torch.save({"masks": result.masks, "trigger": result.trigger, "history": result.history}, out)
