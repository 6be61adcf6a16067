"""The steps whose backward is written out: convolutions with what follows them, and the layers between."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops.purify._tape.call import Call, CallPlan, Geometry

aten = torch.ops.aten


class Step:
    """A step of a tape.

    reads, writes: numbers of values, a value as often as it is read
    slots:         numbers of parameters
    frees:         values that no later step reads
    overwrites:    the value whose memory it writes to, if there is one
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    slots: tuple[int, ...] = ()
    frees: tuple[int, ...] = ()
    overwrites: int | None = None

    def keeps(self, learned: list[bool]) -> tuple[int, ...]:
        """The values that the step keeps as they are when these parameters are learned."""
        return ()

    def holds(self, plan: CallPlan, bits: bool) -> tuple[int, ...]:
        """The values that the step has as whole tensors until its backward."""
        return self.keeps(plan.learned)

    def forward(self, call: Call) -> None:
        raise NotImplementedError

    def backward(self, call: Call) -> None:
        """Take the gradients of what was written, deliver one (or None) for every read."""
        raise NotImplementedError


class Gated(Step):
    """A step that may end in a ReLU, up to ``upper`` or with none."""

    output: int
    upper: float | None

    def holds(self, plan: CallPlan, bits: bool) -> tuple[int, ...]:
        whole = self.upper is not None and plan.needs[self.output] and not bits
        return (*self.keeps(plan.learned), self.output) if whole else self.keeps(plan.learned)


class Conv(Gated):
    """``relu(conv(input) + residual)``, the residual and the ReLU (up to ``upper``) if there are any."""

    def __init__(
        self,
        input: int,
        residual: int | None,
        output: int,
        weight: int,
        bias: int | None,
        geometry: Geometry,
        upper: float | None,
    ) -> None:
        self.input, self.residual, self.output = input, residual, output
        self.weight, self.bias = weight, bias
        self.geometry, self.upper = geometry, upper
        self.reads = (input,) if residual is None else (residual, input)
        self.writes = (output,)
        self.slots = (weight,) if bias is None else (weight, bias)

    def keeps(self, learned: list[bool]) -> tuple[int, ...]:
        return (self.input,) if learned[self.weight] else ()

    def forward(self, call: Call) -> None:
        input = call.cast(call.values[self.input])
        weight, bias = call.parameter(self.weight), call.parameter(self.bias)
        residual = None if self.residual is None else call.values[self.residual]
        if call.plan.needs[self.output]:
            kept = input if call.plan.learned[self.weight] else None
            call.saved[self.output] = kept, input.shape
        mixed = residual is not None and residual.dtype != input.dtype
        bits = self.upper is not None and call.wants_bits(self.output)
        if self.upper is not None and not (mixed or bits):
            fused = torch.ops.maskops.conv_relu(input, weight, bias, residual, *self.geometry, self.upper)
            call.put_gated(self.output, fused, self.upper)
            return
        output = F.conv2d(input, weight, bias, *self.geometry)
        if residual is not None:
            output = output + residual if mixed else output.add_(residual)
        put_relu(call, self.output, output, self.upper)

    def backward(self, call: Call) -> None:
        grad = call.take(self.output)
        saved = call.saved.pop(self.output, None)
        if self.residual is not None:
            call.deliver(self.residual, grad)
        if grad is None:
            call.deliver(self.input, None)
            return
        input, size = saved
        weight = call.parameter(self.weight)
        grad = grad.to(weight.dtype)
        self._learn(call, grad, input, weight)
        if call.plan.early and self.input == 0:
            # the sum in the order of memory: on the CPU many times as fast as over a channels_last tensor's batch
            total = grad.movedim(1, -1).sum(0, keepdim=True).movedim(-1, 1)
            call.shared_grad = torch.ops.maskops.conv_input_grad(
                total, weight, None, None, [1, *size[1:]], *self.geometry, math.inf
            )
        if call.plan.needs[self.input]:
            call.deliver_from_conv(self.input, grad, weight, size, self.geometry)
        else:
            call.deliver(self.input, None)

    def _learn(self, call: Call, grad: Tensor, input: Tensor | None, weight: Tensor) -> None:
        learns_bias = self.bias is not None and call.plan.learned[self.bias]
        if input is not None:
            stride, padding, dilation, groups = self.geometry
            _, grad_weight, grad_bias = aten.convolution_backward(
                grad, input, weight, [len(weight)], stride, padding, dilation, False, [0, 0], groups,
                [False, True, learns_bias],
            )  # fmt: skip
            call.add_to_parameter(self.weight, grad_weight)
        elif learns_bias:
            grad_bias = grad.sum((0, 2, 3))
        if learns_bias:
            call.add_to_parameter(self.bias, grad_bias)


