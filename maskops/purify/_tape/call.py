"""One forward of a tape and its backward: values, what is kept of them, and gradients as they come together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

_PENDING_BYTES = 64 * 2**20
"""So many bytes of gradients of weights wait to be added in one launch."""

Geometry = tuple[list[int], list[int], list[int], int]
"""Stride, padding, dilation and groups of a convolution."""


class Remade(Protocol):
    """Parameters that share memory, so that they are made anew before each use."""

    def make(self, tensors: Iterable[Tensor]) -> None:
        """Make those that are among these tensors, of a step, a function or its backward; others may then be gone."""

    def lends(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory that they share."""


class Slot(NamedTuple):
    """Where a parameter is found: it may be replaced from one call to the next."""

    owner: nn.Module
    name: str

    def get(self) -> Tensor | None:
        return getattr(self.owner, self.name)


class CallPlan(NamedTuple):
    """What one kind of call keeps and computes, by which tensors require gradients.

    needs:   for each value, whether its gradient is needed
    kept:    for each value, whether a layer keeps it for the gradient of its weight
    learned: for each slot, whether its parameter requires a gradient
    shared:  what all images contain requires a gradient
    early:   ... and gets it as the sum over the batch before the first convolution's backward
    """

    needs: list[bool]
    kept: list[bool]
    learned: list[bool]
    shared: bool
    early: bool


class Gate(NamedTuple):
    """Where a ReLU lets the gradient of its output pass: this output itself, or bits in its memory order."""

    gate: Tensor
    upper: float


