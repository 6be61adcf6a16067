"""Effective weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskops.functional._autograd import EffectiveWeight, EffectiveWeights, run
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


def effective_weights(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    noises: Sequence[Tensor] | None = None,
    scales: Sequence[Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """The weights of many layers under their masks, in one launch on a GPU: ``scale * weight * mask`` of each.

    With noises also ``scale * weight * (mask + noise)`` of each, in the same pass. A scale folds a frozen batch norm
    into its layer: its ``gamma / sqrt(var + eps)``.

    weights:   (O, *) each, float64, float32, float16 or bfloat16; frozen
    masks:     one per weight, broadcastable to it, any floating dtype, or uint8 in steps of 1/255, without gradient
    noises:    one per weight, broadcastable to it, any floating dtype; None for none
    scales:    (O,) one per weight, any floating dtype, frozen; None for 1
    dtype:     dtype of the results; the first weight's by default
    backend:   None for the first usable of cuda, triton, reference; see :func:`maskops.explain`
    returns:   the effective weights; with noises two lists, the clean and the perturbed ones
    gradients: masks and noises
    errors:    ValueError for lists of other lengths and shapes that don't broadcast, TypeError for dtypes
    source:    m⊙θ and (m+δ)⊙θ of AWM (Chai & Chen 2022), Eq. 4.1 and 4.3

    >>> effective_weights([torch.ones(2, 2), torch.ones(1)], [torch.full((2, 1), 0.5), torch.zeros(1)])
    [tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]]), tensor([0.])]
    """
    name, count = "effective_weights", len(weights)
    noises, scales = noises or [], scales or []
    lengths = {"masks": len(masks), "noises": len(noises) or count, "scales": len(scales) or count}
    for what, length in lengths.items():
        if length != count:
            raise ValueError(f"{name}: expected one of {what} for each of {count} weights; got {length}")
    for at, weight in enumerate(weights):
        check_weight(name, weight, masks[at], noises[at] if noises else None)
        if scales and (weight.dim() == 0 or scales[at].shape != weight.shape[:1]):
            raise ValueError(f"{name}: expected a scale {tuple(weight.shape[:1])}; got {shape(scales[at])}")
    if not count:
        return ([], []) if noises else []
    dtype = weights[0].dtype if dtype is None else dtype
    if dtype not in FLOATING:
        raise TypeError(f"{name}: dtype must be floating; got {dtype}")
    tensors = *weights, *masks, *noises, *scales
    found = list(run(EffectiveWeights, count, bool(noises), bool(scales), dtype, *tensors, backend))
    return (found[:count], found[count:]) if noises else found


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


def mask_to_bytes(mask: Tensor) -> Tensor:
    """A mask in steps of 1/255, which all masked layers and effective weights take: ``round(255 * mask)``.

    mask:    (*) any floating dtype, in [0, 1]; one of bytes stays as it is
    returns: (*) uint8, at most 1/510 away; 0 and 1 are exact
    errors:  ValueError for values outside of [0, 1], TypeError for a mask of other dtypes

    >>> mask_to_bytes(torch.tensor([0.0, 0.1, 1.0]))
    tensor([  0,  26, 255], dtype=torch.uint8)
    """
    if mask.dtype == torch.uint8:
        return mask
    check_floating("mask_to_bytes", "mask", mask)
    if not ((mask >= 0) & (mask <= 1)).all():
        least, most = mask.aminmax()
        raise ValueError(f"mask_to_bytes: mask must be in [0, 1]; got values from {least:.6g} to {most:.6g}")
    wide = torch.promote_types(mask.dtype, torch.float32)
    return (255 * mask.detach().to(wide)).round().to(torch.uint8)
