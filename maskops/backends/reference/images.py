"""A batch of clean images: picked, decoded, perturbed, clamped and normalised; and the gradient of its trigger."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def prepare_images(
    images: Tensor,
    index: Tensor | None,
    trigger: Tensor | None,
    low: float | None,
    high: float | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``(clamp(decode(images[index]) + trigger, low, high) - mean) / std``, rounded once to ``dtype``.

    The result has its images one after the other, each in the memory order that ``images`` has.
    """
    order = _memory_order(images)
    value = _perturbed(_pick(images, index, order), trigger, _widest(images, trigger, mean, std))
    if low is not None or high is not None:
        value = value.clamp(low, high)
    if mean is not None:
        value = value - _as_image(mean, images, order)
    if std is not None:
        value = value / _as_image(std, images, order)
    value = value.to(dtype)
    # an op's result shares no memory with its input
    return _lay_out(value.clone() if value is images else value, order)


def prepare_images_backward(
    grad: Tensor,
    images: Tensor | None,
    index: Tensor | None,
    trigger: Tensor,
    low: float | None,
    high: float | None,
    std: Tensor | None,
) -> Tensor:
    """The trigger's gradient: ``grad``, where the clamp let it pass, summed over the batch, over ``std``.

    Without a clamp ``images`` isn't read, and may be None.
    """
    dtype = _widest(grad, images, trigger, std)
    if low is not None or high is not None:
        value = _perturbed(_pick(images, index, _memory_order(grad)), trigger, dtype)
        grad = torch.where(value.clamp(low, high) == value, grad, 0)
    total = sum_over_batch(grad, dtype)
    if std is not None:
        total = total / std.view(-1, 1, 1)
    return total.to(trigger.dtype).view(trigger.shape)


def sum_over_batch(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, C, H, W), added in the order of memory: on the CPU many times as fast for channels_last."""
    order = _memory_order(grad)
    return _restore(grad.permute(order).sum(0, keepdim=True, dtype=dtype), order)


def _widest(*tensors: Tensor | None) -> torch.dtype:
    """float32; float64 where a tensor is."""
    return reduce(torch.promote_types, [t.dtype for t in tensors if t is not None], torch.float32)


def _pick(images: Tensor, index: Tensor | None, order: list[int]) -> Tensor:
    # whole images in the order of memory: a copy each
    return images if index is None else _restore(images.permute(order).index_select(0, index), order)


def _perturbed(images: Tensor, trigger: Tensor | None, dtype: torch.dtype) -> Tensor:
    value = images.to(dtype)
    if images.dtype == torch.uint8:
        value = value / 255
    return value if trigger is None else value + trigger


def _as_image(values: Tensor, images: Tensor, order: list[int]) -> Tensor:
    """A value per channel as an image of its own, by which the CPU divides many times as fast for channels_last."""
    return _lay_out(values.view(1, -1, 1, 1).expand(1, *images.shape[1:]), order)


def _memory_order(images: Tensor) -> list[int]:
    """The batch, then the other dimensions from the outermost to the innermost."""
    return [0, *sorted((1, 2, 3), key=images.stride, reverse=True)]


def _lay_out(images: Tensor, order: list[int]) -> Tensor:
    return _restore(images.permute(order).contiguous(), order)


def _restore(permuted: Tensor, order: list[int]) -> Tensor:
    return permuted.permute([order.index(dim) for dim in range(4)])
