"""Batches of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskops.backends.cuda._module import ops


def prepare_images(images: Tensor, *arguments: Any) -> Tensor:
    """Computed in float32 and converted where float64 is asked for, as the reference does."""
    *options, dtype = arguments
    if dtype == torch.float64:
        return ops.prepare_images(images, *options, torch.float32).double()
    return ops.prepare_images(images, *arguments)
