"""What masks have become, in numbers: how their values are distributed, and what was cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

INTERVALS = 20


def layer_of(name: str) -> str:
    """
    >>> layer_of("features.0.mask"), layer_of("bn1.neuron_mask")
    ('features.0', 'bn1')
    """
    return name.removesuffix(".mask").removesuffix(".neuron_mask")


def transposed_groups(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, int]:
    """The groups of the layers that are transposed convolutions, by the names of their masks.

    Their masks are (in, out / groups, …), where those of other layers are (out, …).

    >>> transposed_groups(nn.Sequential(nn.ConvTranspose2d(4, 8, 3)), {"0.mask": torch.ones(1, 8, 1, 1)})
    {'0.mask': 1}
    """
    modules, kinds = dict(model.named_modules()), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    layers = {name: modules.get(layer_of(name)) for name in masks}
    return {name: layer.groups for name, layer in layers.items() if isinstance(layer, kinds)}


def channels(shape: Sequence[int], groups: int | None = None) -> int:
    """How many output channels the layer of a mask has; ``groups``: of a transposed convolution.

    >>> channels((8, 4, 3, 3)), channels((4, 8, 3, 3), groups=1), channels((4, 4, 3, 3), groups=2)
    (8, 8, 8)
    """
    return shape[0] if groups is None else shape[1] * groups


@dataclass(frozen=True)
class Distribution:
    """How many values of each mask fall into each of INTERVALS intervals of one width.

    edges:  of the intervals, from 0 to 1, or as far as the values go
    layers: name of the mask -> its shape, mean, least and most value, and ``counts``, one for each interval; of a
            transposed convolution also ``transposed_groups``
    """

    edges: list[float]
    layers: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, masks: Mapping[str, Tensor], transposed: Mapping[str, int]) -> Distribution:
        """``transposed``: what :func:`transposed_groups` found."""
        low = min(0.0, *(float(mask.min()) for mask in masks.values()))
        high = max(1.0, *(float(mask.max()) for mask in masks.values()))
        edges = np.linspace(low, high, INTERVALS + 1).tolist()
        # one after the other: 16-bit masks would be as large again
        layers = {name: _summary(mask.detach().float().cpu(), low, high) for name, mask in masks.items()}
        for name, groups in transposed.items():
            layers[name]["transposed_groups"] = groups
        return cls(edges, layers)

    def shares(self) -> np.ndarray:
        """(layers, INTERVALS) percent of each layer's values."""
        counts = np.array([layer["counts"] for layer in self.layers.values()])
        return 100 * counts / counts.sum(1, keepdims=True)


def _summary(mask: Tensor, low: float, high: float) -> dict[str, Any]:
    # torch.histc counts in float32, which stops at 2^24
    counts = np.histogram(mask.flatten().numpy(), INTERVALS, (low, high))[0].tolist()
    mean, least, most = float(mask.mean(dtype=torch.float64)), float(mask.min()), float(mask.max())
    return {"shape": list(mask.shape), "mean": mean, "least": least, "most": most, "counts": counts}


def pruned(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], transposed: Mapping[str, int]) -> dict[str, Any]:
    """What masks of zeros and ones cut, and what the masks had been before: the largest cut, the smallest kept.

    >>> found = pruned({"a.mask": torch.tensor([0.0, 1.0])}, {"a.mask": torch.tensor([0.25, 0.5])}, {})
    >>> found["layers"], found["largest_cut"], found["smallest_kept"]
    ({'a.mask': {'of': 2, 'count': 1, 'neurons': [0]}}, 0.25, 0.5)
    """
    layers, cut_scores, kept_scores = {}, [], []
    for name, mask in masks.items():
        cut, values = (mask == 0).flatten().cpu(), scores[name].flatten().float().cpu()
        layers[name] = {"of": cut.numel(), "count": int(cut.sum())}
        if cut.numel() == channels(mask.shape, transposed.get(name)):  # one value for each neuron
            layers[name]["neurons"] = cut.nonzero().flatten().tolist()
        cut_scores += [values[cut].max().item()] if cut.any() else []
        kept_scores += [values[~cut].min().item()] if not cut.all() else []
    return {
        "layers": layers,
        "largest_cut": max(cut_scores, default=None),
        "smallest_kept": min(kept_scores, default=None),
    }


def lost(mask: Tensor, most: int, groups: int | None = None) -> Tensor:
    """How much each output channel lost: 1 minus the mean of its values. At most ``most`` numbers.

    Where there are more channels, a number stands for several of them, of which it is the largest: what single ones
    lost can still be seen. ``groups``: of a transposed convolution.

    >>> lost(torch.tensor([1.0, 0.25, 1.0, 1.0]), most=2)
    tensor([0.7500, 0.0000])
    """
    values = mask.detach().float().cpu()
    if groups is not None:
        values = values.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    of_each = 1 - values.reshape(len(values), -1).mean(1)
    return of_each if len(of_each) <= most else F.adaptive_max_pool1d(of_each[None, None], most).flatten()
