"""Masked convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from maskops.functional._autograd import DualMaskedLayer, MaskedLayer, autocast_dtype, autocast_off, run
from maskops.functional._checks import check_branches, check_layer, expand, shape

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
    mask:      broadcastable to weight, any floating dtype: (O, C / groups, R, S) per weight, (O, C / groups, 1, 1) per
               kernel, (O, 1, 1, 1) per neuron; so noise, or None
    bias:      (O,) or None; not masked
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
    inputs = (input, input if perturbed_input is None else perturbed_input)
    layer, options = (weight, mask, noise, bias), (stride, padding, dilation, groups)
    return _convolve("dual_masked_conv2d", 2, DualMaskedLayer, inputs, layer, options, backend)


def _convolve(op, dims, function, inputs, layer, options, backend):
    """Checks, casts for autocast, adds the batch dimension and what padding is not symmetric, and runs ``function``."""
    weight, mask, noise, bias = layer
    geometry, extra_padding = _geometry(op, dims, weight, *options)
    dtype = autocast_dtype(inputs[0])
    batched = inputs[0].dim() == dims + 2

    def prepare(input: Tensor) -> Tensor:
        input = input if dtype is None else input.to(dtype)
        _check_sizes(op, dims, input, weight, geometry, extra_padding)
        input = input if batched else input.unsqueeze(0)
        return F.pad(input, extra_padding) if any(extra_padding) else input

    first, *others = inputs
    prepared = prepare(first)
    inputs = (prepared, *(prepared if other is first else prepare(other) for other in others))
    if dtype is not None and bias is not None:
        bias = bias.to(dtype)
    check_layer(op, inputs[0], weight, mask, noise, bias, _out_channels(weight, geometry))
    with autocast_off(inputs[0], dtype):
        outputs = run(function, *inputs, weight, mask, noise, bias, "conv", geometry, backend)
    if batched:
        return outputs
    return outputs.squeeze(0) if isinstance(outputs, Tensor) else tuple(output.squeeze(0) for output in outputs)


def _out_channels(weight: Tensor, geometry: tuple) -> int:
    *_, transposed, _, groups = geometry
    return weight.shape[1] * groups if transposed else weight.shape[0]


def _geometry(op, dims, weight, stride, padding, dilation, groups, output_padding=None) -> tuple[tuple, list[int]]:
    """The op's geometry, and what an uneven ``"same"`` adds at the end of each dimension, in F.pad's order."""
    if weight.dim() != dims + 2:
        raise ValueError(f"{op}: weight must have {dims + 2} dimensions; got {shape(weight)}")
    if groups < 1:
        raise ValueError(f"{op}: groups must be at least 1; got {groups}")
    stride = expand(op, "stride", stride, dims, 1)
    dilation = expand(op, "dilation", dilation, dims, 1)
    transposed = output_padding is not None
    extra_padding = [0] * 2 * dims
    if isinstance(padding, str):
        padding, extra_padding = _padding_from_name(op, weight, stride, padding, dilation)
    padding = expand(op, "padding", padding, dims, 0)
    output_padding = expand(op, "output_padding", output_padding or 0, dims, 0)
    if any(extra >= max(s, d) for extra, s, d in zip(output_padding, stride, dilation, strict=True)):
        raise ValueError(f"{op}: output_padding must be smaller than stride or dilation; got {output_padding}")
    return (stride, padding, dilation, transposed, output_padding, groups), extra_padding


def _padding_from_name(op, weight, stride, padding, dilation) -> tuple[tuple[int, ...], list[int]]:
    if padding not in ("same", "valid"):
        raise ValueError(f"{op}: padding must be ints, 'same' or 'valid'; got {padding!r}")
    if padding == "valid":
        return (0,) * len(stride), [0] * 2 * len(stride)
    if any(s != 1 for s in stride):
        raise ValueError(f"{op}: padding 'same' needs stride 1; got stride {stride}")
    total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    at_the_end = [extra for t in reversed(total) for extra in (0, t % 2)]
    return tuple(t // 2 for t in total), at_the_end


def _check_sizes(op, dims, input, weight, geometry, extra_padding) -> None:
    _, padding, dilation, transposed, _, groups = geometry
    if input.dim() not in (dims + 1, dims + 2):
        raise ValueError(
            f"{op}: input must have {dims + 2} dimensions, or {dims + 1} for one image; got {shape(input)}"
        )
    in_channels = weight.shape[0] if transposed else weight.shape[1] * groups
    if input.shape[-dims - 1] != in_channels:
        raise ValueError(
            f"{op}: input must have {in_channels} channels for weight {shape(weight)} and groups {groups}; "
            f"got {shape(input)}"
        )
    if weight.shape[0] % groups:
        raise ValueError(f"{op}: weight's first dimension must be divisible by groups {groups}; got {shape(weight)}")
    if 0 in weight.shape[2:]:
        raise ValueError(f"{op}: weight must have a kernel of at least 1; got {shape(weight)}")
    if transposed:
        return
    extra = extra_padding[::-2]
    for size, kernel, p, d, e in zip(input.shape[-dims:], weight.shape[2:], padding, dilation, extra, strict=True):
        if size + 2 * p + e < d * (kernel - 1) + 1:
            raise ValueError(
                f"{op}: kernel must fit into the padded input; got input {shape(input)}, padding {padding}, "
                f"dilation {dilation} and weight {shape(weight)}"
            )
