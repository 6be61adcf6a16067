"""From a graph to steps: which nodes become one step, and which step that is."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parameter import Parameter

from maskops.purify._tape.call import Geometry, Slot
from maskops.purify._tape.generic import Generic
from maskops.purify._tape.graph import RefusedError, argument
from maskops.purify._tape.steps import ELU, Add, Conv, Linear, MaxPool, ReLU, Step

_ADDS = (operator.add, torch.add, "add")
_RELUS = (F.relu, torch.relu, "relu")


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
        conv, linear = _convolution(node), _linear(node)
        if conv is not None:
            self._chain(node, conv)
        elif _summands(node) is not None:
            self._sum(node)
        elif linear is not None:
            self._native[node] = lambda: Linear(
                self._number[node.args[0]], self._new(node), *self._layer_slots(*linear)
            )
            self._owned.add(node)
        elif _upper(node) is not None:
            self._native[node] = lambda: ReLU(*self._ends(node), _upper(node), self._owns(node))
        elif _elu(node) is not None:
            self._native[node] = lambda: ELU(*self._ends(node), _elu(node), self._owns(node))
        elif _pool(node) is not None:
            self._native[node] = lambda: MaxPool(*self._ends(node), *_pool(node))

    def _chain(self, node: fx.Node, conv: tuple[Any, Any, Geometry]) -> None:
        """A convolution with the sum and the ReLU behind it."""
        weight, bias, geometry = conv
        last, residual = node, None
        user = _sole_user(node)
        summands = None if user is None or user in self._native else _summands(user)
        if summands is not None:
            other = summands[1] if summands[0] is node else summands[0]
            # of two convolutions the later one takes the sum
            later = self._order[other] > self._order[node] and _convolution(other) and _sole_user(other) is user
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
        self._native[last] = lambda: Add(*(self._number[term] for term in _summands(node)), self._new(last), upper)
        if upper is None:
            self._owned.add(last)

    def _with_relu(self, node: fx.Node) -> tuple[fx.Node, float | None]:
        user = _sole_user(node)
        upper = None if user is None else _upper(user)
        return (node, None) if upper is None else (user, upper)

    def _ends(self, node: fx.Node) -> tuple[int, int]:
        return self._number[node.args[0]], self._new(node)

    def _owns(self, node: fx.Node) -> bool:
        """Whether nobody else reads or keeps the node's input."""
        return node.args[0] in self._owned and _sole_user(node.args[0]) is node


def _sole_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


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


