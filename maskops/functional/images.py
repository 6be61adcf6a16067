"""From clean images in storage to the input of a network, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from maskops.backends import reference
from maskops.functional._autograd import _compute, run
from maskops.functional._checks import FLOATING, check_bounds, check_floating, check_trigger, shape

_ops = torch.ops.maskops


def prepare_images(
    images: Tensor,
    index: Tensor | None = None,
    trigger: Tensor | None = None,
    *,
    low: float | None = None,
    high: float | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The images that a network reads: ``(clamp(decode(images[index]) + trigger, low, high) - mean) / std``.

    In this order, in float32 (in float64 where a tensor is float64): decode bytes as value / 255, add the trigger,
    clamp, subtract the mean, divide by the standard deviation; then round once to ``dtype``.

    images:    (N, C, H, W) uint8, or any floating dtype
    index:     (B,) int64, the images to take, in [0, N); None for all of them in their order
    trigger:   (1, C, H, W) or (C, H, W), any floating dtype, in pixel units; None for none
    low, high: bounds of the perturbed pixels; None for no bound
    mean, std: (C,) any floating dtype; None for none
    dtype:     of the result; by default that of floating images, and float32 for uint8
    backend:   None for the first usable of cuda, triton, reference; see :func:`maskops.explain`
    returns:   (B, C, H, W), dense, in the memory order of one of ``images``: channels_last if they are
    gradients: trigger, summed over the batch where low <= pixel + trigger <= high. The backward keeps no tensor of the
               batch's size: it reads ``images`` again if there is a clamp
    errors:    ValueError for shapes, devices and bounds, TypeError for dtypes. That the index is inside isn't checked,
               because it would wait for the device: on the reference an index outside raises IndexError or
               RuntimeError, elsewhere it reads what it may not
    source:    x + Δ of AWM (Chai & Chen 2022), Algorithm 1, lines 6 and 11; the clamp and the normalisation are those
               of its published code

    >>> images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    >>> prepare_images(images, torch.tensor([2, 1]), torch.full((1, 1, 1, 1), 0.5), low=0, high=1).flatten()
    tensor([1.0000, 0.7000])
    """
    _check("prepare_images", images, index, trigger, mean, std)
    check_bounds("prepare_images", low, high)
    dtype = _default(images) if dtype is None else dtype
    if dtype not in FLOATING:
        raise TypeError(f"prepare_images: dtype must be floating; got {dtype}")
    return run(PrepareImages, images, index, trigger, low, high, mean, std, dtype, backend)


class PrepareImages(Function):
    """With p = decode(images[index]) + trigger: dL/dtrigger = sum over the batch of [low <= p <= high] * g / std."""

    formula = staticmethod(reference.prepare_images)

    @staticmethod
    def forward(ctx, images, index, trigger, low, high, mean, std, dtype, backend):
        ctx.low, ctx.high, ctx.backend = low, high, backend
        if ctx.needs_input_grad[2]:
            clamped = low is not None or high is not None
            ctx.save_for_backward(*((images, index) if clamped else (None, None)), trigger, std)
        return _ops.prepare_images(images, index, trigger, low, high, mean, std, dtype, backend=backend)

    @staticmethod
    def backward(ctx, grad):
        if not ctx.needs_input_grad[2]:
            return (None,) * 9
        images, index, trigger, std = ctx.saved_tensors
        arguments = grad, images, index, trigger, ctx.low, ctx.high, std
        return None, None, _compute("prepare_images_backward", *arguments, backend=ctx.backend), *(None,) * 6


def _default(images: Tensor) -> torch.dtype:
    return images.dtype if images.is_floating_point() else torch.float32


def _check(
    op: str, images: Tensor, index: Tensor | None, trigger: Tensor | None, mean: Tensor | None, std: Tensor | None
) -> None:
    if images.dtype not in (torch.uint8, *FLOATING):
        raise TypeError(f"{op}: images must be uint8 or a floating dtype; got {images.dtype}")
    if images.dim() != 4:
        raise ValueError(f"{op}: images must have shape (N, C, H, W); got {shape(images)}")
    if index is not None and index.dtype != torch.int64:
        raise TypeError(f"{op}: index must be torch.int64; got {index.dtype}")
    if index is not None and index.dim() != 1:
        raise ValueError(f"{op}: index must have shape (B,); got {shape(index)}")
    if trigger is not None:
        check_trigger(op, trigger, shape(images)[1:])
    for name, value in (("mean", mean), ("std", std)):
        if value is None:
            continue
        check_floating(op, name, value)
        if value.shape != images.shape[1:2]:
            raise ValueError(f"{op}: {name} must have shape ({images.shape[1]},); got {shape(value)}")
    for name, value in (("index", index), ("trigger", trigger), ("mean", mean), ("std", std)):
        if value is not None and value.device != images.device:
            raise ValueError(f"{op}: {name} must be on the images' device {images.device}; got {value.device}")
