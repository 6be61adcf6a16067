"""CUDA graphs without a GPU: every op of a step is recorded with its tensors, and run again on them by a replay.

As on a GPU, recording changes nothing: what the ops wrote, and what they drew, is put back at its end. As on a GPU, a
step is refused that waits for a number or copies one from the host. What it does beside ops, such as counting in
Python, happens while recording and never again, which is what tests with this are there to find.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2"}
"""Ops whose result the host needs."""


class EmulatedGraph(TorchDispatchMode):
    def __init__(self, step: Callable[[], object], generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self._ops: list[tuple] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._generators = [torch.default_generator, *generators]
        states = [generator.get_state() for generator in self._generators]
        try:
            with self:
                step()
        finally:
            for written, value in self._before.values():
                written.copy_(value)
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)
        self._before.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in WAITS or (name == "_to_copy" and _crosses(args[0], kwargs)):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        generator = kwargs.get("generator")
        if generator is not None and generator.initial_seed() not in [g.initial_seed() for g in self._generators]:
            raise RuntimeError(f"{name} draws from a generator that isn't registered with the graph")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            # which its schema doesn't say
            if written or (name == "native_batch_norm" and argument.name.startswith("running_")):
                for tensor in tree_leaves(value):
                    if isinstance(tensor, Tensor):
                        self._keep(tensor)
        result = func(*args, **kwargs)
        self._ops.append((func, args, kwargs, result))
        return result

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._before:
            whole = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            self._before[storage.data_ptr()] = whole, whole.clone()

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self._ops:
            writes = [argument.alias_info is not None for argument in func._schema.returns]
            again = func(*args, **kwargs)
            if any(writes):
                continue  # a view, or what an argument became
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


def _crosses(tensor: Tensor, kwargs: dict) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type != tensor.device.type


def record(step, stream, pool, generators) -> EmulatedGraph:
    """In place of :func:`maskops.purify._graphs.record`."""
    return EmulatedGraph(step, generators)
