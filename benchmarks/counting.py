"""What a step asks of a machine, counted without timing it: launches, bytes, floating-point operations, peak memory.

Counted are the ops that the dispatcher sees, the backward's among them, on whatever device the step runs. An op of
``maskops`` counts as one, whatever its reference does on a CPU: on a GPU it is a kernel. What ``torch.compile`` fuses,
or a CUDA graph replays, can't be seen this way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from maskops.backends import reference

NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "is_same_size"}
NO_KERNEL |= {"_local_scalar_dense"}
"""Ops that start nothing, beside the views. Reading a number is a wait; an optimiser's step count lies on the CPU."""


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _convolution_backward(
    grad: Tensor, input: Tensor, weight: Tensor, _bias: Any, _stride: Any, _pad: Any, _dilation: Any, transposed: bool,
    _output_padding: Any, _groups: int, wanted: list[bool], **_: Any,
) -> int:  # fmt: skip
    """Each gradient takes what the convolution does; torch's own formula forgets the groups of a weight's."""
    return (wanted[0] + wanted[1]) * conv_flop_count(input.shape, weight.shape, grad.shape, transposed)


FORMULAS = {
    **{op: formula for op, formula in flop_registry.items() if isinstance(op, torch._ops.OpOverloadPacket)},
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""torch's own, and those that it lacks or gets wrong."""


@dataclass(frozen=True)
class Record:
    """One op; one without a name starts nothing and is there for the memory that changed hands.

    bytes:     of all its inputs and outputs, once each, as from a cold cache; what is written in place counts twice
    allocated: bytes of each new storage, which have the next numbers
    freed:     the numbers of storages that were gone before this op
    """

    op: str
    flops: int
    bytes: int
    allocated: tuple[int, ...]
    freed: tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """The ops of a step in their order."""

    records: tuple[Record, ...]

    @property
    def ops(self) -> int:
        """Launches' worth: at least so many kernels run where nothing is fused."""
        return sum(bool(record.op) for record in self.records)

    @property
    def flops(self) -> int:
        """Of matrix products, convolutions and attention, two for a multiplication and an addition."""
        return sum(record.flops for record in self.records)

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.records)

    @property
    def peak(self) -> int:
        """Most bytes of tensors at one time that weren't there before the step; no op's workspace is among them."""
        sizes: list[int] = []
        now = peak = 0
        for record in self.records:
            now -= sum(sizes[number] for number in record.freed)
            sizes += record.allocated
            now += sum(record.allocated)
            peak = max(peak, now)
        return peak

    @property
    def by_op(self) -> Counter[str]:
        return Counter(record.op for record in self.records if record.op)

    def __add__(self, other: Counts) -> Counts:
        """Both, one after the other, of which nothing is alive at the same time."""
        count = sum(len(record.allocated) for record in self.records)
        shifted = (
            Record(record.op, record.flops, record.bytes, record.allocated, tuple(count + n for n in record.freed))
            for record in other.records
        )
        gone = set(chain.from_iterable(record.freed for record in self.records))
        end = Record("", 0, 0, (), tuple(number for number in range(count) if number not in gone))
        return Counts((*self.records, end, *shifted))


def count(step: Callable[[], Any]) -> Counts:
    """Run the step once and count.

    >>> x = torch.ones(4, 8, requires_grad=True)
    >>> counts = count(lambda: (x @ torch.ones(8, 2)).sum().backward())
    >>> counts.by_op["aten.mm"], counts.flops
    (2, 256)
    """
    with _Counter() as counter:
        step()
    return Counts(tuple(counter.records))


