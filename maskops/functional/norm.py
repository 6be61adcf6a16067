"""Masked normalisation: the scale is masked, and noise moves the scale and the shift."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from maskops.functional._autograd import EffectiveWeight, run
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
