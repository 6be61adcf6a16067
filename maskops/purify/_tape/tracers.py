"""How a forward becomes a graph: by torch's tracer or, if it looks at shapes as other libraries' do, by one of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

_BATCH = 1009
"""Images in the example: a prime, so that a size is a multiple of it only if it depends on their number."""


class RefusedError(Exception):
    """The network can't be taped; the message says why."""


class Tracer(fx.Tracer):
    """Refuses what a graph doesn't show: modes of torch that a forward sets for a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self._modes = _modes()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise RefusedError("its forward sets torch's grad mode or autocast")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[bool, ...]:
    devices = ("cpu", "cuda")
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(torch.is_autocast_enabled, devices)


class Alone(nn.Module):
    """A network as a function of images alone that returns a tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        output = self.network(images)
        return output if isinstance(output, fx.Proxy) else output.logits


class Shaped(fx.Proxy):
    """A value of which everything is known but its numbers, and how many images there are."""

    @property
    def _value(self) -> Any:
        return self.node.meta.get("value")

    @property
    def shape(self) -> Any:
        if not isinstance(self._value, Tensor):
            return super().__getattr__("shape")
        return tuple(self._size(dim) for dim in range(self._value.dim()))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self._size(dim)

    def _size(self, dim: int) -> Any:
        size = self._value.shape[dim]
        return size if size % _BATCH or not size else self.tracer.create_proxy("call_method", "size", (self, dim), {})

    def dim(self) -> int:
        return self._value.dim()

    @property
    def ndim(self) -> int:
        return self._value.dim()

    @property
    def dtype(self) -> torch.dtype:
        return self._value.dtype

    @property
    def device(self) -> torch.device:
        return self._value.device

    @property
    def is_cuda(self) -> bool:
        return self._value.is_cuda

    def __len__(self) -> int:
        if isinstance(self._value, (tuple, list)):
            return len(self._value)
        return super().__len__()


class ShapedTracer(Tracer):
    """A tracer whose proxies know their shapes, which one forward without data tells, step by step.

    precision: the context in which the network computes
    """

    def __init__(self, network: nn.Module, example: Tensor, precision: Callable[[], Any]) -> None:
        super().__init__()
        self._network, self._precision = network, precision
        self._untraced = nn.Module.__call__, nn.Module.__getattr__
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with _disable_current_modes(), self._mode:
            self._images = torch.empty(_BATCH, *example.shape[1:], dtype=example.dtype, device=example.device)

    def proxy(self, node: fx.Node) -> Shaped:
        return Shaped(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        with _disable_current_modes(), self._mode, torch.no_grad(), self._precision(), self._not_traced():
            proxy.node.meta["value"] = self._compute(proxy.node)
        return proxy

    @contextmanager
    def _not_traced(self) -> Iterator[None]:
        """Within, modules are called as ever, and not by the tracer."""
        traced = nn.Module.__call__, nn.Module.__getattr__
        nn.Module.__call__, nn.Module.__getattr__ = self._untraced
        try:
            yield
        finally:
            nn.Module.__call__, nn.Module.__getattr__ = traced

    def _value_of(self, node: fx.Node) -> Any:
        if "value" not in node.meta:  # a tensor that was read without a proxy
            node.meta["value"] = self._compute(node)
        return node.meta["value"]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._images
        if node.op == "get_attr":
            found: Any = self._network
            for part in node.target.split("."):
                found = getattr(found, part)
            return found
        if node.op == "output":
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value_of)
        if node.op == "call_module":
            return self._network.get_submodule(node.target)(*args, **kwargs)
        if node.op == "call_method":
            receiver, *args = args
            return getattr(receiver, node.target)(*args, **kwargs)
        return node.target(*args, **kwargs)
