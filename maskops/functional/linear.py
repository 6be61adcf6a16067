"""Masked linear layers."""

from __future__ import annotations

from torch import Tensor

from maskops.functional._autograd import DualMaskedLayer, MaskedLayer, run_layer
from maskops.functional._checks import check_branches, check_layer, shape


def masked_linear(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear layer with a masked weight: ``linear(input, weight * mask, bias)``, or ``weight * (mask + noise)``.

    input:     (*, I) float64, float32, float16 or bfloat16; its dtype is the dtype of computation
    weight:    (O, I) of the input's dtype, or either 16-bit and the other float32
    mask:      broadcastable to weight: (O, I) per weight, (O, 1) per neuron; any floating dtype, or uint8 in steps of
               1/255, which then has no gradient
    noise:     broadcastable to weight, any floating dtype, or None
    bias:      (O,) or None; not masked; its dtype may differ from the input's as the weight's may
    backend:   None for the first usable of cuda, triton, reference; see :func:`maskops.explain`
    returns:   (*, O) in the input's dtype; under autocast in autocast's
    gradients: input, weight, mask, noise and bias, each at the cost of what it needs; twice differentiable
    errors:    ValueError for shapes, TypeError for dtypes, RuntimeError for a forced backend that can't serve
    source:    AWM (Chai & Chen 2022), Eq. 4.1 and 4.3, for a fully connected layer

    >>> import torch
    >>> masked_linear(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[1.0, 0.5]]))
    tensor([[1.5000]])
    """
    return _linear("masked_linear", MaskedLayer, (input,), weight, mask, noise, bias, backend)


def dual_masked_linear(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    perturbed_input: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Both branches of a min-max loss in one pass: ``linear(x, m ⊙ θ)`` and ``linear(x', (m + δ) ⊙ θ)``.

    perturbed_input: x' of the input's shape and dtype; None for the input itself
    noise:           δ, broadcastable to weight; None for no noise
    returns:         (clean, perturbed), each (*, O)
    gradients:       input, perturbed_input, weight, mask, noise and bias; a branch that isn't used costs none
    all else:        as in :func:`masked_linear`

    >>> import torch
    >>> clean, perturbed = dual_masked_linear(torch.ones(1), torch.ones(1, 1), torch.ones(1), noise=torch.tensor(0.5))
    >>> clean.item(), perturbed.item()
    (1.0, 1.5)
    """
    check_branches("dual_masked_linear", input, perturbed_input)
    return _linear("dual_masked_linear", DualMaskedLayer, (input, perturbed_input), weight, mask, noise, bias, backend)


def _linear(op, function, inputs, weight, mask, noise, bias, backend):
    input = inputs[0]
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must have 2 dimensions; got {shape(weight)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: input must end in {weight.shape[1]} features for weight {shape(weight)}; got {shape(input)}"
        )
    check_layer(op, input, weight, mask, noise, bias, weight.shape[0])
    return run_layer(function, inputs, weight, mask, noise, bias, "linear", (), backend)
