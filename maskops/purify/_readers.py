"""Which layers read what in a forward of a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Readers(TorchFunctionMode):
    """During one forward: which layers make and read which tensors, and how many functions read each."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[nn.Module, list[Tensor]] = {}
        self.outputs: dict[nn.Module, list[Tensor]] = {}
        self._counts: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no id is given twice

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # shapes, dtypes and the like are no readers: only what makes or changes a tensor is
        if func is Tensor.__setitem__ or any(True for _ in _tensors(result)):
            self._count((args, kwargs))
        return result

    def watch(self, network: nn.Module, images: Tensor) -> Any:
        def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            # a layer called by keyword is a layer of which nothing is known
            if inputs:
                self.inputs.setdefault(module, []).append(inputs[0])
                self.outputs.setdefault(module, []).append(output)

        # a layer with hooks or a forward of its own may do more than its class says
        layers = [
            module
            for module in network.modules()
            if type(module) in (*CONVOLUTIONS, *BATCH_NORMS, nn.Linear)
            and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        ]
        handles = [layer.register_forward_hook(record) for layer in layers]
        self.images = images
        try:
            result = network(images)
        finally:
            for handle in handles:
                handle.remove()
        self._count(result)
        return result

    def reads(self, tensor: Tensor) -> int:
        """How many functions read the tensor."""
        return self._counts.get(id(tensor), 0)

    def sole_output(self, module: nn.Module) -> Tensor | None:
        """What the module returned, if it ran once and exactly one function read that."""
        return self._read_once(self.outputs.get(module, []))

    def sole_input(self, module: nn.Module) -> Tensor | None:
        """What the module read, if it ran once and nothing else read that."""
        return self._read_once(self.inputs.get(module, []))

    def _read_once(self, tensors: list[Tensor]) -> Tensor | None:
        return tensors[0] if len(tensors) == 1 and self.reads(tensors[0]) == 1 else None

    def _count(self, value: Any) -> None:
        for tensor in {id(tensor): tensor for tensor in _tensors(value)}.values():
            self._alive.append(tensor)
            self._counts[id(tensor)] = self.reads(tensor) + 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
