"""Which nodes of a graph have a step of their own, and with what settings."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from maskops.purify._tape.call import Geometry
from maskops.purify._tape.graph import argument

_ADDS = (operator.add, torch.add, "add")
_RELUS = (F.relu, torch.relu, "relu")


def sole_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _module(node: fx.Node, *kinds: type) -> nn.Module | None:
    """The module that a node calls with its one input, if it is of one of these very types."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    return node.meta["module"] if type(node.meta["module"]) in kinds else None


def summands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values of one shape and dtype that a node adds."""
    if not _is(node, _ADDS) or len(node.args) != 2 or node.kwargs:
        return None
    same = [isinstance(term, fx.Node) and _described(term) == _described(node) for term in node.args]
    return node.args if all(same) and not any(term.op == "get_attr" for term in node.args) else None


def _described(node: fx.Node) -> tuple[Any, Any]:
    return node.meta.get("shape"), node.meta.get("dtype")


def upper_end(node: fx.Node) -> float | None:
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


def elu(node: fx.Node) -> float | None:
    """The alpha of an ELU whose gradient its output tells."""
    module = _module(node, nn.ELU)
    alpha = None
    if module is not None:
        alpha = module.alpha
    elif _is(node, (F.elu,)) and node.args:
        alpha = argument(node, "alpha", 1.0)
    return alpha if alpha is not None and alpha >= 0 else None


def pool(node: fx.Node) -> tuple[tuple[list[int], ...], bool] | None:
    """Kernel size, stride, padding and dilation of a max-pooling, and whether it rounds up."""
    module = _module(node, nn.MaxPool2d)
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if module is not None:
        given = {name: getattr(module, name) for name in names}
    elif _is(node, (F.max_pool2d, torch.max_pool2d)) and node.args:
        given = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
        given |= dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    else:
        return None
    if len(node.meta["shape"]) != 4 or given["return_indices"] is not False or type(given["ceil_mode"]) is not bool:
        return None
    given["stride"] = given["stride"] or given["kernel_size"]
    window = tuple(_pair(given[name]) for name in names[:4])
    return (window, given["ceil_mode"]) if all(window) and math.prod(window[0]) <= 256 else None


def keeps_no_output(node: fx.Node) -> bool:
    """Whether autograd runs the node but doesn't keep its output, which is no view."""
    norms = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    return _module(node, *norms) is not None or _is(node, (F.batch_norm, torch.batch_norm))


def linear(node: fx.Node) -> tuple[Any, Any] | None:
    """Where weight and bias of a linear layer lie."""
    module = _module(node, nn.Linear)
    if module is not None:
        return (module, "weight"), None if module.bias is None else (module, "bias")
    if _is(node, (F.linear,)) and node.args:
        given = {"bias": None, **dict(zip(("weight", "bias"), node.args[1:], strict=False)), **node.kwargs}
        return _attributes(given.get("weight"), given["bias"])
    return None


def convolution(node: fx.Node) -> tuple[Any, Any, Geometry] | None:
    """Where weight and bias lie, and the geometry, of a convolution of a batch of images with zeros around them."""
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
        attributes = _attributes(given.get("weight"), given["bias"])
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


def _attributes(weight: Any, bias: Any) -> tuple[Any, Any] | None:
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


def mean(node: fx.Node) -> fx.Node | None:
    """Of a node that takes the mean of each channel of a batch of images, the last that only changes its shape."""
    given = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if given is None or len(given.meta.get("shape", ())) != 4 or given.op == "get_attr":
        return None
    module = _module(node, nn.AdaptiveAvgPool2d)
    if module is not None:
        whole = module.output_size in (1, (1, 1))
    elif _is(node, (F.adaptive_avg_pool2d,)):
        whole = argument(node, "output_size") in (1, (1, 1), [1, 1])
    elif _is(node, (torch.mean, "mean")) and set(node.kwargs) <= {"dim", "keepdim"}:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        whole = isinstance(dims, (list, tuple)) and {dim % 4 for dim in dims} == {2, 3}
    else:
        return None
    if not whole:
        return None
    user = sole_user(node)
    if user is None or len(node.meta["shape"]) != 4 or len(user.meta.get("shape", ())) != 2:
        return node
    return user if _module(user, nn.Flatten) or _is(user, (torch.flatten, "flatten")) else node