class Add(Gated):
    """``a + b``, and ReLU if ``upper`` is a number; ``owned`` if nobody else has or keeps ``a``."""

    def __init__(self, a: int, b: int, output: int, upper: float | None, owned: bool) -> None:
        self.reads, self.writes = (a, b), (output,)
        self.output, self.upper, self.owned = output, upper, owned
        self.overwrites = a if owned else None

    def forward(self, call: Call) -> None:
        a, b = (call.values[value] for value in self.reads)
        total = a.add_(b) if self.owned and a.dtype == b.dtype else a + b
        put_relu(call, self.output, total, self.upper)

    def backward(self, call: Call) -> None:
        grad = call.take(self.output)
        for value in self.reads:
            call.deliver(value, grad)


class ReLU(Gated):
    """ReLU; ``owned`` if nobody else has or keeps its input."""

    def __init__(self, input: int, output: int, upper: float, owned: bool) -> None:
        self.input, self.output, self.upper, self.owned = input, output, upper, owned
        self.reads, self.writes, self.overwrites = (input,), (output,), input if owned else None

    def forward(self, call: Call) -> None:
        input = call.values[self.input]
        if self.owned:
            put_relu(call, self.output, input, self.upper)
            return
        if call.wants_bits(self.output):
            output, bits = torch.ops.maskops.relu_bits(input, self.upper)
            call.put_gated(self.output, output, self.upper, bits)
            return
        output = input.relu() if self.upper == math.inf else F.hardtanh(input, 0, self.upper)
        call.put_gated(self.output, output, self.upper)

    def backward(self, call: Call) -> None:
        call.deliver(self.input, call.take(self.output))


class ELU(Step):
    """ELU; ``owned`` if nobody else has or keeps its input."""

    def __init__(self, input: int, output: int, alpha: float, owned: bool) -> None:
        self.input, self.output, self.alpha, self.owned = input, output, alpha, owned
        self.reads, self.writes, self.overwrites = (input,), (output,), input if owned else None

    def holds(self, plan: CallPlan, bits: bool) -> tuple[int, ...]:
        return self.writes

    def forward(self, call: Call) -> None:
        output = F.elu(call.values[self.input], self.alpha, inplace=self.owned)
        call.put(self.output, output)
        if call.plan.needs[self.output]:
            call.saved[self.output] = (output,)

    def backward(self, call: Call) -> None:
        grad = call.take(self.output)
        (output,) = call.saved.pop(self.output, (None,))
        if grad is not None:
            grad = aten.elu_backward(grad, self.alpha, 1, 1, True, output)
        call.deliver(self.input, grad)


