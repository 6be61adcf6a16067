"""Masked normalisation: the scale is masked, and noise moves the scale and the shift."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from maskops.functional._checks import shape
from maskops.functional.weight import effective_weight


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
    _check_shift("masked_batch_norm", bias, noise_bias)
    scale = effective_weight(weight, mask, noise, backend=backend)
    return F.batch_norm(input, running_mean, running_var, scale, _shift(bias, noise_bias), training, momentum, eps)


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
    _check_shift("masked_layer_norm", bias, noise_bias)
    scale = effective_weight(weight, mask, noise, backend=backend)
    return F.layer_norm(input, list(normalized_shape), scale, _shift(bias, noise_bias), eps)


def _check_shift(op: str, bias: Tensor | None, noise_bias: Tensor | None) -> None:
    if noise_bias is not None and bias is None:
        raise ValueError(f"{op}: noise_bias needs a bias to act on; got noise_bias {shape(noise_bias)} and no bias")


def _shift(bias: Tensor | None, noise_bias: Tensor | None) -> Tensor | None:
    return bias if noise_bias is None else effective_weight(bias, noise_bias + 1)
