"""The two ways into the L1 ball, for each row of a (rows, entries) tensor, in float64 and rounded once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def l1_norm(input: Tensor) -> Tensor:
    """``sum|input|`` as (rows, 1); of zeros the smallest normal number, by which one can still divide."""
    norm = input.abs().sum(1, keepdim=True, dtype=torch.float64)
    return norm.clamp_min(torch.finfo(torch.float64).smallest_normal)


def rescale_to_l1_ball(input: Tensor, radius: float) -> Tensor:
    """``input * min(1, radius / sum|input|)``."""
    norm = l1_norm(input)
    scale = radius / norm.clamp_min(radius) + _nan_unless_finite(norm)
    return (input * scale).to(input.dtype)


def project_onto_l1_ball(input: Tensor, radius: float) -> Tensor:
    """``sign(input) * max(|input| - t, 0)`` with the smallest ``t >= 0`` for which the result is inside the ball.

    With S_k the sum of the k largest entries, sum(max(|input| - t, 0)) >= S_k - k * t for every k, and equal for one of
    them: so t is the largest of all (S_k - radius) / k, and of 0.
    """
    norm, magnitude = l1_norm(input), input.abs().double()
    total = magnitude.sort(1, descending=True).values.cumsum(1)
    count = torch.arange(1, input.shape[1] + 1, device=input.device, dtype=torch.float64)
    threshold = F.pad((total - radius) / count, (0, 1)).amax(1, keepdim=True) + _nan_unless_finite(norm)
    shrunk = input.sign() * (magnitude - threshold).clamp_min(0)
    # inside the ball t is 0; this says so to the derivative too, which sign(0) would hide
    return torch.where(norm <= radius, input, shrunk.to(input.dtype))


def _nan_unless_finite(norm: Tensor) -> Tensor:
    """0 where the norm is finite, NaN elsewhere: one entry that isn't finite makes its whole row NaN."""
    return norm - norm