class MaxPool(Step):
    """Max-pooling, of which a byte per window is kept."""

    def __init__(self, input: int, output: int, window: tuple[list[int], ...], ceil_mode: bool) -> None:
        self.input, self.output, self.window, self.ceil_mode = input, output, window, ceil_mode
        self.reads, self.writes = (input,), (output,)

    def forward(self, call: Call) -> None:
        input = call.values[self.input]
        if not call.plan.needs[self.output]:
            call.put(self.output, F.max_pool2d(input, *self.window, self.ceil_mode))
            return
        output, winners = torch.ops.maskops.max_pool_winners(input, *self.window, self.ceil_mode)
        call.saved[self.output] = winners, input.shape
        call.put(self.output, output)

    def backward(self, call: Call) -> None:
        grad = call.take(self.output)
        winners, size = call.saved.pop(self.output, (None, None))
        if grad is not None:
            grad = torch.ops.maskops.max_pool_winners_backward(grad, winners, size, *self.window)
        call.deliver(self.input, grad)


class Mean(Step):
    """The mean of each channel: (B, C, 1, 1) with ``keepdim``, else (B, C)."""

    def __init__(self, input: int, output: int, keepdim: bool) -> None:
        self.input, self.output, self.keepdim = input, output, keepdim
        self.reads, self.writes = (input,), (output,)

    def forward(self, call: Call) -> None:
        input = call.values[self.input]
        call.put(self.output, input.mean((2, 3), keepdim=self.keepdim))
        if call.plan.needs[self.output]:
            call.saved[self.output] = (input.shape,)

    def backward(self, call: Call) -> None:
        grad = call.take(self.output)
        (shape,) = call.saved.pop(self.output, (None,))
        if grad is not None:
            grad = (grad / shape[2:].numel()).view(*shape[:2], 1, 1).expand(shape)
        call.deliver(self.input, grad)


class Linear(Step):
    """``input @ weight.T + bias``."""

    def __init__(self, input: int, output: int, weight: int, bias: int | None) -> None:
        self.input, self.output, self.weight, self.bias = input, output, weight, bias
        self.reads, self.writes = (input,), (output,)
        self.slots = (weight,) if bias is None else (weight, bias)

    def keeps(self, learned: list[bool]) -> tuple[int, ...]:
        return (self.input,) if learned[self.weight] else ()

    def forward(self, call: Call) -> None:
        input, weight = call.cast(call.values[self.input]), call.parameter(self.weight)
        call.put(self.output, F.linear(input, weight, call.parameter(self.bias)))
        if call.plan.needs[self.output]:
            call.saved[self.output] = (input if call.plan.learned[self.weight] else None,)

    def backward(self, call: Call) -> None:
        grad = call.take(self.output)
        (input,) = call.saved.pop(self.output, (None,))
        if grad is None:
            call.deliver(self.input, None)
            return
        rows = grad.reshape(-1, grad.shape[-1])
        if input is not None:
            call.add_to_parameter(self.weight, rows.t() @ input.reshape(-1, input.shape[-1]))
        if self.bias is not None and call.plan.learned[self.bias]:
            call.add_to_parameter(self.bias, rows.sum(0))
        call.deliver(self.input, grad @ call.parameter(self.weight) if call.plan.needs[self.input] else None)


def put_relu(call: Call, value: int, tensor: Tensor, upper: float | None) -> None:
    """A tensor of its own, or ReLU of it in place."""
    if upper is None:
        call.put(value, tensor)
    elif call.wants_bits(value):
        call.put_gated(value, tensor, upper, torch.ops.maskops.relu_bits_(tensor, upper))
    else:
        call.put_gated(value, tensor.relu_() if upper == math.inf else F.hardtanh_(tensor, 0, upper), upper)


def plan(
    steps: list[Step], values: int, learned: list[bool], *, needs_images: bool, shared: bool, early: bool
) -> CallPlan:
    """What a call keeps and computes when these parameters, the images or what they share require gradients."""
    needs, kept = [False] * values, [False] * values
    needs[0] = needs_images or (shared and not early)
    for step in steps:
        wanted = any(needs[value] for value in step.reads) or any(learned[slot] for slot in step.slots)
        wanted = wanted or (early and 0 in step.reads)
        for value in step.writes:
            needs[value] = wanted
        for value in step.keeps(learned):
            kept[value] = True
    return CallPlan(needs, kept, learned, shared, early)
