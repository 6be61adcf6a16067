"""Effective weights."""

from __future__ import annotations

import torch
from torch import Tensor

from maskops.functional._autograd import EffectiveWeight, run
from maskops.functional._checks import FLOATING, broadcasts, check_floating, check_weight, shape


def effective_weight(
    weight: Tensor,
    mask: Tensor,
    noise: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The weight under a mask: ``weight * mask``, with noise ``weight * (mask + noise)``.

    The product is taken in the widest dtype of its factors and rounded once to ``dtype``.

    weight:    (*) float64, float32, float16 or bfloat16
    mask:      broadcastable to weight, any floating dtype, or uint8 in steps of 1/255, which then has no gradient
    noise:     broadcastable to weight, any floating dtype, or None
    dtype:     dtype of the result; the weight's by default
    backend:   None for the first usable of cuda, triton, reference; see :func:`maskops.explain`
    returns:   (*) the effective weight
    gradients: weight, mask and noise
    errors:    ValueError for a shape that doesn't broadcast, TypeError for a dtype that isn't floating
    source:    m⊙θ and (m+δ)⊙θ of AWM (Chai & Chen 2022), Eq. 4.1 and 4.3

    >>> effective_weight(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.5]))
    tensor([2.0000, 1.5000])
    """
    check_weight("effective_weight", weight, mask, noise)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in FLOATING:
        raise TypeError(f"effective_weight: dtype must be floating; got {dtype}")
    return run(EffectiveWeight, weight, mask, noise, dtype, backend)


def clip_mask_(mask: Tensor, lower: float | Tensor = 0.0, upper: float = 1.0) -> Tensor:
    """Clip a mask to [lower, upper] in place and return it.

    mask:   (*) any floating dtype; also a parameter that requires gradients, whose graph doesn't see the step
    lower:  a number, or a tensor broadcastable to the mask (NFT's floor μ(l) is one number per layer)
    upper:  a number, not below ``lower``
    errors: ValueError when lower > upper or when lower doesn't broadcast, TypeError for a mask that isn't floating
    source: AWM Algorithm 1, line 13; NFT's clip to [μ(l), 1]

    >>> clip_mask_(torch.tensor([-0.5, 0.5, 1.5]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    check_floating("clip_mask_", "mask", mask)
    if not isinstance(lower, Tensor) and lower > upper:
        raise ValueError(f"clip_mask_: lower must not be above upper; got lower {lower} and upper {upper}")
    if isinstance(lower, Tensor) and not broadcasts(lower, mask):
        raise ValueError(f"clip_mask_: lower must broadcast to mask {shape(mask)}; got {shape(lower)}")
    with torch.no_grad():
        return mask.copy_(mask.clamp(max=upper).clamp_(min=lower))
