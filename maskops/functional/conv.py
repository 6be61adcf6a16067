"""Masked convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from maskops.functional._autograd import DualMaskedLayer, MaskedConvReLU, MaskedLayer, each, run_layer
from maskops.functional._checks import check_branches, check_floating, check_layer, expand, shape

Size = int | Sequence[int]


def masked_conv1d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``conv1d(input, weight * (mask + noise), bias)``: see :func:`masked_conv2d`, with one spatial dimension.

    >>> import torch
    >>> x, w = torch.ones(1, 1, 4), torch.ones(1, 1, 2)
    >>> masked_conv1d(x, w, torch.tensor([[[1.0, 0.5]]]))
    tensor([[[1.5000, 1.5000, 1.5000]]])
    """
    layer, options = (weight, mask, noise, bias), (stride, padding, dilation, groups)
    return _convolve("masked_conv1d", 1, MaskedLayer, (input,), layer, options, backend)


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolution with a masked weight: ``conv2d(input, weight * mask, bias)``, or ``weight * (mask + noise)``.

    Equivalent to ``torch.nn.functional.conv2d(input, weight * mask, bias, stride, padding, dilation, groups)``, but
    neither the product nor the gradient of the weight is kept, and only the gradients that are asked for are computed:
    for the input alone, the input isn't saved.

    input:     (N, C, H, W) or (C, H, W) float64, float32, float16 or bfloat16; its dtype is the dtype of computation
    weight:    (O, C / groups, R, S) of the input's dtype, or either 16-bit and the other float32
    mask:      broadcastable to weight: (O, C / groups, R, S) per weight, (O, C / groups, 1, 1) per kernel, (O, 1, 1, 1)
               per neuron; any floating dtype, or uint8 in steps of 1/255, which then has no gradient
    noise:     broadcastable to weight, any floating dtype, or None
    bias:      (O,) or None; not masked; its dtype may differ from the input's as the weight's may
    stride, padding, dilation, groups: as in torch, with padding also ``"same"`` and ``"valid"``
    backend:   None for the first usable of cuda, triton, reference; see :func:`maskops.explain`
    returns:   as torch's conv2d, in the input's dtype; under autocast in autocast's
    gradients: input, weight, mask, noise and bias; twice differentiable
    errors:    ValueError for shapes and ranges, TypeError for dtypes, RuntimeError when a forced backend can't serve
    source:    AWM (Chai & Chen 2022), Eq. 4.1 and 4.3; published ``MaskedConv2d``

    >>> import torch
    >>> x, w, m = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)
    >>> masked_conv2d(x, w, m)
    tensor([[[[2.]]]])
    """
    layer, options = (weight, mask, noise, bias), (stride, padding, dilation, groups)
    return _convolve("masked_conv2d", 2, MaskedLayer, (input,), layer, options, backend)


def masked_conv2d_relu(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    noise: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A block in one pass: ``relu(scale * conv2d(input, weight * (mask + noise), bias) + shift + residual)``.

    scale, shift: (O,) any floating dtype, or None: a frozen batch norm is ``scale = γ/σ`` and ``shift = β - μγ/σ``
    residual:     of the output's shape, any floating dtype, or None
    gradients:    input, weight, mask, noise, bias and residual, none for scale and shift; of the output one bit per
                  element is kept
    all else:     as in :func:`masked_conv2d`, for batches of images

    >>> import torch
    >>> x, w, m = torch.ones(1, 1, 1, 1), torch.ones(2, 1, 1, 1), torch.tensor([0.5, 1.0]).view(2, 1, 1, 1)
    >>> masked_conv2d_relu(x, w, m, scale=torch.tensor([4.0, -1.0]), shift=torch.tensor([1.0, 0.5])).flatten()
    tensor([3., 0.])
    """
    op = "masked_conv2d_relu"
    geometry, uneven = _geometry(op, 2, weight, stride, padding, dilation, groups)
    if input.dim() != 4:
        raise ValueError(f"{op}: input must have 4 dimensions; got {shape(input)}")
    _check_sizes(op, 2, input, weight, geometry, uneven)
    check_layer(op, input, weight, mask, noise, bias, weight.shape[0])
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None and value.shape != weight.shape[:1]:
            raise ValueError(f"{op}: {name} must have shape ({weight.shape[0]},); got {shape(value)}")
        if value is not None:
            check_floating(op, name, value)
        if value is not None and value.device != input.device:
            raise ValueError(f"{op}: {name} must be on {input.device}; got {value.device}")
        if value is not None and value.requires_grad:
            raise ValueError(f"{op}: {name} must be frozen; got one that requires gradients")
    if any(uneven):
        input = F.pad(input, [0, uneven[1], 0, uneven[0]])
    stride, padding, dilation, _, _, groups = geometry
    _check_residual(op, residual, input, weight, stride, padding, dilation)
    options = (scale, shift, residual, (stride, padding, dilation, groups))
    return run_layer(MaskedConvReLU, (input,), weight, mask, noise, bias, *options, backend)


