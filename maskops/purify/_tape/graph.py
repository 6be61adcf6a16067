"""The graph of a network's forward: what each node makes, without ops that write over their inputs."""

from __future__ import annotations

import copy
import inspect
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from maskops.purify._fake import PLAIN
from maskops.purify._tape.tracers import Alone, RefusedError, ShapedTracer, Tracer

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_MAYBE_VIEWS = ("reshape", "contiguous", "flatten", "to", "type", "float", "type_as", "expand_as")
"""What shares memory with its input or not, as the input happens to lie in memory."""


def traced(network: nn.Module, example: Tensor, precision: Callable[[], Any]) -> fx.Graph:
    """The network's graph in its present modes.

    Each node's ``meta`` has ``"shape"`` and ``"dtype"`` if it makes a tensor, ``"holds"`` if it makes something that
    holds tensors, and for a module ``"module"``. ``get_attr`` nodes have ``"owner"`` and ``"name"``.

    precision: the context in which the network computes
    errors:    RefusedError
    """
    _refuse_modules(network)
    graph = _graph(network, example, precision)
    storages = _describe(network, graph, example, precision)
    for node in graph.nodes:
        if node.op == "call_module":
            node.meta["module"] = network.get_submodule(node.target)
        elif node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            node.meta.update(owner=network.get_submodule(owner), name=name)
    _refuse_overwritten(graph, storages)
    for node in list(graph.nodes):
        if overwrites(node):
            _write_elsewhere(node)
        if _passes(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _gather_items(graph)
    return graph


def _refuse_modules(network: nn.Module) -> None:
    for name, module in network.named_modules():
        where = name or "the network"
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            raise RefusedError(f"{where} has hooks")
        if "forward" in vars(module):
            raise RefusedError(f"{where} has a forward of its own")
        if parametrize.is_parametrized(module):
            raise RefusedError(f"{where} is parametrized")


@contextmanager
def _no_functions_of_its_own() -> Iterator[None]:
    """Within, a ``torch.autograd.Function`` that is traced is refused: of it the tracer would see the forward alone."""
    apply = torch.autograd.Function.__dict__["apply"]

    def refuse_proxies(cls: type, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(argument, fx.Proxy) for argument in (*args, *kwargs.values())):
            raise RefusedError(f"{cls.__name__} has a backward of its own")
        return apply.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(refuse_proxies)
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply


def _traced_somehow(
    network: nn.Module, example: Tensor, precision: Callable[[], Any], optional: dict[str, Any]
) -> fx.Graph:
    """The graph by torch's own tracer or, of a forward that looks at shapes, by ours."""
    try:
        return Tracer().trace(network, concrete_args=optional)
    except RefusedError:
        raise
    except Exception as error:
        try:
            alone = Alone(network)
            graph = ShapedTracer(alone, example, precision).trace(alone)
        except RefusedError:
            raise
        except Exception:  # what the simpler way stumbled over says more
            raise error from None
    for node in reversed(graph.nodes):
        node.meta.pop("value", None)
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix("network.")
        if node.target == "size" and not node.users:
            graph.erase_node(node)
    return graph


def _graph(network: nn.Module, example: Tensor, precision: Callable[[], Any]) -> fx.Graph:
    parameters = list(inspect.signature(network.forward).parameters.values())
    optional = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
    attributes = {module: dict(vars(module)) for module in network.modules()}
    with _random_numbers(network) as unused:
        try:
            with torch.enable_grad(), _no_functions_of_its_own():
                graph = _traced_somehow(network, example, precision, optional)
        except RefusedError:
            raise
        except Exception as error:  # whatever the network's own code raises when it is run on proxies
            raise RefusedError(f"its forward can't be traced: {_first_line(error)}") from error
        finally:
            changed = _restore(attributes)
        if changed:
            raise RefusedError("its forward sets attributes or makes tensors of its own")
        if not unused():
            raise RefusedError("its forward draws random numbers by itself")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if not placeholders or placeholders[0].target.startswith("*"):
        raise RefusedError("its forward names no images")
    for node in placeholders[1:]:
        # all that reads an optional argument is the tracer's check that it is its default, which it always is
        for check in (node, *node.users):
            for user in list(check.users):
                if getattr(user.target, "__name__", "") in ("_assert_is_none", "_assert"):
                    graph.erase_node(user)
        for user in list(node.users):
            if user.target is operator.eq and not user.users:
                graph.erase_node(user)
        if node.users:
            raise RefusedError(f"its forward reads {node.target}")
        graph.erase_node(node)
    return graph


@contextmanager
def untouched(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards the network's buffers and torch's random generators are as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def draws(network: nn.Module, example: Tensor, precision: Callable[[], Any]) -> bool:
    """Whether a forward of the network draws random numbers."""
    with _random_numbers(network) as unused, untouched(network, example.device), torch.no_grad(), precision():
        network(example.clone())
        return not unused()


@contextmanager
def _random_numbers(network: nn.Module) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether no random number has been drawn since; none has afterwards."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    python, numbers = random.getstate(), np.random.get_state()

    def states() -> list[Any]:
        on_device = torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else []
        of_numpy = [np.asarray(part).tolist() for part in np.random.get_state()]
        return [random.getstate(), of_numpy, torch.get_rng_state().tolist(), on_device]

    before = states()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield lambda: states() == before
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def _restore(attributes: dict[nn.Module, dict[str, Any]]) -> bool:
    """Give modules the attributes that they had; returns whether one was set."""
    changed = False
    for module, before in attributes.items():
        now = vars(module)
        if now.keys() != before.keys() or any(now[name] is not value for name, value in before.items()):
            now.clear()
            now.update(before)
            changed = True
    return changed


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class _Describing(fx.Interpreter):
    def __init__(self, network: nn.Module, graph: fx.Graph) -> None:
        super().__init__(network, garbage_collect_values=False, graph=graph)
        self.storages: dict[fx.Node, set[int]] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, Tensor):
            if node.op != "get_attr" and (type(result) not in PLAIN or result.layout != torch.strided):
                raise RefusedError(f"{node.name} is no plain tensor")
            node.meta.update(shape=tuple(result.shape), dtype=result.dtype)
        held = list(tensors_of(result))
        node.meta["holds"] = bool(held) and not isinstance(result, Tensor)
        self.storages[node] = {tensor.untyped_storage()._cdata for tensor in held}
        return result


def _describe(
    network: nn.Module, graph: fx.Graph, example: Tensor, precision: Callable[[], Any]
) -> dict[fx.Node, set[int]]:
    """Run the graph on the example; returns the storages of each node's tensors."""
    interpreter = _Describing(network, graph)
    with torch.no_grad(), precision(), untouched(network, example.device):
        try:
            logits = interpreter.run(example.clone())
        except RefusedError as error:
            raise RefusedError(_first_line(error)) from None  # the interpreter adds where it was
        except Exception as error:  # such as of a forward that looks at what only tensors have
            raise RefusedError(f"its graph can't be run: {_first_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise RefusedError("its forward returns something else than a tensor of logits")
    return interpreter.storages


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a value of nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def overwrites(node: fx.Node) -> bool:
    """Whether the node's op writes over its first argument."""
    if node.op == "call_module":
        return getattr(node.meta["module"], "inplace", False) is True
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    in_operator = getattr(operator, name, None) is node.target and name.startswith("i") and hasattr(operator, name[1:])
    trailing = name.endswith("_") and not name.endswith("__")
    return in_operator or trailing or argument(node, "inplace") is True


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of a function by its name, however it was given."""
    if name in node.kwargs:
        return node.kwargs[name]
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get(name, default)
    except (TypeError, ValueError):  # no signature, as for many of torch's own functions
        return default


def _refuse_overwritten(graph: fx.Graph, storages: dict[fx.Node, set[int]]) -> None:
    """Refuse a graph in which a value is read after it was overwritten: its nodes will write elsewhere."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for writer in order:
        if "out" in writer.kwargs:
            raise RefusedError(f"{writer.name} writes into a tensor that it is given")
        if not overwrites(writer) or "shape" not in writer.meta:
            continue
        written = _same_memory(_first(writer), storages)
        if any(node.op == "get_attr" for node in written):
            raise RefusedError(f"{writer.name} overwrites a parameter or buffer")
        for node in written:
            late = [user for user in node.users if order[user] > order[writer]]
            if order[node] < order[writer] and late:
                raise RefusedError(f"{writer.name} overwrites a value that {late[0].name} reads later")


def _first(node: fx.Node) -> fx.Node:
    return node.args[0] if node.args else node.kwargs["input"]


def _same_memory(node: fx.Node, storages: dict[fx.Node, set[int]]) -> set[fx.Node]:
    """The nodes that have, or on other inputs could have, memory in common with this one."""
    found, new = {node}, [node]
    while new:
        node = new.pop()
        near = {other for other, memory in storages.items() if memory & storages[node] and other.op != "output"}
        near |= {user for user in node.users if _may_be_view(user)}
        near |= set(node.all_input_nodes) if _may_be_view(node) else set()
        new += near - found
        found |= near
    return found


def _may_be_view(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in _MAYBE_VIEWS


def _write_elsewhere(node: fx.Node) -> None:
    """Replace an op that writes over its input by the one that does not."""
    if node.op == "call_module":
        module = copy.copy(node.meta["module"])  # shares parameters and buffers
        module.inplace = False
        node.meta["module"] = module
        return
    name = node.target if node.op == "call_method" else node.target.__name__
    if node.op == "call_method":
        other = name[:-1] if hasattr(Tensor, name[:-1]) else None
    elif getattr(operator, name, None) is node.target:
        other = getattr(operator, name[1:])
    elif argument(node, "inplace") is True:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        node.args, node.kwargs = (), {**bound.arguments, "inplace": False}
        # the first argument stays one by position, where every reader looks for it
        first = next(iter(bound.arguments))
        node.args = (node.kwargs[first],)
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != first}
        return
    else:
        other = getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)
    if other is None:
        raise RefusedError(f"{node.name} writes over its input")
    node.target = other


def _passes(node: fx.Node) -> bool:
    """Whether the node returns its input."""
    if node.op == "call_module":
        module = node.meta["module"]
        passes = type(module) is nn.Identity or (type(module) in _DROPOUTS and not module.training)
        return passes and len(node.args) == 1
    if node.op == "call_method" and node.target == "to" and isinstance(node.args[0], fx.Node):
        return node.meta.get("dtype") == node.args[0].meta.get("dtype") and "copy" not in node.kwargs
    if node.op == "call_function" and node.target in _DROPOUT_FUNCTIONS and node.args:
        return argument(node, "training", True) is False
    return False


def _gather_items(graph: fx.Graph) -> None:
    """Take the items of lists and tuples of tensors right behind what makes these."""
    for node in list(graph.nodes):
        if node.meta.get("holds"):
            for user in list(node.users):
                if user.target is operator.getitem and user.all_input_nodes == [node]:
                    node.append(user)
