"""The two ways into the L1 ball, for each row of a (rows, entries) tensor. Sums are taken in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def rescale_to_l1_ball(input: Tensor, radius: float) -> Tensor:
    """``input * min(1, radius / sum|input|)``."""
    norm = input.abs().sum(1, keepdim=True, dtype=torch.float64)
    scale = torch.where(norm <= radius, 1.0, radius / norm) + _nan_unless_finite(norm)
    return input * scale.to(input.dtype)


def project_onto_l1_ball(input: Tensor, radius: float) -> Tensor:
    """``sign(input) * max(|input| - t, 0)`` with the smallest ``t >= 0`` for which the result is inside the ball."""
    magnitude = input.abs().double()
    descending, _ = magnitude.sort(1, descending=True)
    total = descending.cumsum(1)
    count = torch.arange(1, input.shape[1] + 1, device=input.device, dtype=torch.float64)
    thresholds = (total - radius) / count
    support = (descending > thresholds).sum(1, keepdim=True).clamp_min(1)
    threshold = thresholds.gather(1, support - 1).clamp_min(0) + _nan_unless_finite(total[:, -1:])
    return (input.sign() * (magnitude - threshold).clamp_min(0)).to(input.dtype)


def _nan_unless_finite(norm: Tensor) -> Tensor:
    """0 where the norm is finite, NaN elsewhere: one entry that isn't finite makes its whole row NaN."""
    return norm - norm
