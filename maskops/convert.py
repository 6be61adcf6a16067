"""Any model maskable in place, and plain again."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter, is_lazy

from maskops import functional
from maskops.nn import CONVOLUTIONS, LINEAR, MASKED, NORMS, MaskedLayer

LAYERS = {"conv": CONVOLUTIONS, "linear": LINEAR, "norm": NORMS}


def mask_(
    model: nn.Module,
    granularity: str = "weight",
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    layers: str | Sequence[str] = "conv",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Make the layers of a model masked, in place, with masks of ones; return the model.

    Each chosen layer keeps its identity, parameters, hooks and name and becomes its masked sister: ``nn.Conv2d``
    becomes :class:`maskops.MaskedConv2d`. Outputs stay the same until a mask changes. No parameter's ``requires_grad``
    is touched: call ``model.requires_grad_(False)`` first to train the masks alone. Layers that share one weight share
    one mask. When anything is refused, nothing has been changed.

    A mask acts where its layer is called: code that reads a layer's weight by itself computes without the mask.

    Masks of bytes, for evaluation, take 1 byte for each entry instead of 4. They count in steps of 1/255: 0 and 1 are
    exact, all else that ``model.load_state_dict(masks, strict=False)`` brings is rounded to the nearest. They are
    buffers without gradients, which ``model.half()`` leaves as they are.

    Loading takes bytes for steps of 1/255 in masks of floats too: bytes of zeros and ones from elsewhere must be made
    floats first. Layers are loaded one after the other: where masks of bytes refuse a float outside of [0, 1], the
    layers before have been loaded.

    model:       any nn.Module, also one that is a layer itself
    granularity: ``"weight"``, ``"kernel"`` or ``"neuron"``; normalisation layers always have a value per channel
    include:     patterns (as in fnmatch) of layer names, the names of ``model.named_modules()``
    exclude:     patterns of names to leave out
    layers:      kinds of layers: ``"conv"`` (also transposed), ``"linear"``, ``"norm"`` (batch norm, layer norm)
    dtype:       None for masks that are parameters, torch.uint8 for masks of bytes
    errors:      ValueError for a pattern that fits no name, for a model in which nothing is left to mask, and, with the
                 names, for layers that can't be masked: masked already, parametrised, subclasses with their own code,
                 weights shared with a layer that isn't masked, layers of an nn.TransformerEncoderLayer, which in eval
                 mode calls none of them, unless torch.backends.mha.set_fastpath_enabled(False) forbids that;
                 TypeError for other dtypes

    >>> model = mask_(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3)), exclude="0")
    >>> [name for name, _ in model.named_parameters()]
    ['0.weight', '0.bias', '2.weight', '2.bias', '2.mask']
    """
    chosen = _choose(model, _as_tuple(include), _as_tuple(exclude), _as_tuple(layers))
    groups = _tied_groups(model, chosen)
    for layer in chosen.values():  # only to find out, before anything changes, whether every layer can be masked
        MASKED[type(layer)].from_module(layer, granularity, dtype)
    for layer in chosen.values():
        MASKED[type(layer)]._become_masked(layer, granularity, dtype)
    for first, *others in groups:
        for other in others:
            setattr(other, other.mask_name, getattr(first, first.mask_name))
    return model


def maskable(model: nn.Module) -> list[str]:
    """The names of all layers that :func:`mask_` could mask.

    >>> maskable(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.BatchNorm2d(1, affine=False)))
    ['0']
    """
    bypassed = _bypassed(model)
    candidates = ((name, module) for name, module in model.named_modules() if isinstance(module, tuple(MASKED)))
    return [name for name, module in candidates if _why_not(module, bypassed) is None]


def fold_(model: nn.Module) -> nn.Module:
    """Bake the masks into the weights, in place, and give back plain layers; return the model.

    The classes and state_dict keys are those from before :func:`mask_`; every folded weight is a new parameter equal to
    ``weight * mask``, so tensors shared with other models stay as they are. Of masks of bytes it is the product with
    what they were rounded to. Noise is the adversary's and is dropped.

    errors: ValueError for a model without masked layers, ValueError or TypeError, with the name, for one that can't be
            folded; nothing has been changed then

    >>> model = mask_(nn.Conv2d(1, 1, 1, bias=False))
    >>> _ = model.mask.data.fill_(0.5)
    >>> before = model(torch.ones(1, 1, 1, 1))
    >>> torch.equal(fold_(model)(torch.ones(1, 1, 1, 1)), before), type(model).__name__
    (True, 'Conv2d')
    """
    layers = masked_layers(model)
    if not layers:
        raise ValueError("fold_: expected a model with masked layers; got none")
    folded = {_tie(layer): _fold(name, layer) for name, layer in layers.items()}
    for layer in layers.values():
        weight = folded[_tie(layer)]
        layer._become_plain().weight = weight
    return model


