"""Weights that are made before each use, for forwards that autograd runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from maskops.arena import MaskArena


class AtHand(TorchFunctionMode):
    """Within, every function of torch that reads effective weights of an arena finds them made, and so does its
    backward, also when that comes after the context.

    A function's own backward must be all that reads what it saves, as it is for torch's.
    """

    def __init__(self, arena: MaskArena) -> None:
        super().__init__()
        self._arena = arena
        self._read: list[Tensor] = []
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> AtHand:
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        read = [leaf for leaf in leaves if isinstance(leaf, Tensor) and self._arena.is_effective(leaf)]
        if not read:
            return func(*args, **kwargs)
        self._arena.make(read)
        self._read = read
        # what is a view of a weight may be read when others lie there
        return tree_map_only(Tensor, self._lasting, func(*args, **kwargs))

    def _lasting(self, tensor: Tensor) -> Tensor:
        return tensor.clone() if self._arena.lends(tensor) else tensor

    def _pack(self, tensor: Tensor) -> Tensor | tuple[list[Tensor], Tensor]:
        return (self._read, tensor.detach()) if self._arena.lends(tensor) else tensor

    def _unpack(self, packed: Tensor | tuple[list[Tensor], Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        read, tensor = packed
        self._arena.make(read)
        return tensor
