"""Two ways into the L1 ball."""

from __future__ import annotations

import math

from torch import Tensor

from maskops.functional._autograd import ProjectOntoL1Ball, RescaleToL1Ball, run
from maskops.functional._checks import FLOATING, shape


def rescale_to_l1_ball(input: Tensor, radius: float, *, batch_dims: int = 0, backend: str | None = None) -> Tensor:
    """Shrink a tensor towards zero until it is inside the L1 ball: ``input * min(1, radius / sum|input|)``.

    This is the step that AWM takes, and keeps the direction of the trigger. It isn't the Euclidean projection: see
    :func:`project_onto_l1_ball`. The sum is taken in float64.

    input:      (*) any floating dtype; one ball, or one for each index of the first ``batch_dims`` dimensions
    radius:     τ >= 0, in the units of the input
    returns:    (*) with sum|result| <= radius up to one rounding; a ball with an entry that isn't finite is all NaN
    gradients:  input
    errors:     ValueError for a radius that is negative or not finite, TypeError for a dtype that isn't floating
    source:     AWM (Chai & Chen 2022), Algorithm 1, line 9

    >>> import torch
    >>> rescale_to_l1_ball(torch.tensor([3.0, -1.0]), 2.0)
    tensor([ 1.5000, -0.5000])
    """
    rows = _rows("rescale_to_l1_ball", input, radius, batch_dims)
    return run(RescaleToL1Ball, rows, float(radius), backend).view(input.shape)


def project_onto_l1_ball(input: Tensor, radius: float, *, batch_dims: int = 0, backend: str | None = None) -> Tensor:
    """The nearest point of the L1 ball: ``sign(x) * max(|x| - t, 0)`` with the smallest t >= 0 that gets inside.

    Sparse where :func:`rescale_to_l1_ball` keeps every entry. The threshold is found in float64.

    input:      (*) any floating dtype; one ball, or one for each index of the first ``batch_dims`` dimensions
    radius:     τ >= 0, in the units of the input
    returns:    (*) with sum|result| <= radius up to rounding; a ball with an entry that isn't finite is all NaN
    gradients:  input
    errors:     ValueError for a radius that is negative or not finite, TypeError for a dtype that isn't floating
    source:     Duchi et al. 2008, "Efficient projections onto the l1-ball", Figure 1

    >>> import torch
    >>> project_onto_l1_ball(torch.tensor([3.0, -1.0]), 2.0)
    tensor([2., -0.])
    """
    rows = _rows("project_onto_l1_ball", input, radius, batch_dims)
    return run(ProjectOntoL1Ball, rows, float(radius), backend).view(input.shape)


def _rows(op: str, input: Tensor, radius: float, batch_dims: int) -> Tensor:
    if input.dtype not in FLOATING:
        raise TypeError(f"{op}: input must be a floating dtype; got {input.dtype}")
    if not (radius >= 0 and math.isfinite(radius)):
        raise ValueError(f"{op}: radius must be finite and not negative; got {radius}")
    if not 0 <= batch_dims <= input.dim():
        raise ValueError(
            f"{op}: batch_dims must be between 0 and {input.dim()} for input {shape(input)}; got {batch_dims}"
        )
    return input.reshape(math.prod(input.shape[:batch_dims]), math.prod(input.shape[batch_dims:]))
