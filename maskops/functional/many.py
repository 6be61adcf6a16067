"""Many masks over one weight: several purifications at once share the frozen model, each with a mask of its own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from maskops.backends import reference
from maskops.functional._autograd import _compute, _deal, _ops, run_layer
from maskops.functional._checks import broadcasts, check_layer, shape
from maskops.functional.conv import Size, _check_sizes, _geometry


def many_masked_conv2d(
    input: Tensor,
    weight: Tensor,
    masks: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """K convolutions over one weight: ``output[j] = conv2d(input[j], weight * (masks[j] + noise[j]), bias)``.

    Each is what :func:`masked_conv2d` computes; the kernels read a tile of the weight once for up to four masks.

    input:     (K, N, C, H, W), or (N, C, H, W): the same images for all masks; dtypes as in masked_conv2d
    weight:    (O, C / groups, R, S)
    masks:     (K, *m) with m of the weight's number of dimensions, broadcastable to it: (K, O, C / groups, R, S) per
               weight, (K, O, 1, 1, 1) per neuron; any floating dtype, or uint8 in steps of 1/255
    noise:     (K, *n) likewise, floating, or None
    bias:      (O,), shared by all masks, or None
    returns:   (K, N, O, P, Q); channels_last images stay channels_last in each ``[j]``
    gradients: input, weight, masks (of a floating dtype), noise and bias; those of what is shared are sums over the
               masks; twice differentiable
    all else:  as in :func:`masked_conv2d`

    >>> import torch
    >>> x, w = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)
    >>> many_masked_conv2d(x, w, torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1, 1)).flatten()
    tensor([0., 1., 2.])
    """
    op = "many_masked_conv2d"
    geometry, uneven = _geometry(op, 2, weight, stride, padding, dilation, groups)
    _check_many(op, input, weight, masks, noise, bias, "N, C, H, W")
    _check_sizes(op, 2, input if input.dim() == 4 else input[0], weight, geometry, uneven)
    if any(uneven):
        # as one batch, of which torch keeps the layout
        padded = F.pad(input.flatten(0, -4), [0, uneven[1], 0, uneven[0]])
        input = padded.unflatten(0, input.shape[:-3])
    stride, padding, dilation, _, _, groups = geometry
    return run_layer(
        ManyMaskedLayer, (input,), weight, masks, noise, bias, "conv", (stride, padding, dilation, groups), backend
    )


def many_masked_linear(
    input: Tensor,
    weight: Tensor,
    masks: Tensor,
    bias: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """K linear layers over one weight: ``output[j] = linear(input[j], weight * (masks[j] + noise[j]), bias)``.

    input:    (K, N, I), or (N, I): the same rows for all masks
    weight:   (O, I)
    masks:    (K, O, I) per weight, (K, O, 1) per neuron, or any (K, *m) with m broadcastable to weight
    returns:  (K, N, O)
    all else: as in :func:`many_masked_conv2d`

    >>> import torch
    >>> many_masked_linear(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[[1.0, 0.5]], [[0.5, 0.0]]])).flatten()
    tensor([1.5000, 0.5000])
    """
    op = "many_masked_linear"
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must have 2 dimensions; got {shape(weight)}")
    _check_many(op, input, weight, masks, noise, bias, "N, I")
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: input must end in {weight.shape[1]} features for weight {shape(weight)}; got {shape(input)}"
        )
    return run_layer(ManyMaskedLayer, (input,), weight, masks, noise, bias, "linear", (), backend)


def _check_many(op, input, weight, masks, noise, bias, sizes) -> None:
    for name, factor in (("masks", masks), ("noise", noise)):
        if factor is None:
            continue
        if factor.dim() != weight.dim() + 1 or not factor.shape[0] or not broadcasts(factor[0], weight):
            raise ValueError(
                f"{op}: {name} must have shape (K, *m), m of {weight.dim()} sizes that broadcast to weight "
                f"{shape(weight)}; got {shape(factor)}"
            )
    count = masks.shape[0]
    if noise is not None and noise.shape[0] != count:
        raise ValueError(f"{op}: noise must be that of {count} masks; got {shape(noise)}")
    check_layer(op, input, weight, masks[0], None if noise is None else noise[0], bias, weight.shape[0])
    if input.dim() != weight.dim() and (input.dim() != weight.dim() + 1 or input.shape[0] != count):
        raise ValueError(f"{op}: input must have shape ({count}, {sizes}) or ({sizes}); got {shape(input)}")


class ManyMaskedLayer(Function):
    """A masked convolution (kind ``"conv"``) or linear layer (``"linear"``) for each of K masks over one weight."""

    @staticmethod
    def formula(input, weight, masks, noise, bias, kind, geometry):
        return getattr(reference, f"many_masked_{kind}")(input, weight, masks, noise, bias, *geometry)

    @staticmethod
    def forward(ctx, input, weight, masks, noise, bias, kind, geometry, backend):
        ctx.kind, ctx.geometry, ctx.backend, ctx.input_size = kind, geometry, backend, input.shape
        need_factors = any(ctx.needs_input_grad[1:4])
        ctx.save_for_backward(input if need_factors else None, weight, masks, noise)
        return getattr(_ops, f"many_masked_{kind}")(input, weight, masks, noise, bias, *geometry, backend=backend)

    @staticmethod
    def backward(ctx, grad):
        input, weight, masks, noise = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        grads = _compute(
            f"many_masked_{ctx.kind}_backward",
            *(grad, input, weight, masks, noise, ctx.input_size, *ctx.geometry, needs),
            backend=ctx.backend,
        )
        return *_deal(grads, needs), None, None, None