def _tie(layer: MaskedLayer) -> tuple[int, int]:
    return id(layer.weight), id(getattr(layer, layer.mask_name))


@torch.no_grad()
def _fold(name: str, layer: MaskedLayer) -> Parameter:
    try:
        effective = functional.effective_weight(layer.weight, getattr(layer, layer.mask_name))
    except (TypeError, ValueError) as error:
        raise type(error)(f"fold_: {name or 'the model itself'}: {error}") from error
    return Parameter(effective, requires_grad=layer.weight.requires_grad)


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """The masked layers of a model by name.

    >>> list(masked_layers(mask_(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()))))
    ['0']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLayer)}


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a model by name, such as ``"conv1.mask"``; a shared mask once. Those of bytes are buffers.

    >>> list(masks(mask_(nn.Sequential(nn.Conv2d(1, 1, 1)))))
    ['0.mask']
    """
    kept = {id(getattr(layer, layer.mask_name)) for layer in masked_layers(model).values()}
    tensors = chain(model.named_parameters(), model.named_buffers())
    return {name: tensor for name, tensor in tensors if id(tensor) in kept}


def _as_tuple(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _choose(model, include, exclude, kinds) -> dict[str, nn.Module]:
    """The layers to mask by name; raises if one of them can't be masked."""
    if not kinds or any(kind not in LAYERS for kind in kinds):
        raise ValueError(f"mask_: layers must be among {', '.join(LAYERS)}; got {', '.join(kinds) or 'none'}")
    plain = tuple(masked.plain for kind in kinds for masked in LAYERS[kind])
    candidates = {name: module for name, module in model.named_modules() if isinstance(module, plain)}
    for pattern in (*include, *exclude):
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in candidates):
            raise ValueError(f"mask_: pattern {pattern!r} fits none of the model's {' or '.join(kinds)} layers")
    chosen = {
        name: module
        for name, module in candidates.items()
        if any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not chosen:
        raise ValueError(f"mask_: the model has no {' or '.join(kinds)} layer to mask")
    bypassed = _bypassed(model)
    refused = {name: reason for name, module in chosen.items() if (reason := _why_not(module, bypassed))}
    if refused:
        reasons = "; ".join(f"{name or 'the model itself'} {reason}" for name, reason in refused.items())
        raise ValueError(f"mask_: can't mask {reasons}. Leave them out with exclude=")
    return chosen


def _bypassed(model: nn.Module) -> list[nn.Module]:
    """The layers that are not called: a TransformerEncoderLayer in eval mode hands their weights to one fused op."""
    if not torch.backends.mha.get_fastpath_enabled():
        return []
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    return [layer for encoder in encoders for layer in encoder.modules()]


def _why_not(module: nn.Module, bypassed: list[nn.Module]) -> str | None:
    if isinstance(module, MaskedLayer):
        return "is masked already"
    if nn.utils.parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "is parametrised"
    if is_lazy(module.weight):
        return "has no shape before the model's first forward"
    if type(module) not in MASKED:
        return f"is a {type(module).__name__}, a subclass with code of its own"
    if module.weight is None:
        return "has no weight"
    if any(module is layer for layer in bypassed):
        return "is bypassed in eval mode, until torch.backends.mha.set_fastpath_enabled(False)"
    return None


def _tied_groups(model: nn.Module, chosen: dict[str, nn.Module]) -> list[list[nn.Module]]:
    """Chosen layers that share one weight, in groups; raises when a weight is also used where there will be no mask."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((name, module))
    groups = []
    for name, layer in chosen.items():
        tied = users[id(layer.weight)]
        for other_name, other in tied:
            if type(other) is not type(layer) or not any(other is candidate for candidate in chosen.values()):
                raise ValueError(f"mask_: {name} shares its weight with {other_name}, which would stay without a mask")
        if len(tied) > 1 and tied[0][1] is layer:
            groups.append([module for _, module in tied])
    return groups