def _check_residual(op, residual, input, weight, stride, padding, dilation) -> None:
    if residual is None:
        return
    check_floating(op, "residual", residual)
    sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    output = [(size + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, gap in sizes]
    expected = (input.shape[0], weight.shape[0], *output)
    if residual.shape != expected:
        raise ValueError(f"{op}: residual must have the output's shape {expected}; got {shape(residual)}")
    if residual.device != input.device:
        raise ValueError(f"{op}: residual must be on the input's device {input.device}; got {residual.device}")


def masked_conv3d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``conv3d(input, weight * (mask + noise), bias)``: see :func:`masked_conv2d`, with three spatial dimensions.

    >>> import torch
    >>> masked_conv3d(torch.ones(1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 2), torch.tensor(0.5)).item()
    1.0
    """
    layer, options = (weight, mask, noise, bias), (stride, padding, dilation, groups)
    return _convolve("masked_conv3d", 3, MaskedLayer, (input,), layer, options, backend)


def masked_conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``conv_transpose2d(input, weight * (mask + noise), bias)``: see :func:`masked_conv2d`.

    weight: (C, O / groups, R, S), as torch keeps it; a neuron is then an index of the second dimension
    output_padding, and the order of the arguments: as in torch

    >>> import torch
    >>> masked_conv_transpose2d(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 2), torch.tensor([1.0, 0.5]))
    tensor([[[[1.0000, 0.5000]]]])
    """
    layer, options = (weight, mask, noise, bias), (stride, padding, dilation, groups, output_padding)
    return _convolve("masked_conv_transpose2d", 2, MaskedLayer, (input,), layer, options, backend)


def dual_masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    noise: Tensor | None = None,
    perturbed_input: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Both branches of a min-max loss in one pass: ``conv2d(x, m ⊙ θ)`` and ``conv2d(x', (m + δ) ⊙ θ)``.

    perturbed_input: x' of the input's shape and dtype; None for the input itself
    noise:           δ, broadcastable to weight; None for no noise
    returns:         (clean, perturbed), each as :func:`masked_conv2d` would return it
    gradients:       input, perturbed_input, weight, mask, noise and bias; a branch that isn't used costs none
    all else:        as in :func:`masked_conv2d`
    source:          AWM (Chai & Chen 2022), Eq. 4.1 (noise) and Eq. 4.3 (perturbed input)

    >>> import torch
    >>> x, w = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)
    >>> clean, perturbed = dual_masked_conv2d(x, w, torch.ones(1), noise=torch.tensor(0.5))
    >>> clean.item(), perturbed.item()
    (2.0, 3.0)
    """
    check_branches("dual_masked_conv2d", input, perturbed_input)
    layer, options = (weight, mask, noise, bias), (stride, padding, dilation, groups)
    return _convolve("dual_masked_conv2d", 2, DualMaskedLayer, (input, perturbed_input), layer, options, backend)


def _convolve(op, dims, function, inputs, layer, options, backend):
    """Checks, adds the batch dimension and what padding is not symmetric, and runs ``function``."""
    weight, mask, noise, bias = layer
    geometry, uneven = _geometry(op, dims, weight, *options)
    _check_sizes(op, dims, inputs[0], weight, geometry, uneven)
    check_layer(op, inputs[0], weight, mask, noise, bias, _out_channels(weight, geometry))
    if any(uneven):
        at_the_end = [extra for pad in reversed(uneven) for extra in (0, pad)]
        inputs = each(lambda input: F.pad(input, at_the_end), inputs)
    if inputs[0].dim() == dims + 2:
        return run_layer(function, inputs, weight, mask, noise, bias, "conv", geometry, backend)
    inputs = each(lambda input: input.unsqueeze(0), inputs)
    outputs = run_layer(function, inputs, weight, mask, noise, bias, "conv", geometry, backend)
    return outputs.squeeze(0) if isinstance(outputs, Tensor) else tuple(output.squeeze(0) for output in outputs)


def _out_channels(weight: Tensor, geometry: tuple) -> int:
    *_, transposed, _, groups = geometry
    return weight.shape[1] * groups if transposed else weight.shape[0]


def _geometry(op, dims, weight, stride, padding, dilation, groups, output_padding=None) -> tuple[tuple, Sequence[int]]:
    """The op's geometry, and by how much ``"same"`` pads more at the end than at the beginning of each dimension."""
    if weight.dim() != dims + 2:
        raise ValueError(f"{op}: weight must have {dims + 2} dimensions; got {shape(weight)}")
    if groups < 1:
        raise ValueError(f"{op}: groups must be at least 1; got {groups}")
    stride = expand(op, "stride", stride, dims, 1)
    dilation = expand(op, "dilation", dilation, dims, 1)
    transposed = output_padding is not None
    uneven = (0,) * dims
    if isinstance(padding, str) and not transposed:
        padding, uneven = _padding_from_name(op, weight, stride, padding, dilation)
    padding = expand(op, "padding", padding, dims, 0)
    output_padding = expand(op, "output_padding", output_padding or 0, dims, 0)
    if transposed and any(extra >= max(s, d) for extra, s, d in zip(output_padding, stride, dilation, strict=True)):
        raise ValueError(f"{op}: output_padding must be smaller than stride or dilation; got {output_padding}")
    return (stride, padding, dilation, transposed, output_padding, groups), uneven


def _padding_from_name(op, weight, stride, padding, dilation) -> tuple[Sequence[int], Sequence[int]]:
    if padding not in ("same", "valid"):
        raise ValueError(f"{op}: padding must be ints, 'same' or 'valid'; got {padding!r}")
    if padding == "valid":
        return (0,) * len(stride), (0,) * len(stride)
    if any(s != 1 for s in stride):
        raise ValueError(f"{op}: padding 'same' needs stride 1; got stride {stride}")
    total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    return [t // 2 for t in total], [t % 2 for t in total]


def _check_sizes(op, dims, input, weight, geometry, uneven) -> None:
    stride, padding, dilation, transposed, output_padding, groups = geometry
    if input.dim() not in (dims + 1, dims + 2):
        raise ValueError(
            f"{op}: input must have {dims + 2} dimensions, or {dims + 1} for one image; got {shape(input)}"
        )
    out, channels, *kernel = weight.shape
    if out % groups:
        raise ValueError(f"{op}: weight's first dimension must be divisible by groups {groups}; got {shape(weight)}")
    in_channels = out if transposed else channels * groups
    if input.shape[-dims - 1] != in_channels:
        raise ValueError(
            f"{op}: input must have {in_channels} channels for weight {shape(weight)} and groups {groups}; "
            f"got {shape(input)}"
        )
    if 0 in kernel:
        raise ValueError(f"{op}: weight must have a kernel of at least 1; got {shape(weight)}")
    for i, size in enumerate(input.shape[-dims:]):
        reach = dilation[i] * (kernel[i] - 1)
        if transposed:
            room = (size - 1) * stride[i] + reach + output_padding[i] - 2 * padding[i]
        else:
            room = size - 1 + 2 * padding[i] + uneven[i] - reach
        if room < 0:
            raise ValueError(
                f"{op}: padding {padding} and dilation {dilation} must leave an output; "
                f"got input {shape(input)} and weight {shape(weight)}"
            )
