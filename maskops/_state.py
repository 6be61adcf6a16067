"""Torch's state for the length of a ``with`` block: modules' modes, the global random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode; afterwards its training flag is what it was."""
    # the flags themselves, not eval() and train(): these may be overridden to do more (or to refuse)
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def seeded_layers(seed: int, device: torch.device) -> Iterator[None]:
    """Within, what layers such as dropout draw from torch's global generators follows a seed.

    The generators of the CPU and of the device are left as they were.
    """
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
