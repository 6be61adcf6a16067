from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn


def device_of(model: nn.Module, images: Tensor) -> torch.device:
    """Where the model's first parameter or buffer is, else where the images are."""
    return next(chain(model.parameters(), model.buffers()), images).device
