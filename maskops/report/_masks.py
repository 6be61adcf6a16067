"""What masks have become, in numbers: how their values are distributed, and what was cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

INTERVALS = 20


def layer_of(name: str) -> str:
    """
    >>> layer_of("features.0.mask"), layer_of("bn1.neuron_mask")
    ('features.0', 'bn1')
    """
    return name.removesuffix(".mask").removesuffix(".neuron_mask")


@dataclass(frozen=True)
class Distribution:
    """How many values of each mask fall into each of INTERVALS intervals of one width.

    edges:  of the intervals, from 0 to 1, or as far as the values go
    layers: name of the mask -> its shape, mean, least and most value, and ``counts``, one for each interval
    """

    edges: list[float]
    layers: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, masks: Mapping[str, Tensor]) -> Distribution:
        low = min(0.0, *(float(mask.min()) for mask in masks.values()))
        high = max(1.0, *(float(mask.max()) for mask in masks.values()))
        edges = np.linspace(low, high, INTERVALS + 1).tolist()
        # one after the other: 16-bit masks would be as large again
        return cls(edges, {name: _summary(mask.detach().float().cpu(), low, high) for name, mask in masks.items()})

    def shares(self) -> np.ndarray:
        """(layers, INTERVALS) percent of each layer's values."""
        counts = np.array([layer["counts"] for layer in self.layers.values()])
        return 100 * counts / counts.sum(1, keepdims=True)


def _summary(mask: Tensor, low: float, high: float) -> dict[str, Any]:
    # torch.histc counts in float32, which stops at 2^24
    counts = np.histogram(mask.flatten().numpy(), INTERVALS, (low, high))[0].tolist()
    mean, least, most = float(mask.mean(dtype=torch.float64)), float(mask.min()), float(mask.max())
    return {"shape": list(mask.shape), "mean": mean, "least": least, "most": most, "counts": counts}


def pruned(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> dict[str, Any]:
    """What masks of zeros and ones cut, and what the masks had been before: the largest cut, the smallest kept.

    >>> found = pruned({"a.mask": torch.tensor([0.0, 1.0])}, {"a.mask": torch.tensor([0.25, 0.5])})
    >>> found["layers"], found["largest_cut"], found["smallest_kept"]
    ({'a.mask': {'of': 2, 'count': 1, 'neurons': [0]}}, 0.25, 0.5)
    """
    layers, cut_scores, kept_scores = {}, [], []
    for name, mask in masks.items():
        cut, values = (mask == 0).flatten().cpu(), scores[name].flatten().float().cpu()
        layers[name] = {"of": cut.numel(), "count": int(cut.sum())}
        if cut.numel() == len(mask):  # one value for each neuron
            layers[name]["neurons"] = cut.nonzero().flatten().tolist()
        cut_scores += [values[cut].max().item()] if cut.any() else []
        kept_scores += [values[~cut].min().item()] if not cut.all() else []
    return {
        "layers": layers,
        "largest_cut": max(cut_scores, default=None),
        "smallest_kept": min(kept_scores, default=None),
    }


def lost(mask: Tensor, most: int) -> Tensor:
    """How much each channel lost: 1 minus the mean of its values, the rows of the mask. At most ``most`` numbers.

    Where there are more channels, a number stands for several of them, of which it is the largest: what single ones
    lost can still be seen.

    >>> lost(torch.tensor([1.0, 0.25, 1.0, 1.0]), most=2)
    tensor([0.7500, 0.0000])
    """
    of_each = 1 - mask.detach().float().cpu().reshape(len(mask), -1).mean(1)
    return of_each if len(of_each) <= most else F.adaptive_max_pool1d(of_each[None, None], most).flatten()
