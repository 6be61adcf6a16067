"""Bytes of tensors without data, as they come and go."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from maskops._memory import on_host_now


@contextmanager
def garbage_of_its_own() -> Iterator[None]:
    """Within, what is there before isn't looked through whenever a meter collects garbage."""
    gc.collect()
    froze = gc.get_freeze_count() == 0  # else somebody has, for reasons of theirs
    if froze:
        gc.freeze()
    try:
        yield
    finally:
        if froze:
            gc.unfreeze()


class Meter(TorchDispatchMode):
    """Counts within: :attr:`peak` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._total = self.peak = 0

    def begin(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now()

    def now(self) -> int:
        gc.collect()
        self._forget_dead()
        return self._total

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, FakeTensor):
                self._note(tensor)
        if self._total > self.peak:  # who is dead is looked for only where it may matter
            self._forget_dead()
            self.peak = max(self.peak, self._total)
        return result

    def _note(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        known, size = self._alive.get(storage._cdata, (None, 0))
        if known is None or known.expired():
            length = 0 if on_host_now() else storage.nbytes()
            self._alive[storage._cdata] = StorageWeakRef(storage), length
            self._total += length - size

    def _forget_dead(self) -> None:
        expired = torch.UntypedStorage._expired  # what StorageWeakRef asks, through two more calls
        for key in [key for key, (storage, _) in self._alive.items() if expired(storage.cdata)]:
            self._total -= self._alive.pop(key)[1]
