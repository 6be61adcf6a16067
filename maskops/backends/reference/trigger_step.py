"""The step on a trigger: gradient ascent, then into the L1 ball, then into the range of pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from maskops.backends.reference.images import sum_over_batch
from maskops.backends.reference.l1_ball import rescale_to_l1_ball


def trigger_step_(
    trigger: Tensor, grad: Tensor, step_size: float, radius: float | None, low: float | None, high: float | None
) -> None:
    """``clamp(rescale(trigger + step_size * sum_over_batch(grad), radius), low, high)``, rounded once.

    Without a radius nothing is rescaled, without bounds nothing is clamped.
    """
    dtype = torch.promote_types(torch.promote_types(trigger.dtype, grad.dtype), torch.float32)
    stepped = trigger + step_size * sum_over_batch(grad, dtype).view(trigger.shape)
    if radius is not None:
        stepped = rescale_to_l1_ball(stepped.reshape(1, -1), radius).view(stepped.shape)
    if low is not None or high is not None:
        stepped = stepped.clamp(low, high)
    trigger.copy_(stepped)
