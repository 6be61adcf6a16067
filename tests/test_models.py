import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from maskops import models
from maskops.checkpoint import load_state_dict
from maskops.data import load_images

# (model, ACC in percent before purification, on x_test)
PUBLISHED = [("badnets_8", 84.6), ("trojan_sq_2", 84.9), ("l2_inv_0", 84.8)]


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def test_small_vgg_has_the_published_structure():
    features = models.small_vgg().features
    block = [nn.Conv2d, nn.BatchNorm2d, nn.ELU, nn.Conv2d, nn.BatchNorm2d, nn.ELU, nn.MaxPool2d, nn.Dropout]
    assert [type(layer) for layer in features] == block * 3
    assert [features[i].out_channels for i in (0, 3, 8, 11, 16, 19)] == [32, 32, 64, 64, 128, 128]
    assert [features[i].p for i in (7, 15, 23)] == [0.3, 0.4, 0.4]


def test_small_vgg_state_dict_names_only_features_and_classifier():
    names = list(models.small_vgg().state_dict())
    assert names[0] == "features.0.weight"
    assert names[-2:] == ["classifier.weight", "classifier.bias"]
    assert len(names) == 6 * (2 + 5) + 2


@pytest.mark.parametrize(("image_size", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3)])
def test_small_vgg_accepts_other_image_sizes(image_size, channels):
    model = models.small_vgg(num_classes=4, in_channels=channels, image_size=image_size)
    assert model(torch.rand(2, channels, image_size, image_size)).shape == (2, 4)


def test_small_vgg_refuses_images_that_three_poolings_would_empty():
    with pytest.raises(ValueError, match=r"^small_vgg: image_size must be at least 8, .*; got 7$"):
        models.small_vgg(image_size=7)


@pytest.mark.parametrize(
    ("arch", "millions"),
    [("small_vgg", 0.308), ("resnet18", 11.174), ("mobilenet_v2", 2.297), ("shufflenet_v2", 1.264)],
)
def test_network_has_the_known_number_of_parameters(arch, millions):
    count = sum(parameter.numel() for parameter in models.build(arch).parameters())
    assert round(count / 1e6, 3) == millions


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_network_takes_classes_and_channels(arch):
    model = models.build(arch, num_classes=43, in_channels=1).eval()
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 43)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_network_trains_every_parameter(arch):
    model = models.build(arch)
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_network_stays_channels_last_in_every_convolution(arch):
    model = models.build(arch).eval().to(memory_format=torch.channels_last)
    strides = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda _, inputs, output: strides.extend((inputs[0].stride(1), output.stride(1)))
            )
    model(channels_last(torch.rand(2, 3, 32, 32)))
    assert set(strides) == {1}


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_network_computes_the_same_in_both_memory_formats(arch):
    model, images = models.build(arch).double().eval(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = model(images)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(channels_last(images)), expected)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_network_survives_pickling(arch):
    model, images = models.build(arch).eval(), torch.rand(1, 3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), model(images))


def test_residual_networks_have_the_published_shortcuts():
    names = [name for name, layer in models.resnet18().named_modules() if isinstance(layer, nn.Conv2d)]
    assert [name for name in names if "shortcut" in name] == [f"layer{stage}.0.shortcut.0" for stage in (2, 3, 4)]
    mobile = models.mobilenet_v2()
    with_projection = [i for i, block in enumerate(mobile.layers) if isinstance(block.shortcut, nn.Sequential)]
    assert with_projection == [0, 1, 10, 16]


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 4), ("mobilenet_v2", 4), ("shufflenet_v2", 4)])
def test_small_image_network_reaches_the_pooling_with_four_by_four(arch, size):
    model, seen = models.build(arch).eval(), []
    model.pool.register_forward_hook(lambda _, inputs, output: seen.append(tuple(inputs[0].shape[2:])))
    model(torch.rand(1, 3, 32, 32))
    assert seen == [(size, size)]


def test_channel_shuffle_interleaves_two_groups():
    left, right = torch.arange(24.0).reshape(1, 3, 2, 4), torch.arange(24.0, 48.0).reshape(1, 3, 2, 4)
    expected = nn.ChannelShuffle(2)(torch.cat((left, right), dim=1))
    assert torch.equal(models._channel_shuffle(left, right), expected)


def test_build_imports_a_callable(monkeypatch):
    module = types.ModuleType("maskops_test_zoo")
    module.tiny = lambda width: nn.Linear(width, 2)
    module.constant, module.no_module = 3, lambda: 7
    monkeypatch.setitem(sys.modules, "maskops_test_zoo", module)
    assert models.build("maskops_test_zoo:tiny", width=5).in_features == 5
    with pytest.raises(
        ValueError, match=r"^build: 'maskops_test_zoo:constant' is not callable but int; known: small_vgg, "
    ):
        models.build("maskops_test_zoo:constant")
    with pytest.raises(TypeError, match=r"^build: 'maskops_test_zoo:no_module' must return an nn.Module; got int$"):
        models.build("maskops_test_zoo:no_module")


@pytest.mark.parametrize("arch", ["vgg", "", ":small_vgg", "maskops.models:", "maskops.models"])
def test_build_names_the_known_architectures(arch):
    known = 'known: small_vgg, resnet18, mobilenet_v2, shufflenet_v2, or "package.module:callable"'
    with pytest.raises(ValueError, match=f"^build: no architecture is named {arch!r}; {known}$"):
        models.build(arch)


@pytest.mark.parametrize("arch", ["no_such_package.zoo:net", "maskops.models:no_such_net"])
def test_build_says_what_cannot_be_imported(arch):
    with pytest.raises(ImportError, match=rf"^build: cannot import '{arch}' \(.*no_such.*\); known: small_vgg, "):
        models.build(arch)


@pytest.mark.skipif("MASKOPS_BENCH" not in os.environ, reason="MASKOPS_BENCH names no folder of published models")
@pytest.mark.parametrize(("name", "percent"), PUBLISHED)
def test_published_small_vgg_loads_strictly_and_keeps_its_accuracy(name, percent):
    folder = Path(os.environ["MASKOPS_BENCH"])
    model = models.small_vgg().eval()
    model.load_state_dict(load_state_dict(folder / f"vgg_cifar10_{name}.pth"), strict=True)
    images, labels = load_images(f"{folder / 'cifar10_original.npz'}:test")
    with torch.inference_mode():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    assert 100 * accuracy == pytest.approx(percent, abs=0.5)
