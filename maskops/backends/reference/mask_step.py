"""The mask step: gradient of the mask, L1 subgradient, optimiser, bounds, effective weight; and the noise's step.

``totals``, where given, become sum|mask - toward| of the new mask and the numbers of its entries at ``lower`` and at
``upper``.

With ``stochastic_from`` a flat mask becomes bfloat16 numbers by chance, up or down by how near each is: to the nearest,
all steps would be lost that are smaller than half of what such numbers tell apart. The chance is a hash of the step's
count and the entry's place, counted from ``stochastic_from``, so all backends round alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 1 << 17
"""Elements of a flat arena that a step on the CPU takes at a time: what it makes on the way then stays in the cache."""


def mask_adam_step_(
    mask, grad, weight, effective, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, l1, toward, lower, upper,
    totals=None, stochastic_from=None,
) -> None:  # fmt: skip
    """Adam (Kingma & Ba 2015, Algorithm 1) on ``grad * weight + l1 * sign(mask - toward)``, clip, effective weight.

    ``step`` counts on the device, so that the step can be captured in a CUDA graph: exactly, up to 2**24 in float32.
    """
    step_size, correction = count_and_scale(step, lr, beta1, beta2)
    start = stochastic_from
    for m, g, w, e, first, second, low in _blocks(mask, grad, weight, effective, exp_avg, exp_avg_sq, lower):
        exact = m.to(torch.promote_types(m.dtype, first.dtype))
        g = mask_gradient(exact, g, w, l1, toward)
        first.lerp_(g, 1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        exact.sub_(first / second.sqrt().div_(correction).add_(eps) * step_size)
        store(exact, m, w, e, low, upper, step, start)
        start = None if start is None else start + len(m)
    if totals is not None:
        totals.copy_(mask_totals(mask, toward, lower, upper))


def mask_sgd_step_(
    mask, grad, weight, effective, momentum_buffer, lr, momentum, l1, toward, lower, upper, totals=None
) -> None:
    """SGD with momentum on ``grad * weight + l1 * sign(mask - toward)``, then clip and effective weight."""
    for m, g, w, e, buffer, low in _blocks(mask, grad, weight, effective, momentum_buffer, lower):
        g = mask_gradient(m, g, w, l1, toward)
        if buffer is not None:
            g = buffer.mul_(momentum).add_(g)
        m.sub_(g * lr)
        store(m, m, w, e, low, upper)
    if totals is not None:
        totals.copy_(mask_totals(mask, toward, lower, upper))


def noise_step_(noise: Tensor, grad: Tensor, weight: Tensor | None, step_size: float, bound: float) -> None:
    """``noise + step_size * sign(grad * weight)``, then into [-bound, bound]."""
    for n, g, w in _blocks(noise, grad, weight):
        g = g.to(n.dtype)
        n.add_(g.sign() if w is None else (g * w).sign_(), alpha=step_size)
        if bound < math.inf:
            n.clamp_(-bound, bound)


def _blocks(mask: Tensor, *others: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Flat tensors on the CPU in pieces of _BLOCK elements, with the Nones and numbers for each; others as they are."""
    if mask.dim() != 1 or mask.device.type != "cpu" or mask.numel() <= _BLOCK:
        yield mask, *others
        return
    count = -(-mask.numel() // _BLOCK)
    pieces = [[t] * count if t is None or t.dim() == 0 else t.split(_BLOCK) for t in (mask, *others)]
    yield from zip(*pieces, strict=True)


def count_and_scale(step: Tensor, lr: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """The step counted up, and what the bias corrections make of the learning rate and of the second moments' roots."""
    step += 1
    count = step.double()
    return lr / (1 - beta1**count), (1 - beta2**count).sqrt()


def mask_gradient(mask: Tensor, grad: Tensor, weight: Tensor | None, l1: float, toward: float) -> Tensor:
    grad = grad.to(mask.dtype)
    if weight is not None:
        grad = grad * weight
    if not l1:
        return grad
    return grad + l1 * (mask - toward if toward else mask).sign()


def store(
    exact: Tensor, mask: Tensor, weight: Tensor | None, effective: Tensor | None, lower: Tensor, upper: float,
    count: Tensor | None = None, stochastic_from: int | None = None,
) -> None:  # fmt: skip
    """The new mask within its bounds, as its dtype keeps it, and the effective weight that it makes."""
    torch.maximum(exact.clamp_(max=upper), lower, out=exact)
    if stochastic_from is not None:
        mask.copy_(rounded_by_chance(exact, count, stochastic_from))
    elif exact is not mask:
        mask.copy_(exact)
    if effective is not None:
        torch.mul(weight, mask, out=effective)


def mask_totals(mask: Tensor, toward: float, lower: Tensor, upper: float) -> Tensor:
    """sum|mask - toward|, and how many entries are at their lower bound and at the upper one."""
    counts = (mask == lower.to(mask.dtype)).sum(), (mask == upper).sum()
    return torch.stack([(mask.double() - toward).abs().sum(), *(count.double() for count in counts)])


def rounded_by_chance(values: Tensor, count: Tensor, start: int) -> Tensor:
    """Flat float32 numbers as bfloat16: of its two neighbours one by chance, the nearer one more often."""
    chance = chances(len(values), count.to(values.device), start)
    bits = values.float().view(torch.int32)
    rounded = ((bits + chance) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def chances(entries: int, count: Tensor, start: int) -> Tensor:
    """For each entry 16 bits that a hash (Wellons 2018, lowbias32) makes of its place and of a step's count."""
    bits = torch.arange(start, start + entries, device=count.device) ^ (count.long() * 0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        bits = bits & 0xFFFFFFFF
        bits = (bits ^ (bits >> shift)) * factor
    return (bits & 0xFFFF).int()