def _is(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _module(node: fx.Node, *kinds: type) -> nn.Module | None:
    """The module that a node calls with its one input, if it is of one of these very types."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    return node.meta["module"] if type(node.meta["module"]) in kinds else None


def _summands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    if not _is(node, _ADDS) or len(node.args) != 2 or node.kwargs:
        return None
    same = [isinstance(term, fx.Node) and _described(term) == _described(node) for term in node.args]
    return node.args if all(same) and not any(term.op == "get_attr" for term in node.args) else None


def _described(node: fx.Node) -> tuple[Any, Any]:
    return node.meta.get("shape"), node.meta.get("dtype")


def _upper(node: fx.Node) -> float | None:
    """Where a ReLU ends: infinity, or a whole number, which is exact in every dtype; None for all other nodes."""
    module = _module(node, nn.ReLU, nn.ReLU6, nn.Hardtanh)
    if module is not None:
        low, high = (0, math.inf) if type(module) is nn.ReLU else (module.min_val, module.max_val)
    elif not _is(node, (*_RELUS, F.relu6, F.hardtanh)) or not isinstance(node.args[0], fx.Node):
        return None
    elif node.target in _RELUS:
        low, high = 0, math.inf
    elif node.target is F.relu6:
        low, high = 0, 6
    else:
        low, high = argument(node, "min_val", -1.0), argument(node, "max_val", 1.0)
    if low != 0 or not (high == math.inf or (1 <= high <= 256 and high == int(high))):
        return None
    return float(high)


def _elu(node: fx.Node) -> float | None:
    module = _module(node, nn.ELU)
    alpha = None
    if module is not None:
        alpha = module.alpha
    elif _is(node, (F.elu,)) and node.args:
        alpha = argument(node, "alpha", 1.0)
    return alpha if alpha is not None and alpha >= 0 else None


def _pool(node: fx.Node) -> tuple[tuple[list[int], ...], bool] | None:
    module = _module(node, nn.MaxPool2d)
    if module is not None and not module.return_indices:
        given = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")}
    elif _is(node, (F.max_pool2d, torch.max_pool2d)) and len(node.args) == 1 + len(node.args[1:]) and node.args:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        given = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
        given |= dict(zip(names, node.args[1:], strict=False)) | node.kwargs
        if given.pop("return_indices", False):
            return None
    else:
        return None
    if len(node.meta["shape"]) != 4 or not isinstance(given.get("ceil_mode"), bool):
        return None
    given["stride"] = given["stride"] or given["kernel_size"]
    window = tuple(_pair(given[name]) for name in ("kernel_size", "stride", "padding", "dilation"))
    return (window, given["ceil_mode"]) if all(window) and math.prod(window[0]) <= 256 else None


def _linear(node: fx.Node) -> tuple[Any, Any] | None:
    module = _module(node, nn.Linear)
    if module is not None:
        return (module, "weight"), None if module.bias is None else (module, "bias")
    if _is(node, (F.linear,)) and node.args and len(node.args) <= 3:
        return _attributes([*node.args[1:], *node.kwargs.values()], argument(node, "weight"), argument(node, "bias"))
    return None


def _convolution(node: fx.Node) -> tuple[Any, Any, Geometry] | None:
    """Slots of weight and bias, and the geometry, of a convolution of a batch of images with zeros around them."""
    module = _module(node, nn.Conv2d)
    if module is not None:
        if module.padding_mode != "zeros":
            return None
        attributes = (module, "weight"), None if module.bias is None else (module, "bias")
        kernel = module.kernel_size
        stride, padding, dilation, groups = module.stride, module.padding, module.dilation, module.groups
    elif _is(node, (F.conv2d, torch.conv2d)) and node.args:
        names = ("weight", "bias", "stride", "padding", "dilation", "groups")
        given = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        given |= dict(zip(names, node.args[1:], strict=False)) | node.kwargs
        attributes = _attributes([], given.get("weight"), given["bias"])
        if attributes is None:
            return None
        kernel = given["weight"].meta["shape"][2:]
        stride, padding, dilation, groups = (given[name] for name in names[2:])
    else:
        return None
    stride, dilation = _pair(stride), _pair(dilation)
    padding = _padding(padding, kernel, dilation)
    if len(node.meta["shape"]) != 4 or not (stride and padding and dilation and isinstance(groups, int)):
        return None
    return *attributes, (stride, padding, dilation, groups)


def _attributes(unused: list[Any], weight: Any, bias: Any) -> tuple[Any, Any] | None:
    """Where the parameters lie that a function reads, if they are parameters as they stand."""
    found = []
    for value in (weight, bias):
        if value is None and found:
            return found[0], None
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        if not isinstance(getattr(value.meta["owner"], value.meta["name"]), Tensor):
            return None
        found.append((value.meta["owner"], value.meta["name"]))
    return tuple(found)


def _padding(padding: Any, kernel: tuple[int, ...], dilation: list[int]) -> list[int]:
    if padding == "valid":
        return [0, 0]
    if padding != "same":
        return _pair(padding)
    both = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
    return [] if any(total % 2 for total in both) else [total // 2 for total in both]


def _pair(value: Any) -> list[int]:
    """Two numbers; none where they aren't known."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    values = values * 2 if len(values) == 1 else values
    return values if len(values) == 2 and all(type(number) is int for number in values) else []
