"""How deep in a network each of some layers lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def depths(model: nn.Module, images: Tensor, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """name -> how many functions that read one of the weights lie on the longest path from the images through this one.

    The first has depth 1; layers side by side, such as the two ends of a residual block's branches, may have the same.
    One forward of the model shows it.
    """
    names = {id(weight): name for name, weight in weights.items()}
    with torch.no_grad(), _Depths(names) as mode:
        model(images)
    return mode.found


class _Depths(TorchFunctionMode):
    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.found: dict[str, int] = {}
        self._names = names
        self._depth: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no id is given twice

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read = _tensors((args, kwargs))
        depth = max((self._depth.get(id(tensor), 0) for tensor in read), default=0)
        for name in {self._names[id(tensor)] for tensor in read if id(tensor) in self._names}:
            depth += 1
            self.found[name] = max(depth, self.found.get(name, 0))
        for tensor in _tensors(result):
            if id(tensor) not in self._names:
                self._depth[id(tensor)] = max(depth, self._depth.get(id(tensor), 0))
                self._alive.append(tensor)
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