def scaled(small: Counts, large: Counts, small_batch: int, large_batch: int, batch: int) -> Counts:
    """What a step on ``batch`` images takes, exactly, from what it takes on two other numbers of images.

    Every size is so much for the network and so much for each image, or the two don't run the same ops.

    errors: ValueError when the two steps aren't the same ops on sizes of this kind
    """
    if [record.op for record in small.records] != [record.op for record in large.records]:
        raise ValueError(f"scaled: expected the same ops; got {small.ops} and {large.ops}, or in another order")

    def line(one: int, other: int) -> int:
        growth, rest = divmod((other - one) * (batch - small_batch), large_batch - small_batch)
        if rest:
            raise ValueError(f"scaled: {one} for {small_batch} images and {other} for {large_batch} are on no line")
        return one + growth

    return Counts(
        tuple(
            Record(
                one.op,
                line(one.flops, other.flops),
                line(one.bytes, other.bytes),
                tuple(line(*sizes) for sizes in zip(one.allocated, other.allocated, strict=True)),
                one.freed,
            )
            for one, other in zip(small.records, large.records, strict=True)
        )
    )


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[Record] = []
        self._known: dict[int, StorageWeakRef] = {}
        self._new: dict[int, StorageWeakRef] = {}
        self._allocated = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":  # what a tensor without memory is asked for
            return func(*args, **kwargs)
        inputs = list(_tensors((args, kwargs)))
        for tensor in inputs:
            self._note(tensor)
        freed = self._freed()
        flops = _flops_of_ours(func, args) if func.namespace == "maskops" else 0
        result = func(*args, **kwargs)
        if func.is_view or func.namespace == "profiler" or func.overloadpacket.__name__ in NO_KERNEL:
            self._remember("", 0, 0, result, freed)
            return result
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
        outputs = list(_tensors(result))
        outputs += [tensor for tensor in _written(func, args, kwargs) if not any(tensor is out for out in outputs)]
        moved = sum(_bytes(tensor) for tensor in (*inputs, *outputs))
        self._remember(str(func.overloadpacket), int(flops), moved, result, freed)
        return result

    def _remember(self, op: str, flops: int, moved: int, result: Any, freed: tuple[int, ...]) -> None:
        allocated = self._allocate(result)
        if op or allocated or freed:
            self.records.append(Record(op, flops, moved, allocated, freed))

    def _note(self, tensor: Tensor) -> None:
        """A storage that no op of the step has made was there before."""
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is None or known.expired():
            self._known[storage._cdata] = StorageWeakRef(storage)

    def _allocate(self, result: Any) -> tuple[int, ...]:
        sizes = []
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            known = self._known.get(storage._cdata)
            if known is None or known.expired():
                self._known[storage._cdata] = self._new[self._allocated] = StorageWeakRef(storage)
                self._allocated += 1
                sizes.append(storage.nbytes())
        return tuple(sizes)

    def _freed(self) -> tuple[int, ...]:
        expired = torch.UntypedStorage._expired  # what StorageWeakRef asks, through two more calls
        gone = tuple(number for number, storage in self._new.items() if expired(storage.cdata))
        for number in gone:
            del self._new[number]
        return gone


_FLOPS_OF_OURS: dict[tuple[str, str], int] = {}


def _flops_of_ours(func: Any, args: tuple) -> int:
    """What the reference of an op of ours takes on tensors of these shapes."""
    name = func.overloadpacket.__name__
    key = name, repr(tree_map_only(Tensor, lambda tensor: (tuple(tensor.shape), tensor.stride(), tensor.dtype), args))
    if key not in _FLOPS_OF_OURS:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, _Flops() as inner:
            getattr(reference, name)(*tree_map_only(Tensor, mode.from_tensor, args))
        _FLOPS_OF_OURS[key] = inner.flops
    return _FLOPS_OF_OURS[key]


class _Flops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = FORMULAS.get(func.overloadpacket)
        self.flops += int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0
        return result


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The arguments that an op writes to."""
    arguments = func._schema.arguments
    for index, argument in enumerate(arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[index] if index < len(args) else kwargs.get(argument.name))


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    """Bytes that a kernel reads or writes; an expanded tensor has fewer than elements."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
