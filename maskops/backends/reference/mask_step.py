"""The mask step: gradient of the mask, L1 subgradient, optimiser, bounds, effective weight."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_adam_step_(
    mask, grad, weight, effective, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, l1, lower, upper
) -> None:
    """Adam (Kingma & Ba 2015, Algorithm 1) on ``grad * weight + l1 * sign(mask)``, then clip and effective weight.

    ``step`` counts on the device, so that the step can be captured in a CUDA graph: exactly, up to 2**24 in float32.
    """
    grad = _mask_grad(mask, grad, weight, l1)
    step += 1
    count = step.double()
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**count).sqrt()).add_(eps)
    mask.sub_(exp_avg / denominator * (lr / (1 - beta1**count)))
    _clip_and_apply(mask, weight, effective, lower, upper)


def mask_sgd_step_(mask, grad, weight, effective, momentum_buffer, lr, momentum, l1, lower, upper) -> None:
    """SGD with momentum on ``grad * weight + l1 * sign(mask)``, then clip and effective weight."""
    grad = _mask_grad(mask, grad, weight, l1)
    if momentum_buffer is not None:
        grad = momentum_buffer.mul_(momentum).add_(grad)
    mask.sub_(grad * lr)
    _clip_and_apply(mask, weight, effective, lower, upper)


def _mask_grad(mask: Tensor, grad: Tensor, weight: Tensor | None, l1: float) -> Tensor:
    grad = grad.to(mask.dtype)
    if weight is not None:
        grad = grad * weight
    return grad + l1 * mask.sign() if l1 else grad


def _clip_and_apply(mask: Tensor, weight: Tensor | None, effective: Tensor | None, lower: Tensor, upper: float) -> None:
    torch.maximum(mask.clamp_(max=upper), lower, out=mask)
    if effective is not None:
        torch.mul(weight, mask, out=effective)
