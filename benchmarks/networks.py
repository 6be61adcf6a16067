"""The networks that layers are taken from: built without memory, and run once on images without data."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from maskops.models import build

OTHERS = {
    "resnet50": "torchvision.models:resnet50",
    "mobilenet_v2_224": "torchvision.models:mobilenet_v2",
    "shufflenet_v2_x1_0": "torchvision.models:shufflenet_v2_x1_0",
    "convnext_large": "timm.models:convnext_large",
    "vit_large_patch16_224": "timm.models:vit_large_patch16_224",
}
"""Networks of other libraries, for images of 224 x 224, as :func:`maskops.models.build` names them."""

Placed = tuple[nn.Module, tuple[int, ...]]
"""A layer and the shape of its input."""


def why_not(net: str) -> str | None:
    """Which library the network needs, where that is missing."""
    if net not in OTHERS:
        return None
    library = OTHERS[net].partition(":")[0].split(".")[0]
    return None if find_spec(library) else f"it needs {library}, which is not installed"


def image_size(net: str) -> int:
    return 224 if net in OTHERS else 32


def layers_of(net: str, batch: int) -> list[Placed]:
    """The convolutions, linear layers and max-pools of a network; of a transformer its linear layers alone."""
    kinds = (nn.Linear,) if net.startswith("vit") else (nn.Conv2d, nn.Linear, nn.MaxPool2d)
    found: list[Placed] = []
    size = image_size(net)
    with torch.device("meta"), _NumbersOnTheCPU():
        model, images = build(OTHERS.get(net, net)), torch.empty(batch, 3, size, size)
        for module in model.modules():
            if isinstance(module, kinds):
                module.register_forward_hook(
                    lambda layer, inputs, output: found.append((layer, tuple(inputs[0].shape)))
                )
        model.eval()(images)
    return found


class _NumbersOnTheCPU(TorchFunctionMode):
    """Depths are spread over layers by a linspace whose numbers are read, which nothing without data can be."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {**(kwargs or {}), **({"device": "cpu"} if func is torch.linspace else {})}
        return func(*args, **kwargs)
