"""From learned masks to pruned neurons: which are cut, and the model without them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from maskops.convert import LAYERS, fold_, mask_, masked_layers, masks
from maskops.nn import GRANULARITIES

THRESHOLDS = tuple(step / 20 for step in range(20))
"""0, 0.05, …, 0.95: those that the published codes of ANP and RNP try."""


def kept(
    scores: Mapping[str, Tensor],
    *,
    threshold: float | None = None,
    number: int | None = None,
    fraction: float | None = None,
) -> dict[str, Tensor]:
    """Masks of ones, with zeros for the neurons that are pruned.

    threshold: prune every score at most this
    number:    prune that many of the smallest scores over all layers; among equals the first
    fraction:  prune ``round(fraction * scores)`` of them

    errors: ValueError unless exactly one of the three is given, and for a number of neurons that aren't there

    >>> kept({"a": torch.tensor([0.1, 1.0]), "b": torch.tensor([0.2])}, threshold=0.2)
    {'a': tensor([0., 1.]), 'b': tensor([0.])}
    """
    given = {"threshold": threshold, "number": number, "fraction": fraction}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"prune: exactly one of threshold, number and fraction must be given; got {given}")
    if threshold is not None:
        return {name: (score > threshold).to(score.dtype) for name, score in scores.items()}
    flat = torch.cat([score.flatten() for score in scores.values()])
    number = round(fraction * len(flat)) if number is None else number
    if not 0 <= number <= len(flat):
        raise ValueError(f"prune: expected a number of neurons from 0 to {len(flat)}; got {number}")
    flags = torch.ones_like(flat)
    flags[flat.argsort(stable=True)[:number]] = 0
    pieces = flags.split([score.numel() for score in scores.values()])
    return {name: piece.view_as(score) for (name, score), piece in zip(scores.items(), pieces, strict=True)}


def prune(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    *,
    threshold: float | None = None,
    number: int | None = None,
    fraction: float | None = None,
) -> nn.Module:
    """A copy of the original model without the neurons of the smallest scores; the biases stay.

    model:   what was purified, with its original weights; it isn't changed
    scores:  ``scores`` of a :class:`Purification` of that model; bytes are steps of 1/255
    threshold, number, fraction: which neurons to prune: every score at most the threshold, that many of the smallest
             over all layers, or that fraction
    errors:  ValueError for scores that aren't of the model's masks, and unless exactly one of the three is given

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    >>> prune(model, {"1.mask": torch.tensor([[0.1], [0.9]])}, number=1)[1].weight.any(1)
    tensor([False,  True])
    """
    values = kept(_floating(scores), threshold=threshold, number=number, fraction=fraction)
    return apply_masks(model, values)


def apply_masks(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a plain model with masks, by names such as ``"conv1.mask"``, folded into its weights.

    values: floats, or bytes in steps of 1/255
    errors: ValueError for names and shapes that are none of the model's masks
    """
    values = _floating(values)
    masked = copy.deepcopy(model)
    layers = dict(masked.named_modules())
    weights = [getattr(layers.get(name.rpartition(".")[0]), "weight", None) for name in values]
    # a weight that several layers share has one mask
    ties = {id(weight) for weight in weights if weight is not None}
    names = [name for name, layer in layers.items() if id(getattr(layer, "weight", None)) in ties]
    if names:
        mask_(masked, include=names, layers=tuple(LAYERS))
    if not names or set(masks(masked)) != set(values):
        raise ValueError(f"prune: expected scores of masks of the model; got {', '.join(values) or 'none'}")
    parameters = {id(weight): Parameter(values[name].to(weight)) for name, weight in zip(values, weights, strict=True)}
    for name, layer in masked_layers(masked).items():
        mask, shapes = parameters[id(layer.weight)], {layer._mask_shape(granularity) for granularity in GRANULARITIES}
        if tuple(mask.shape) not in shapes:
            raise ValueError(f"prune: scores of {name} must have one of the shapes {shapes}; got {tuple(mask.shape)}")
        setattr(layer, layer.mask_name, mask)
    return fold_(masked)


def _floating(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() / 255 if value.dtype == torch.uint8 else value for name, value in values.items()}


def threshold_within(
    budget: float, scores: Mapping[str, Tensor], hits: Callable[[Mapping[str, Tensor]], int], count: int
) -> float:
    """The last of THRESHOLDS before pruning costs more than ``budget`` of the accuracy on held-out clean images.

    hits:    how many of them a model with such masks classifies rightly
    count:   how many they are
    returns: -1, which prunes nothing, where even the smallest threshold costs more

    No trigger is needed to choose it.
    """
    # an allowance of 0.05 of 100 images is 5 of them, whatever the rounding of 0.05
    allowed = math.floor(budget * count + 1e-6)
    chosen, least = -1.0, hits(kept(scores, threshold=-1)) - allowed
    for threshold in THRESHOLDS:
        if hits(kept(scores, threshold=threshold)) < least:
            break
        chosen = threshold
    return chosen
