"""From a graph to steps: which nodes become one step, and which step that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import Parameter

from maskops.purify._tape.call import Geometry, Slot
from maskops.purify._tape.generic import Generic
from maskops.purify._tape.graph import RefusedError
from maskops.purify._tape.patterns import (
    convolution,
    elu,
    keeps_no_output,
    linear,
    mean,
    pool,
    sole_user,
    summands,
    upper_end,
)
from maskops.purify._tape.steps import ELU, Add, Conv, Linear, MaxPool, Mean, ReLU, Step


class Builder:
    """Makes the steps of a graph; value 0 is the images.

    precision: the context in which steps without a backward of their own compute
    """

    def __init__(self, graph: fx.Graph, precision: Callable[[], Any]) -> None:
        self.steps: list[Step] = []
        self.slots: list[Slot] = []
        self._precision = precision
        self._slot_of: dict[tuple[int, str], int] = {}
        self._number: dict[fx.Node, int] = {}
        self._owned: set[fx.Node] = set()
        self._order = {node: index for index, node in enumerate(graph.nodes)}
        self._absorbed: set[fx.Node] = set()
        self._native: dict[fx.Node, Callable[[], Step]] = {}
        for node in graph.nodes:
            if node not in self._absorbed and node not in self._native:
                self._recognise(node)
        self._run(graph)

    def _run(self, graph: fx.Graph) -> None:
        pending: list[fx.Node] = []
        for node in graph.nodes:
            if node.op == "placeholder":
                self._number[node] = 0
            elif node.op == "output":
                self._flush(pending)
                self.logits = self._number[node.args[0]]
            elif node in self._native:
                self._flush(pending)
                self.steps.append(self._native[node]())
            elif node not in self._absorbed and node.op != "get_attr":
                pending.append(node)
        self.values = len(self._number)
        self._free()

    @property
    def sizes(self) -> list[int]:
        """Bytes of each value, of the example."""
        return [
            math.prod(node.meta.get("shape", ())) * node.meta.get("dtype", torch.float32).itemsize
            for node in self._number
        ]

    def _free(self) -> None:
        """Tell each step which values nobody reads after it."""
        last = {}
        for step in self.steps:
            last.update(dict.fromkeys((*step.reads, *step.writes), step))
        last.pop(self.logits, None)
        for step in self.steps:
            step.frees = tuple({value for value in (*step.reads, *step.writes) if last.get(value) is step})

    def _flush(self, pending: list[fx.Node]) -> None:
        """A generic step of the pending nodes."""
        if not pending:
            return
        inside = set(pending)
        read = dict.fromkeys(other for node in pending for other in node.all_input_nodes if other not in inside)
        constants = [node for node in read if node.op == "get_attr"]
        inputs = {node: self._number[node] for node in read if node.op != "get_attr"}
        outputs = [node for node in pending if any(user not in inside for user in node.users)]
        for node in outputs:
            if node.meta["holds"]:
                raise RefusedError(f"{node.name} hands several tensors on as one")
        slots = [self._slot(owner, name) for node in (*constants, *pending) for owner, name in _parameters(node)]
        # a step that nobody reads writes a value that nobody reads
        numbers = {node: self._new(node) for node in outputs or pending[-1:]}
        unique = tuple(dict.fromkeys(slots))
        self.steps.append(Generic([*constants, *pending], inputs, numbers, unique, self._precision))
        pending.clear()

    def _new(self, node: fx.Node) -> int:
        self._number[node] = len(self._number)
        return self._number[node]

    def _slot(self, owner: nn.Module, name: str) -> int:
        key = id(owner), name
        if key not in self._slot_of:
            self._slot_of[key] = len(self.slots)
            self.slots.append(Slot(owner, name))
        return self._slot_of[key]

    def _layer_slots(self, *found: tuple[nn.Module, str] | None) -> list[int | None]:
        return [None if slot is None else self._slot(*slot) for slot in found]

    # what a node and its neighbours are

    def _recognise(self, node: fx.Node) -> None:
        if "shape" not in node.meta or node.op in ("placeholder", "get_attr"):
            return
        conv, dense = convolution(node), linear(node)
        if conv is not None:
            self._chain(node, conv)
        elif summands(node) is not None:
            self._sum(node)
        elif dense is not None:
            self._native[node] = lambda: Linear(*self._ends(node), *self._layer_slots(*dense))
            self._owned.add(node)
        elif upper_end(node) is not None:
            self._native[node] = lambda: ReLU(*self._ends(node), upper_end(node), self._owns(node))
        elif mean(node) is not None:
            self._mean(node)
        elif elu(node) is not None:
            self._native[node] = lambda: ELU(*self._ends(node), elu(node), self._owns(node))
        elif keeps_no_output(node):
            self._owned.add(node)
        elif pool(node) is not None:
            self._native[node] = lambda: MaxPool(*self._ends(node), *pool(node))

    def _chain(self, node: fx.Node, conv: tuple[Any, Any, Geometry]) -> None:
        """A convolution with the sum and the ReLU behind it."""
        weight, bias, geometry = conv
        last, residual = node, None
        user = sole_user(node)
        terms = None if user is None or user in self._native else summands(user)
        if terms is not None:
            other = terms[1] if terms[0] is node else terms[0]
            # of two convolutions the later one takes the sum
            later = self._order[other] > self._order[node] and convolution(other) and sole_user(other) is user
            if other is not node and not later:
                last, residual = user, other
        last, upper = self._with_relu(last)
        self._absorbed |= {node, last} | ({user} if residual is not None else set())

        def make() -> Step:
            number = None if residual is None else self._number[residual]
            input = self._number[node.args[0]]
            return Conv(input, number, self._new(last), *self._layer_slots(weight, bias), geometry, upper)

        self._native[last] = make
        if upper is None:
            self._owned.add(last)

    def _sum(self, node: fx.Node) -> None:
        last, upper = self._with_relu(node)
        self._absorbed |= {node, last}
        terms = summands(node)
        # the first may be written over
        terms = terms if self._is_owned(terms[0], node) else terms[::-1]
        owned = self._is_owned(terms[0], node)
        self._native[last] = lambda: Add(*(self._number[term] for term in terms), self._new(last), upper, owned)
        if upper is None:
            self._owned.add(last)

    def _mean(self, node: fx.Node) -> None:
        """The mean of each channel, and what flattens it."""
        last = mean(node)
        self._absorbed |= {node, last}
        keepdim = len(last.meta["shape"]) == 4
        self._native[last] = lambda: Mean(self._number[node.args[0]], self._new(last), keepdim)

    def _with_relu(self, node: fx.Node) -> tuple[fx.Node, float | None]:
        user = sole_user(node)
        upper = None if user is None else upper_end(user)
        return (node, None) if upper is None else (user, upper)

    def _ends(self, node: fx.Node) -> tuple[int, int]:
        return self._number[node.args[0]], self._new(node)

    def _is_owned(self, node: fx.Node, by: fx.Node) -> bool:
        """Whether nobody else reads or keeps a node's output."""
        return node in self._owned and sole_user(node) is by

    def _owns(self, node: fx.Node) -> bool:
        return self._is_owned(node.args[0], node)


def _parameters(node: fx.Node) -> Iterator[tuple[nn.Module, str]]:
    """The parameters that a node may read: their owners, and their names there."""
    if node.op == "get_attr":
        owner, name = node.meta["owner"], node.meta["name"]
        if isinstance(getattr(owner, name), Parameter):
            yield owner, name
    elif node.op == "call_module":
        for module in node.meta["module"].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield module, name
