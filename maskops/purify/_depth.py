"""How deep in a network each of some layers lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def depths(model: Callable[[Tensor], Tensor], images: Tensor, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """name -> how many functions that read one of the weights lie on the longest path from the images through this one.

    The first has depth 1; layers side by side, such as the two ends of a residual block's branches, may have the same.
    A weight that is transformed before it meets the images is still that weight. One forward of the model shows it.
    """
    with torch.no_grad(), _Depths(images, weights) as mode:
        model(images)
    return mode.found


class _Depths(TorchFunctionMode):
    def __init__(self, images: Tensor, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.found: dict[str, int] = {}
        self._depth = {id(images): 0}  # of what was computed from the images
        self._names = {id(weight): {name} for name, weight in weights.items()}  # of what was from weights alone
        self._alive: list[Tensor] = []  # so that no id is given twice

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read = _tensors((args, kwargs))
        names = set().union(*(self._names.get(id(tensor), ()) for tensor in read))
        above = [self._depth[id(tensor)] for tensor in read if id(tensor) in self._depth]
        # what a function such as __setitem__ writes to, it doesn't return
        written = _tensors(result) or (read[:1] if func is Tensor.__setitem__ else [])
        if above:
            depth = max(above) + bool(names)
            self.found.update((name, max(depth, self.found.get(name, 0))) for name in names)
            for tensor in _with_bases(written):
                self._depth[id(tensor)] = max(depth, self._depth.get(id(tensor), 0))
        elif names:
            for tensor in written:
                self._names[id(tensor)] = self._names.get(id(tensor), set()) | names
        self._alive += written
        return result


def _with_bases(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, and those that they are views of: a write to a view is one to its base."""
    return tensors + [tensor._base for tensor in tensors if tensor._base is not None]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
