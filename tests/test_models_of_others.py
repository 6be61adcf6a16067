"""Models that know nothing of masks, from libraries that this project doesn't depend on, built small and at random."""

import pytest
import torch
from helpers import DEVICE, rand, relative_error
from torch import nn

from maskops import fold_, mask_, masks
from maskops.checkpoint import load_state_dict, save_state_dict
from maskops.nn import MASKED
from maskops.purify import awm

KINDS = {"conv": ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d"), "linear": ("Linear",)}
KINDS["norm"] = ("BatchNorm1d", "BatchNorm2d", "LayerNorm")


def transformers(name, **config):
    def make():
        library = pytest.importorskip("transformers", reason="transformers is not installed")
        configuration = getattr(library, f"{name}Config")(num_labels=5, **config)
        return getattr(library, f"{name}ForImageClassification")(configuration)

    return make


def torchvision(name, **arguments):
    def make():
        library = pytest.importorskip("torchvision", reason="torchvision is not installed")
        return getattr(library.models, name)(**arguments)

    return make


def timm(name, **arguments):
    def make():
        library = pytest.importorskip("timm", reason="timm is not installed")
        return library.create_model(name, pretrained=False, num_classes=5, **arguments)

    return make


VIT = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "transformers ResNet": transformers("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "transformers ConvNext": transformers("ConvNext", hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], patch_size=2),
    "transformers ViT": transformers("ViT", image_size=32, patch_size=16, **TINY_VIT),
    "transformers MobileNetV2": transformers("MobileNetV2", depth_multiplier=0.1, min_depth=4, image_size=32),
    "torchvision resnet18": torchvision("resnet18"),
    "torchvision mobilenet_v2": torchvision("mobilenet_v2", width_mult=0.25),
    "torchvision VisionTransformer": torchvision("VisionTransformer", **VIT),
    "timm resnet10t": timm("resnet10t"),
    "timm convnext_atto": timm("convnext_atto"),
    "timm vit_tiny_patch16_224": timm("vit_tiny_patch16_224", img_size=32, depth=2),
    "timm efficientnet_b0": timm("efficientnet_b0"),
}


def build(name):
    model = MODELS[name]().eval().to(DEVICE).requires_grad_(False)
    for module in model.modules():
        # statistics other than 0 and 1, so that a forgotten buffer shows
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.2, 0.2), module.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        # torchvision's ViT begins with a head of zeros, which would hide all before it
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def logits(model, images):
    output = model(images)
    return output if isinstance(output, torch.Tensor) else output.logits


def maskable(model, kind):
    """The names of the layers that are exactly torch's, and of the others that would be refused."""
    plain = tuple(getattr(nn, name) for name in KINDS[kind])
    layers = {name: module for name, module in model.named_modules() if isinstance(module, plain)}
    exact = [name for name, module in layers.items() if type(module) in MASKED and module.weight is not None]
    return exact, [name for name in layers if name not in exact]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_mask_run_learn_and_fold(name, kind):
    model, images = build(name), rand(2, 3, 32, 32)
    before = {module_name: type(module) for module_name, module in model.named_modules()}
    keys = list(model.state_dict())
    exact, others = maskable(model, kind)
    if not exact:
        pytest.skip(f"{name} has no {kind} layer of torch's own")
    with torch.no_grad():
        expected = logits(model, images)
    if others:
        with pytest.raises(ValueError, match="a subclass with code of its own"):
            mask_(model, layers=kind)
    mask_(model, layers=kind, exclude=others)
    assert len(masks(model)) == len(exact)
    with torch.no_grad():
        assert torch.equal(logits(model, images), expected)
        for mask in masks(model).values():
            mask.uniform_(0.5, 1)
    masked = logits(model, images)
    assert relative_error(masked, expected) > 1e-5
    masked.square().sum().backward()
    assert all(mask.grad is not None and mask.grad.isfinite().all() for mask in masks(model).values())
    assert any(mask.grad.any() for mask in masks(model).values())
    with torch.no_grad():
        assert relative_error(logits(fold_(model), images), masked) < 1e-5
    assert {module_name: type(module) for module_name, module in model.named_modules()} == before
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["timm resnet10t", "timm vit_tiny_patch16_224", "transformers ResNet"])
def test_a_purified_model_is_loaded_into_its_class(name, tmp_path):
    model, images = build(name), rand(4, 3, 32, 32)
    clean = images.sigmoid(), torch.arange(4) % 2
    short = {"epochs": 1, "inner_steps": 1, "outer_steps": 1, "lr": 0.2, "progress": False}
    purified = awm(model, clean, layers=("conv", "linear"), exclude=maskable(model, "conv")[1], **short).model
    assert type(purified) is type(model) and list(purified.state_dict()) == list(model.state_dict())
    save_state_dict(tmp_path / "purified.safetensors", purified.state_dict())
    again = MODELS[name]().eval().to(DEVICE)
    again.load_state_dict(load_state_dict(tmp_path / "purified.safetensors"))
    with torch.no_grad():
        expected, before = logits(purified, images), logits(model, images)
        assert torch.equal(logits(again, images), expected) and not torch.allclose(expected, before)