class Layout(NamedTuple):
    """How a value lies in memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    contiguous: bool
    channels_last: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.is_contiguous(), channels_last)

    def lay_out(self, grad: Tensor) -> Tensor:
        if grad.dtype == self.dtype and grad.stride() == self.stride:
            return grad
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=grad.device).copy_(grad)


class Call:
    """The state of one call.

    segments:   the :class:`Segment`s that it runs one after the other
    parameters: the tape's parameters as they now are, by slot; ``None`` for a bias that isn't there
    readers:    for each value, by how many steps it is read
    remade:     those of the parameters that are made before each use; None for none
    """

    def __init__(
        self,
        plan: CallPlan,
        segments: Sequence[Any],
        parameters: Sequence[Tensor | None],
        casts: Casts,
        readers: Sequence[int],
        bits: bool,
        remade: Remade | None = None,
    ) -> None:
        self.plan, self.segments, self.parameters, self.bits = plan, segments, parameters, bits
        self._remade = remade
        self._casts = casts
        self.values: list = [None] * len(readers)
        self.saved: dict[int, tuple] = {}
        self.inputs: dict[int, list[Tensor]] = {}
        """Of each segment that is run anew for its backward: the values from before it."""
        self.shared_grad: Tensor | None = None
        self._gates: dict[int, Gate] = {}
        self._layouts: dict[int, Layout] = {}
        self._left = list(readers)
        self._grads: list[Tensor | None] = [None] * len(readers)
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        self._pending_bytes = 0
        self._take: Callable[[Parameter, Tensor], None] | None = None
        self._uses: Counter[int] = Counter()
        self._complete: dict[int, Tensor] = {}

    def make(self, slots: Iterable[int]) -> None:
        """Before a step with these slots, and again before its backward."""
        if self._remade is not None:
            present = (self.parameters[slot] for slot in slots)
            self._remade.make([parameter for parameter in present if parameter is not None])

    def lasting(self, tensor: Tensor) -> Tensor:
        """A value in memory that others don't overwrite."""
        return tensor.clone() if self._remade is not None and self._remade.lends(tensor) else tensor

    # forward

    @contextmanager
    def planned(self, plan: CallPlan) -> Iterator[None]:
        """Within, steps keep and compute what another plan says."""
        mine, self.plan = self.plan, plan
        yield
        self.plan = mine

    def cast(self, value: Tensor) -> Tensor:
        """A value in the dtype that layers compute in."""
        dtype = self._casts.dtype
        return value if dtype is None or value.dtype == dtype else value.to(dtype)

    def parameter(self, slot: int | None) -> Tensor | None:
        """A parameter in the dtype that layers compute in."""
        if slot is None or self.parameters[slot] is None:
            return None
        return self._casts.of(slot, self.parameters[slot])

    def put(self, value: int, tensor: Tensor) -> None:
        """The output of a native step."""
        self.values[value] = tensor
        if self.plan.needs[value]:
            self._layouts[value] = Layout.of(tensor)

    def put_gated(self, value: int, tensor: Tensor, upper: float, gate: Tensor | None = None) -> None:
        """The output of a ReLU; the gate is the output itself if no other is given."""
        self.put(value, tensor)
        if self.plan.needs[value]:
            self._gates[value] = Gate(tensor if gate is None else gate, upper)

    def wants_bits(self, value: int) -> bool:
        """Whether the ReLU that makes a value should leave bits rather than the output."""
        return self.bits and self.plan.needs[value] and not self.plan.kept[value]

    # backward

    def take(self, value: int) -> Tensor | None:
        """The complete gradient of a native step's output, past its ReLU and in its layout."""
        grad, self._grads[value] = self._grads[value], None
        gate = self._gates.pop(value, None)
        layout = self._layouts.pop(value, None)
        if grad is None:
            return None
        grad = grad if layout is None else layout.lay_out(grad)
        return grad if gate is None else torch.ops.maskops.relu_backward(grad, gate.gate, None, gate.upper)

    def deliver(self, value: int, grad: Tensor | None) -> None:
        """What one reader adds to a value's gradient."""
        self._left[value] -= 1
        if grad is None or not self.plan.needs[value]:
            return
        so_far = self._grads[value]
        if so_far is None:
            self._grads[value] = grad
        elif self._left[value] == 0 and value in self._gates:
            layout, gate = self._layouts[value], self._gates.pop(value)
            grad, so_far = layout.lay_out(grad), layout.lay_out(so_far)
            self._grads[value] = torch.ops.maskops.relu_backward(grad, gate.gate, so_far, gate.upper)
        else:
            self._grads[value] = so_far + grad

    def deliver_from_conv(
        self, value: int, grad: Tensor, weight: Tensor, size: Sequence[int], geometry: Geometry
    ) -> None:
        """What a convolution adds, with the gradient so far and, if it is complete then, the ReLU's gate in one op."""
        layout = self._layouts.get(value)
        together = layout is not None and layout.dtype == grad.dtype and _same_order(layout, grad)
        gate = addend = None
        if together:
            so_far, self._grads[value] = self._grads[value], None
            addend = None if so_far is None else layout.lay_out(so_far)
            gate = self._gates.pop(value, None) if self._left[value] == 1 else None
        upper = float("inf") if gate is None else gate.upper
        gate = None if gate is None else gate.gate
        self.deliver(value, torch.ops.maskops.conv_input_grad(grad, weight, gate, addend, size, *geometry, upper))

    def expect(self, take: Callable[[Parameter, Tensor], None], slots: Iterable[int]) -> None:
        """Hand gradients over instead of adding them to the parameters' own.

        slots: those of every step that has a backward
        """
        self._take = take
        self._uses = Counter(id(self.parameters[slot]) for slot in slots if self.plan.learned[slot])

    def hand_over(self, slots: Iterable[int]) -> None:
        """After the backward of a step with these slots."""
        if self._take is None:
            return
        for slot in slots:
            parameter = self.parameters[slot]
            self._uses[id(parameter)] -= 1
            if self._uses[id(parameter)] == 0:
                grad = self._complete.pop(id(parameter), None)
                # of a parameter that the loss doesn't depend on too: a step is more than its gradient
                self._take(parameter, torch.zeros_like(parameter) if grad is None else grad)

    def add_to_parameter(self, slot: int, grad: Tensor) -> None:
        """Add to a parameter's gradient: at once, or later and with others."""
        parameter = self.parameters[slot]
        if self._take is not None:
            so_far = self._complete.get(id(parameter))
            self._complete[id(parameter)] = grad if so_far is None else so_far + grad
            return
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(grad)
            return
        grad = grad.to(parameter.grad.dtype)
        if id(parameter) in self._pending:
            grad = grad + self._pending.pop(id(parameter))[1]
        self._pending[id(parameter)] = parameter.grad, grad
        self._pending_bytes += grad.nbytes
        # where memory counts rather than launches, none waits: it is added while it is in the cache
        if self.bits or self._pending_bytes > _PENDING_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            totals, grads = zip(*self._pending.values(), strict=True)
            torch._foreach_add_(totals, grads)
        self._pending.clear()
        self._pending_bytes = 0


class Casts:
    """Parameters in the dtype that layers compute in; those that never change are cast once.

    dtype:    None for the parameters' own
    changing: the parameters whose values change between calls
    """

    def __init__(self, dtype: torch.dtype | None, changing: Sequence[Parameter] = ()) -> None:
        self.dtype = dtype
        self._changing = {id(parameter) for parameter in changing}
        self._kept: dict[int, tuple[Tensor, int, Tensor]] = {}

    def of(self, slot: int, parameter: Tensor) -> Tensor:
        if self.dtype is None or parameter.dtype == self.dtype:
            return parameter
        if parameter.requires_grad or id(parameter) in self._changing:
            return parameter.to(self.dtype)
        source, version, cast = self._kept.get(slot, (None, 0, None))
        if source is not parameter or version != parameter._version:
            cast = parameter.detach().to(self.dtype)
            self._kept[slot] = parameter, parameter._version, cast
        return cast


def _same_order(layout: Layout, grad: Tensor) -> bool:
    """Whether a convolution's input gradient, laid out as ``grad`` is, has a value's memory order."""
    if grad.is_contiguous(memory_format=torch.channels_last):
        return layout.channels_last
    return layout.contiguous
