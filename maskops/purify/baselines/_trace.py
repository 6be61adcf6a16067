"""What one forward of any model shows: where its last linear layer reads from, and its maps at each resolution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from maskops._state import eval_mode

Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Hook) -> Iterator[None]:
    """Within, the hook sees each call of the modules: module, inputs, output."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def last_linear(model: nn.Module, images: Tensor) -> tuple[nn.Linear, int]:
    """The last linear layer that a forward calls, and how many of its inputs belong to one neuron.

    A neuron is a channel of the feature maps that are flattened into that layer, or else one input.

    errors: ValueError when none is called
    """
    found: tuple[nn.Linear, int] | None = None
    maps: torch.Size | None = None

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal found, maps
        if isinstance(module, nn.Linear):
            flattened = maps is not None and maps.numel() == module.in_features
            found, maps = (module, maps[1:].numel() if flattened else 1), None
        elif isinstance(output, Tensor) and output.dim() == 4:
            maps = output.shape[1:]

    with hooked(model.modules(), record):
        model(images)
    if found is None:
        raise ValueError("the model's forward calls no nn.Linear, of whose inputs some would be pruned")
    return found


@torch.no_grad()
def activity(model: nn.Module, linear: nn.Linear, batches: Iterable[Tensor]) -> Tensor:
    """(in_features,) the mean absolute value of each input of a linear layer over images."""
    sums, count = torch.zeros_like(linear.weight[0]), 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sums.add_(inputs[0].abs().flatten(0, -2).mean(0), alpha=len(output))

    with hooked([linear], add):
        for images in batches:
            model(images)
            count += len(images)
    return sums / count


class Maps:
    """While it watches a model: the last feature maps (B, C, H, W) of each resolution in the latest forward.

    These are what the network hands on before it changes its resolution; maps of one pixel are left out.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], Tensor] = {}
        self.ends_in_tokens = False

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[Maps]:
        with hooked(model.modules(), self._keep):
            yield self

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or output.dim() not in (3, 4):
            return
        self.ends_in_tokens = output.dim() == 3
        if output.dim() == 4 and output[0, 0].numel() > 1:
            self._last[tuple(output.shape[2:])] = output

    def take(self) -> list[Tensor]:
        """Those of the forward before, from the first resolution to the last."""
        maps, self._last = list(self._last.values()), {}
        return maps


def attention(model: nn.Module, images: Tensor, count: int, power: float) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the attention maps (B, H, W) of the last ``count`` resolutions, each of norm 1."""
    with Maps().watch(model) as maps:
        logits = model(images)
    summed = [each.to(logits.dtype).abs().pow(power).sum(1) for each in maps.take()[-count:]]
    return logits, [each / (each.norm(dim=(1, 2), keepdim=True) + 1e-6) for each in summed]


@torch.no_grad()
def check_maps(model: nn.Module, images: Tensor) -> None:
    """Raise unless a model has maps to attend to."""
    with eval_mode(model), Maps().watch(model) as maps:
        model(images)
    if maps.ends_in_tokens or not maps.take():
        found = "ends in tokens" if maps.ends_in_tokens else "has none"
        raise ValueError(f"attention is of feature maps (images, channels, height, width); this model {found}")
