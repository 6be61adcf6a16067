"""The step for everything that has no backward of its own: autograd runs it, over a graph of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import get_gradient_edge

from maskops.lean import lean_autograd
from maskops.purify._tape.call import Call, CallPlan
from maskops.purify._tape.steps import Step

_MOVES = {"cat", "chunk", "contiguous", "flatten", "getattr", "getitem", "permute", "reshape", "size", "split"}
_MOVES |= {"squeeze", "transpose", "unsqueeze", "view"}
_REQUIRES_GRAD = torch.zeros((), requires_grad=True)


class _Start(torch.autograd.Function):
    """A tensor as the start of a graph that doesn't hold it, as it would hold a leaf."""

    @staticmethod
    def forward(ctx, requires_grad, tensor):
        return tensor.detach()

    @staticmethod
    def backward(ctx, grad):
        return None, None


class Generic(Step):
    """Consecutive nodes of a graph, run by autograd.

    nodes:  in their order; ``get_attr`` nodes among them
    inputs: what they read of others, with the values' numbers
    outputs: what others read of them, with the values' numbers
    slots:  of all parameters that they may read
    precision: the context in which they compute
    """

    def __init__(
        self,
        nodes: Sequence[fx.Node],
        inputs: dict[fx.Node, int],
        outputs: dict[fx.Node, int],
        slots: tuple[int, ...],
        precision: Callable[[], Any],
    ) -> None:
        self.reads, self.writes, self.slots = tuple(inputs.values()), tuple(outputs.values()), slots
        self._inputs = list(inputs)
        self._outputs = list(outputs)
        self._nodes = [(node, _function(node)) for node in nodes]
        self._precision = precision

    def holds(self, plan: CallPlan, bits: bool) -> tuple[int, ...]:
        # what autograd keeps isn't known before, but for what only moves values
        return () if all(_moves(node) for node, _ in self._nodes) else (*self.reads, *self.writes)

    def forward(self, call: Call) -> None:
        wanted = any(call.plan.needs[value] for value in self.writes)
        values: dict[fx.Node, Any] = {}
        starts = []
        with torch.set_grad_enabled(wanted), self._precision(), lean_autograd():
            for node, value in zip(self._inputs, self.reads, strict=True):
                given = call.values[value]
                if wanted and call.plan.needs[value] and isinstance(given, Tensor) and given.is_floating_point():
                    given = _Start.apply(_REQUIRES_GRAD, given)
                    starts.append((value, get_gradient_edge(given)))
                values[node] = given
            for node, function in self._nodes:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = function(*args, **kwargs)
        ends = []
        for node, value in zip(self._outputs, self.writes, strict=True):
            output = values[node]
            if isinstance(output, Tensor):
                if output.requires_grad:
                    ends.append((value, get_gradient_edge(output), output.dtype))
                output = call.lasting(output.detach())
            call.values[value] = output
        if wanted:
            # edges, not tensors: what the graph itself doesn't need is free
            call.saved[self.writes[0]] = starts, ends

    def backward(self, call: Call) -> None:
        starts, ends = call.saved.pop(self.writes[0])
        complete = [(edge, dtype, call.take(value)) for value, edge, dtype in ends]
        complete = [(edge, grad.to(dtype)) for edge, dtype, grad in complete if grad is not None]
        learned = [slot for slot in self.slots if call.plan.learned[slot]]
        parameters = [call.parameters[slot] for slot in learned]
        inputs = [edge for _, edge in starts] + parameters
        grads: Sequence[Tensor | None] = [None] * len(inputs)
        if complete and inputs:
            edges, grad_outputs = zip(*complete, strict=True)
            grads = torch.autograd.grad(edges, inputs, grad_outputs, allow_unused=True)
        arrived = dict(zip([value for value, _ in starts], grads, strict=False))
        for value in self.reads:
            call.deliver(value, arrived.get(value))
        seen = set()
        for slot, parameter, grad in zip(learned, parameters, grads[len(starts) :], strict=True):
            # one parameter under two names got its whole gradient twice
            if grad is not None and id(parameter) not in seen:
                call.add_to_parameter(slot, grad)
            seen.add(id(parameter))


def _moves(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op == "get_attr" or (node.op != "call_module" and name in _MOVES)


def _function(node: fx.Node) -> Callable[..., Any]:
    if node.op == "call_module":
        return node.meta["module"]
    if node.op == "call_function":
        return node.target
    if node.op == "get_attr":
        owner, name = node.meta["owner"], node.meta["name"]
        return lambda: getattr(owner, name)
    name = node.target
    return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)
