"""Many masks over one weight: the layers of K masks at once, each the one of its mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import torch
from torch import Tensor

from maskops.backends.reference import layers

_NAMES = ("input", "weight", "masks", "noise", "bias")


def many_masked_conv(
    input, weight, masks, noise, bias, stride, padding, dilation, groups, *, weighting=layers._PLAIN
) -> Tensor:
    """``conv(input[j], effective_weight(weight, masks[j], noise[j]), bias)`` for every j, or of one input for all j."""
    geometry = (stride, padding, dilation, False, [0, 0], groups)

    def one(input, mask, noise):
        return layers.masked_conv(input, weight, mask, noise, bias, *geometry, weighting=weighting)

    return _forward(one, input, weight, masks, noise)


def many_masked_conv_backward(
    grad,
    input,
    weight,
    masks,
    noise,
    input_size,
    stride,
    padding,
    dilation,
    groups,
    needs,
    *,
    weighting=layers._PLAIN,
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order input, weight, masks, noise, bias."""
    geometry = (stride, padding, dilation, False, [0, 0], groups, needs)

    def one(grad, input, mask, noise):
        size = input_size[-4:]
        return layers.masked_conv_backward(grad, input, weight, mask, noise, size, *geometry, weighting=weighting)

    return _backward(one, grad, input, weight, masks, noise, input_size, needs)


def many_masked_linear(input, weight, masks, noise, bias, *, weighting=layers._PLAIN) -> Tensor:
    """``linear(input[j], effective_weight(weight, masks[j], noise[j]), bias)`` for every j, or of one input for all."""

    def one(input, mask, noise):
        return layers.masked_linear(input, weight, mask, noise, bias, weighting=weighting)

    return _forward(one, input, weight, masks, noise)


def many_masked_linear_backward(
    grad, input, weight, masks, noise, input_size, needs, *, weighting=layers._PLAIN
) -> list[Tensor]:
    """The gradients that ``needs`` asks for, in the order input, weight, masks, noise, bias."""

    def one(grad, input, mask, noise):
        size = input_size[-2:]
        return layers.masked_linear_backward(grad, input, weight, mask, noise, size, needs, weighting=weighting)

    return _backward(one, grad, input, weight, masks, noise, input_size, needs)


def _forward(one: Callable[..., Tensor], input: Tensor, weight: Tensor, masks: Tensor, noise: Tensor | None) -> Tensor:
    own = input.dim() > weight.dim()
    return _stack(
        [one(input[j] if own else input, masks[j], None if noise is None else noise[j]) for j in range(masks.shape[0])]
    )


def _backward(one, grad, input, weight, masks, noise, input_size, needs) -> list[Tensor]:
    own = len(input_size) > weight.dim()
    every = [
        one(
            grad[j],
            input[j] if own and input is not None else input,
            masks[j],
            None if noise is None else noise[j],
        )
        for j in range(masks.shape[0])
    ]
    names = [name for name, need in zip(_NAMES, needs, strict=True) if need]
    stacked = ("input", "masks", "noise") if own else ("masks", "noise")
    return [
        _stack(grads) if name in stacked else _sum(grads)
        for name, grads in zip(names, zip(*every, strict=True), strict=True)
    ]


def _stack(tensors: list[Tensor]) -> Tensor:
    """The tensors one after the other in memory, each in the layout of the first; channels_last stays that."""
    first = tensors[0]
    # by the strides: inside of vmap torch doesn't tell whether a tensor is channels_last
    if first.dim() == 4 and first.stride(1) == 1 and not first.is_contiguous():
        return torch.stack([tensor.permute(0, 2, 3, 1) for tensor in tensors]).permute(0, 1, 4, 2, 3)
    return torch.stack(tuple(tensors))


def _sum(tensors: tuple[Tensor, ...]) -> Tensor:
    """The sum, rounded once."""
    dtype = tensors[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    return reduce(torch.add, map(partial(torch.Tensor.to, dtype=wide), tensors)).to(dtype)
