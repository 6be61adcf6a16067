from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


def device_of(model: nn.Module, images: Tensor) -> torch.device:
    """Where the model's first parameter or buffer is, else where the images are."""
    return next(chain(model.parameters(), model.buffers()), images).device


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
