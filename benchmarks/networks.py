"""The networks that are measured: ours for images of 32 x 32, and other libraries' for those of 224 x 224."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskops import models

OTHERS = {
    "resnet50": ("torchvision.models:resnet50", "transformers:ResNet"),
    "mobilenet_v2_224": ("torchvision.models:mobilenet_v2",),
    "shufflenet_v2_x1_0": ("torchvision.models:shufflenet_v2_x1_0",),
    "convnext_l": ("timm.models:convnext_large", "transformers:ConvNext"),
    "convnext_xl": ("timm.models:convnext_xlarge", "transformers:ConvNext"),
    "vit_l": ("timm.models:vit_large_patch16_224", "transformers:ViT"),
    "vit_h": ("timm.models:vit_huge_patch14_224", "transformers:ViT"),
    "vit_g": ("timm.models:vit_giant_patch14_224", "transformers:ViT"),
}
"""Networks of other libraries, for images of 224 x 224: the first that is installed, as :func:`maskops.models.build`
names it, or by its configuration in transformers."""
CONFIGURATIONS = {
    "resnet50": {},
    "convnext_l": {"depths": [3, 3, 27, 3], "hidden_sizes": [192, 384, 768, 1536]},
    "convnext_xl": {"depths": [3, 3, 27, 3], "hidden_sizes": [256, 512, 1024, 2048]},
    "vit_l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "vit_h": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
        "patch_size": 14,
    },
    "vit_g": {
        "hidden_size": 1408,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "intermediate_size": 6144,
        "patch_size": 14,
    },
}
"""What makes a network of transformers the one of that name; its ResNet is the 50 layers deep one by itself."""
TRANSFORMERS = ("convnext", "vit")
"""Networks that are linear layers for the most part, which are masked too."""

Placed = tuple[nn.Module, tuple[int, ...]]
"""A layer and the shape of its input."""


def why_not(net: str) -> str | None:
    """Which library the network needs, where that is missing."""
    libraries = [place.partition(":")[0].split(".")[0] for place in OTHERS.get(net, ())]
    if not libraries or any(find_spec(library) for library in libraries):
        return None
    return f"it needs {' or '.join(libraries)}, which is not installed"


def build(net: str) -> nn.Module:
    """A network by name: one of ``OTHERS``, or one that :func:`maskops.models.build` knows; with random weights."""
    for place in OTHERS.get(net, ()):
        library, _, name = place.partition(":")
        if find_spec(library.split(".")[0]):
            return _of_transformers(net, name) if library == "transformers" else models.build(place)
    return models.build(net)


def build_without_data(net: str) -> nn.Module:
    """The network on the meta device."""
    with torch.device("meta"), _NumbersOnTheCPU():
        return build(net)


def _of_transformers(net: str, kind: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**CONFIGURATIONS[net], num_labels=1000)
    return Logits(getattr(transformers, f"{kind}ForImageClassification")(config))


class Logits(nn.Module):
    """A classifier of transformers, whose output holds more than the logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(pixel_values=images).logits


def image_size(net: str) -> int:
    return 224 if net in OTHERS else 32


def usual_batch(net: str) -> int:
    """128 on images of 32 x 32, as published; 64 on larger ones, and 32 through networks that need the memory."""
    if net not in OTHERS:
        return 128
    return 32 if net.startswith(TRANSFORMERS) else 64


def masked_kinds(net: str) -> tuple[str, ...]:
    """Which layers are masked, as :func:`maskops.mask_` names them."""
    return ("conv", "linear") if net.startswith(TRANSFORMERS) else ("conv",)


def masked_layers(net: str, model: nn.Module) -> dict[str, nn.Module]:
    """The layers that :func:`masked_kinds` means, by name.

    A linear layer that another module reads the weight of, as torch's own attention does, is left out: its forward,
    which would apply the mask, never runs.
    """
    kinds = (nn.Conv2d, nn.Linear) if "linear" in masked_kinds(net) else (nn.Conv2d,)
    return {name: module for name, module in model.named_modules() if type(module) in kinds}


def layers_of(net: str, batch: int) -> list[Placed]:
    """The convolutions, linear layers and max-pools of a network; of a transformer its linear layers alone."""
    kinds = (nn.Linear,) if net.startswith("vit") else (nn.Conv2d, nn.Linear, nn.MaxPool2d)
    found: list[Placed] = []
    size = image_size(net)
    model, images = build_without_data(net), torch.empty(batch, 3, size, size, device="meta")
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda layer, inputs, output: found.append((layer, tuple(inputs[0].shape))))
    with torch.device("meta"), _NumbersOnTheCPU():
        model.eval()(images)
    return found


class _NumbersOnTheCPU(TorchFunctionMode):
    """Depths are spread over layers by a linspace whose numbers are read, which nothing without data can be."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {**(kwargs or {}), **({"device": "cpu"} if func is torch.linspace else {})}
        return func(*args, **kwargs)
