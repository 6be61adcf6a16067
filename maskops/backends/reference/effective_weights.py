"""The effective weights of many layers, and the gradients of their masks and noise."""

from __future__ import annotations

import torch
from torch import Tensor

from maskops.backends.reference.layers import mask_value


def effective_weights(
    weights: list[Tensor], masks: list[Tensor], noises: list[Tensor], scales: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """``scale * weight * mask`` of each layer; with noises after them ``scale * weight * (mask + noise)`` of each.

    A scale is one number per entry of its weight's first dimension. No scales are scales of 1.
    """
    factors = [mask_value(mask) for mask in masks]
    perturbed = [factor + noise for factor, noise in zip(factors, noises, strict=True)] if noises else []
    results = []
    for at, factor in enumerate(factors + perturbed):
        product = weights[at % len(weights)] * factor
        results.append((product * _scale(scales, weights, at) if scales else product).to(dtype))
    return results


def effective_weights_backward(
    grads: list[Tensor], weights: list[Tensor], masks: list[Tensor], noises: list[Tensor], scales: list[Tensor]
) -> list[Tensor]:
    """``scale * weight * grad``, summed where broadcast: of each mask over both its branches, then of each noise."""
    products = []
    for at, grad in enumerate(grads):
        product = grad.to(torch.promote_types(grad.dtype, torch.float32)) * weights[at % len(weights)]
        products.append(product * _scale(scales, weights, at) if scales else product)
    clean, perturbed = products[: len(weights)], products[len(weights) :]
    totals = [a + b for a, b in zip(clean, perturbed, strict=True)] if noises else clean
    pairs = [*zip(totals, masks, strict=True), *zip(perturbed, noises, strict=True)]
    return [product.sum_to_size(factor.shape).to(factor.dtype) for product, factor in pairs]


def _scale(scales: list[Tensor], weights: list[Tensor], at: int) -> Tensor:
    weight = weights[at % len(weights)]
    return scales[at % len(weights)].view(-1, *(1,) * (weight.dim() - 1))
