"""Normalisation: masked, where noise moves the scale and the shift, and frozen, as one pass with what follows it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops.functional._autograd import AffineReLU, EffectiveWeight, may_overwrite, run
from maskops.functional._checks import check_factor, check_floating, check_weight, shape


def masked_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    noise: Tensor | None = None,
    noise_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Batch norm with a masked scale: ``x̂ * weight * (mask + noise) + bias * (1 + noise_bias)``.

    input:        (N, C, *) float64, float32, float16 or bfloat16
    running_mean: (C,) or None, as in :func:`torch.nn.functional.batch_norm`; so running_var
    weight:       (C,) the frozen scale γ
    mask:         (C,) or (1,) the learned factor m; so noise (δ), added to it
    bias:         (C,) the frozen shift β, or None; noise_bias (C,) is ξ
    returns:      (N, C, *) as the input
    gradients:    input, weight, mask, bias, noise, noise_bias
    errors:       ValueError for shapes, TypeError for dtypes
    source:       ANP (Wu & Wang 2021), section 4.1: noise on scale and shift, mask on the scale alone

    >>> import torch
    >>> x, ones = torch.tensor([[1.0], [3.0]]), torch.ones(1)
    >>> masked_batch_norm(x, None, None, ones, 0.5 * ones, training=True)
    tensor([[-0.5000],
            [ 0.5000]])
    """
    check_floating("masked_batch_norm", "input", input)
    if input.dim() < 2 or weight.shape != input.shape[1:2]:
        raise ValueError(
            f"masked_batch_norm: weight must have one value per channel; got {shape(weight)} for input {shape(input)}"
        )
    scale, shift = _scale_and_shift("masked_batch_norm", weight, mask, bias, noise, noise_bias, backend)
    return F.batch_norm(input, running_mean, running_var, scale, shift, training, momentum, eps)


def masked_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    noise: Tensor | None = None,
    noise_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Layer norm with a masked scale: ``x̂ * weight * (mask + noise) + bias * (1 + noise_bias)``.

    input:            (*, *normalized_shape) float64, float32, float16 or bfloat16
    normalized_shape: as in :func:`torch.nn.functional.layer_norm`
    weight:           normalized_shape, the frozen scale γ
    mask:             broadcastable to weight, the learned factor m; so noise (δ), added to it
    bias:             normalized_shape, the frozen shift β, or None; noise_bias (ξ) broadcasts to it
    returns:          as the input
    gradients:        input, weight, mask, bias, noise, noise_bias
    errors:           ValueError for shapes, TypeError for dtypes
    source:           ANP's batch norm (Wu & Wang 2021), carried over to layer norm

    >>> import torch
    >>> masked_layer_norm(torch.tensor([[1.0, 3.0]]), [2], torch.ones(2), torch.tensor([1.0, 0.0]))
    tensor([[-1.0000,  0.0000]])
    """
    check_floating("masked_layer_norm", "input", input)
    normalized_shape = tuple(normalized_shape)
    if weight.shape != normalized_shape:
        raise ValueError(f"masked_layer_norm: weight must have shape {normalized_shape}; got {shape(weight)}")
    if input.shape[-weight.dim() :] != normalized_shape:
        raise ValueError(f"masked_layer_norm: input must end in {normalized_shape}; got {shape(input)}")
    scale, shift = _scale_and_shift("masked_layer_norm", weight, mask, bias, noise, noise_bias, backend)
    return F.layer_norm(input, normalized_shape, scale, shift, eps)


def affine_relu_(
    input: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    upper: float = math.inf,
    *,
    backend: str | None = None,
) -> Tensor:
    """Frozen batch norm, residual and ReLU in one pass: ``input ← clamp(scale * input + shift + residual, 0, upper)``.

    Computed in float32 (float64 where the input is), and rounded once. For the backward one bit per element is kept.

    input:     (N, C, *) float64, float32, float16 or bfloat16; overwritten
    scale:     (C,) any floating dtype, or None for 1; so shift, None for 0: a frozen batch norm is ``scale = γ/σ`` and
               ``shift = β - μγ/σ``
    residual:  of the input's shape, any floating dtype, or None
    upper:     inf, or a positive number that is exact in the input's dtype: 6 for ReLU6
    backend:   None for the first usable of cuda, triton, reference; see :func:`maskops.explain`
    returns:   the input
    gradients: input and residual, none for scale and shift; 0 where the output is 0 or, if finite, upper
    errors:    ValueError for shapes, devices, bounds, and a scale or shift that requires gradients; TypeError for
               dtypes; autograd's own RuntimeError for a leaf that requires gradients

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0], [-1.0, 5.0]])
    >>> affine_relu_(x, torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0]), upper=6.0)
    tensor([[3., 4.],
            [0., 6.]])
    """
    _check_affine("affine_relu_", input, scale, shift, residual, upper)
    overwrite = may_overwrite(input)
    output = run(AffineReLU, input, scale, shift, residual, float(upper), overwrite, backend)
    return output if overwrite else input.copy_(output)


def _check_affine(op, input, scale, shift, residual, upper) -> None:
    check_floating(op, "input", input)
    if input.dim() < 2:
        raise ValueError(f"{op}: input must have at least 2 dimensions, (N, C, *); got {shape(input)}")
    for name, tensor, size in (
        ("scale", scale, shape(input)[1:2]),
        ("shift", shift, shape(input)[1:2]),
        ("residual", residual, shape(input)),
    ):
        if tensor is None:
            continue
        check_floating(op, name, tensor)
        if tensor.shape != size:
            raise ValueError(f"{op}: {name} must have shape {size} for input {shape(input)}; got {shape(tensor)}")
        if tensor.device != input.device:
            raise ValueError(f"{op}: {name} must be on the input's device {input.device}; got {tensor.device}")
        if name != "residual" and tensor.requires_grad:
            raise ValueError(f"{op}: {name} must be frozen; got one that requires gradients")
    units = math.frexp(upper)[0] / torch.finfo(input.dtype).eps * 2  # in the last place
    if not upper > 0 or not (upper == math.inf or units.is_integer()):
        raise ValueError(f"{op}: upper must be inf or a positive number that is exact in {input.dtype}; got {upper}")


def _scale_and_shift(op, weight, mask, bias, noise, noise_bias, backend) -> tuple[Tensor, Tensor | None]:
    """``weight * (mask + noise)`` and ``bias * (1 + noise_bias)``."""
    check_weight(op, weight, mask, noise)
    scale = run(EffectiveWeight, weight, mask, noise, weight.dtype, backend)
    if noise_bias is None:
        return scale, bias
    if bias is None:
        raise ValueError(f"{op}: noise_bias needs a bias to act on; got noise_bias {shape(noise_bias)} and no bias")
    check_floating(op, "bias", bias)
    check_factor(op, "noise_bias", noise_bias, "bias", bias)
    return scale, run(EffectiveWeight, bias, noise_bias + 1, None, bias.dtype, backend)
