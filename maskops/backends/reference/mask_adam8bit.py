"""Adam's step on masks, its moments kept in eight bits."""

from __future__ import annotations

import torch
from torch import Tensor

from maskops.backends.reference.mask_step import count_and_scale, mask_gradient, mask_totals, store

BLOCK = 256
"""Entries that share a scale."""


def mask_adam8bit_step_(
    mask, grad, weight, effective, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, step, lr, beta1, beta2, eps,
    l1, toward, lower, upper, totals=None, stochastic_from=None,
) -> None:  # fmt: skip
    """``mask_adam_step_`` over flat tensors, its moments stored as codes of a number in [-1, 1] and a block's scale.

    Block-wise dynamic quantisation (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, section 2.2):
    a scale is the block's largest magnitude, a code the nearest of 256 numbers. This step is taken with the new moments
    as they are; the next one starts from what the codes keep of them. Other than in the paper, a second moment above 0
    has a code above 0's: else masks of small gradients, whose first moment is kept, would be divided by ``eps``.
    """
    dtype = torch.promote_types(mask.dtype, torch.float32)
    step_size, correction = count_and_scale(step, lr, beta1, beta2)
    first, second = (
        dequantise(exp_avg, exp_avg_scale, True, dtype),
        dequantise(exp_avg_sq, exp_avg_sq_scale, False, dtype),
    )
    m = mask.to(dtype)
    g = mask_gradient(m, grad, weight, l1, toward)
    first.lerp_(g, 1 - beta1)
    second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    exact = m - first / second.sqrt().div_(correction).add_(eps) * step_size
    store(exact, mask, weight, effective, lower, upper, step, stochastic_from)
    quantise_(exp_avg, exp_avg_scale, first, True)
    quantise_(exp_avg_sq, exp_avg_sq_scale, second, False)
    if totals is not None:
        totals.copy_(mask_totals(mask, toward, lower, upper))


def dequantise(codes: Tensor, scale: Tensor, signed: bool, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for."""
    values = code_values(signed, codes.device)[codes.int()]
    return (values * scale.repeat_interleave(BLOCK)[: len(codes)]).to(dtype)


def quantise_(codes: Tensor, scale: Tensor, values: Tensor, signed: bool) -> None:
    """Write the nearest codes, the lower one of two as near, and the scales: a block's largest magnitude.

    A value that isn't finite makes its block's scale so, and thus all of the block from the next step on.
    """
    blocks = torch.nn.functional.pad(values.float(), (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scale.copy_(blocks.abs().amax(1))
    shares = blocks * (1 / scale.clamp_min(torch.finfo(torch.float32).tiny)).unsqueeze(1)
    numbers = code_values(signed, codes.device).double()
    between = ((numbers[1:] + numbers[:-1]) / 2).float()
    if not signed:
        between[0] = 0  # what is above 0 stays above 0
    codes.copy_(torch.bucketize(shares, between).flatten()[: len(codes)])


def code_values(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The numbers that the codes 0 to 255 stand for: dynamic tree quantisation, in float32.

    They are 0, 1, and in each of the seven decades from 1e-7 to 1 the middles of its equal pieces, of which there are
    twice as many as in the decade below. With a sign they start from one piece and go without -1, else from two pieces.

    >>> code_values(signed=True)[[0, 126, 127, 128, 255]].tolist()
    [-0.992968738079071, -5.499999815583578e-07, 0.0, 5.499999815583578e-07, 1.0]
    """
    least = 1 if signed else 2
    count = torch.arange(least, 128 * least, dtype=torch.float64, device=device)
    exponent = torch.frexp(count).exponent - 1
    decade = (exponent - (least - 1) - 6).double()
    middles = 10.0**decade * (0.1 + 0.9 * ((count + 0.5) / 2.0**exponent - 1))
    zero = torch.zeros_like(count[:1])
    return torch.cat([*([-middles.flip(0)] if signed else []), zero, middles, zero + 1]).float()
