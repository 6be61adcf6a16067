"""The step on a trigger."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskops.functional._checks import check_bounds, check_floating, check_trigger, shape

_PROJECTIONS = ("none", "rescale")


def trigger_step_(
    trigger: Tensor,
    grad: Tensor,
    step_size: float,
    *,
    projection: str = "none",
    radius: float = math.inf,
    low: float | None = None,
    high: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of a trigger up its gradient, in place: ``Δ ← clamp(rescale(Δ + step_size * sum_over_batch(grad)))``.

    ``rescale`` is :func:`maskops.functional.rescale_to_l1_ball`, ``Δ * min(1, radius / ‖Δ‖₁)``. Computed in float32 (in
    float64 where a tensor is float64), the norm in float64, and rounded once.

    trigger:    (1, C, H, W) or (C, H, W), any floating dtype; also one that requires gradients, whose graph doesn't see
                the step
    grad:       (B, C, H, W), one gradient for each image, or (1, C, H, W), their sum; any floating dtype
    step_size:  η₁; positive to ascend, negative to descend
    projection: ``"rescale"``, or ``"none"``, for which the radius isn't read
    radius:     τ >= 0, in the units of the trigger
    low, high:  bounds of the trigger's entries, kept last; None for no bound. Bounds that exclude 0 may lead out of the
                ball
    backend:    None for the first usable of cuda, triton, reference; see :func:`maskops.explain`
    returns:    the trigger. With ``"rescale"``, an entry that isn't finite makes all of it NaN
    gradients:  none
    errors:     ValueError for shapes, devices, a radius that is negative or not finite, and bounds; TypeError for
                dtypes
    source:     AWM (Chai & Chen 2022), Algorithm 1, lines 7 to 9. Line 7 prints a minus, where the trigger ascends

    >>> trigger = torch.zeros(1, 1, 1, 2)
    >>> trigger_step_(trigger, torch.tensor([[[[1.0, -3.0]]]]), 10.0, projection="rescale", radius=20.0)
    tensor([[[[  5., -15.]]]])
    """
    _check("trigger_step_", trigger, grad, projection, radius)
    check_bounds("trigger_step_", low, high)
    ball = float(radius) if projection == "rescale" else None
    with torch.no_grad():
        torch.ops.maskops.trigger_step_(trigger, grad, float(step_size), ball, low, high, backend=backend)
    return trigger


def _check(op: str, trigger: Tensor, grad: Tensor, projection: str, radius: float) -> None:
    check_floating(op, "grad", grad)
    if grad.dim() != 4:
        raise ValueError(f"{op}: grad must have shape (B, C, H, W); got {shape(grad)}")
    check_trigger(op, trigger, shape(grad)[1:])
    if grad.device != trigger.device:
        raise ValueError(f"{op}: grad must be on the trigger's device {trigger.device}; got {grad.device}")
    if projection not in _PROJECTIONS:
        raise ValueError(f"{op}: projection must be one of {', '.join(_PROJECTIONS)}; got {projection!r}")
    if projection == "rescale" and not (radius >= 0 and math.isfinite(radius)):
        raise ValueError(f"{op}: radius must be finite and not negative; got {radius}")
