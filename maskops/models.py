"""The small networks of the AWM paper, as plain torch.nn models.

None of them knows about masks: maskops masks any model in place, from outside. Images come in [0, 1], and no network
normalises them. Parameters are named as in the published AWM code, whose state dicts then load strictly.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def small_vgg(num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """Three blocks of (conv 3x3, batch norm, ELU) twice, max-pool and dropout; 32, 64, 128 channels; one linear layer.

    image_size: height and width of the images, at least 8; the linear layer sees 128 * (image_size // 8)**2 features
    source:     AWM (Chai & Chen 2022), section 5, "small VGG"; batch-normalised after Simonyan & Zisserman (2015)

    >>> small_vgg(num_classes=43)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 43])
    """
    if image_size < 8:
        raise ValueError(f"small_vgg: image_size must be at least 8, for three poolings by 2; got {image_size}")
    features = nn.Sequential()
    for width, dropout in ((32, 0.3), (64, 0.4), (128, 0.4)):
        for channels in (in_channels, width):
            features.append(nn.Conv2d(channels, width, 3, padding=1))
            features.append(nn.BatchNorm2d(width))
            features.append(nn.ELU(inplace=True))
        features.append(nn.MaxPool2d(2))
        features.append(nn.Dropout(dropout))
        in_channels = width
    classifier = nn.Linear(128 * (image_size // 8) ** 2, num_classes)
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))


def resnet18(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-18 for small images: stem 3x3 with stride 1, no max-pool, four stages of two basic blocks.

    source: He et al. (2016), Table 1 and Figure 2; projection shortcuts (option B); stem for CIFAR as in the AWM code

    >>> resnet18()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def stage(before: int, width: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(before, width, stride), BasicBlock(width, width, 1))

    return nn.Sequential(
        OrderedDict(
            conv1=_conv(in_channels, 64, 3),
            bn1=nn.BatchNorm2d(64),
            relu=nn.ReLU(inplace=True),
            layer1=stage(64, 64, 1),
            layer2=stage(64, 128, 2),
            layer3=stage(128, 256, 2),
            layer4=stage(256, 512, 2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(512, num_classes),
        )
    )


def mobilenet_v2(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """MobileNetV2 for small images: stem and second stage with stride 1, so 32x32 images reach the head as 4x4.

    source: Sandler et al. (2018), Table 2. As in the published AWM models, and unlike the paper, ReLU stands for ReLU6,
    the first block keeps its 1x1 expansion (by 1), and a stride-1 block that changes width has a projection shortcut.

    >>> mobilenet_v2()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    blocks = nn.Sequential()
    before = 32
    # Table 2: expansion t, channels c, repeats n, stride s of the first
    for expansion, width, repeats, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for repeat in range(repeats):
            blocks.append(InvertedResidual(before, width, expansion, stride if repeat == 0 else 1))
            before = width
    return nn.Sequential(
        OrderedDict(
            conv1=_conv(in_channels, 32, 3),
            bn1=nn.BatchNorm2d(32),
            relu1=nn.ReLU(inplace=True),
            layers=blocks,
            conv2=_conv(320, 1280, 1),
            bn2=nn.BatchNorm2d(1280),
            relu2=nn.ReLU(inplace=True),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(1280, num_classes),
        )
    )


def shufflenet_v2(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ShuffleNetV2 1x for small images: stem with stride 1, no max-pool, stages of 4, 8 and 4 units.

    source: Ma et al. (2018), Table 5 (1x) and Figure 3 (c), (d); stem for CIFAR as in the AWM code (which builds 0.5x)

    >>> shufflenet_v2()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def stage(before: int, width: int, units: int) -> nn.Sequential:
        return nn.Sequential(DownUnit(before, width), *(ShuffleUnit(width) for _ in range(units - 1)))

    return nn.Sequential(
        OrderedDict(
            conv1=_conv(in_channels, 24, 3),
            bn1=nn.BatchNorm2d(24),
            relu1=nn.ReLU(inplace=True),
            layer1=stage(24, 116, 4),
            layer2=stage(116, 232, 8),
            layer3=stage(232, 464, 4),
            conv2=_conv(464, 1024, 1),
            bn2=nn.BatchNorm2d(1024),
            relu2=nn.ReLU(inplace=True),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(1024, num_classes),
        )
    )


class BasicBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), with a 1x1 projection of x where the shape changes."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(before, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if (before, stride) == (width, 1) else _projection(before, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 bottleneck; a shortcut where the stride is 1."""

    def __init__(self, before: int, width: int, expansion: int, stride: int):
        super().__init__()
        inner = expansion * before
        self.stride = stride
        self.conv1, self.bn1 = _conv(before, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, inner, 3, stride, groups=inner), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = _conv(inner, width, 1), nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 2 or before == width else _projection(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.stride == 1 else out


class ShuffleUnit(nn.Module):
    """Half of the channels pass, the other half goes through 1x1, depthwise 3x3 and 1x1; then both are interleaved."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = _conv(half, half, 1), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _conv(half, half, 3, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        right = F.relu(self.bn1(self.conv1(right)), inplace=True)
        right = self.bn2(self.conv2(right))
        right = F.relu(self.bn3(self.conv3(right)), inplace=True)
        return _channel_shuffle(left, right)


class DownUnit(nn.Module):
    """Both branches see all channels and halve the resolution; interleaved they are the new width."""

    def __init__(self, before: int, width: int):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = _conv(before, before, 3, 2, groups=before), nn.BatchNorm2d(before)
        self.conv2, self.bn2 = _conv(before, half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(before, half, 1), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = _conv(half, half, 3, 2, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = _conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return _channel_shuffle(left, right)


def _channel_shuffle(left: Tensor, right: Tensor) -> Tensor:
    """Concatenation and channel shuffle with two groups in one copy: channels left 0, right 0, left 1, right 1, …"""
    # written over NHWC: the usual view and transpose would hand an NCHW tensor to a channels_last model
    channels_last = torch.stack((left.permute(0, 2, 3, 1), right.permute(0, 2, 3, 1)), dim=-1).flatten(-2)
    return channels_last.permute(0, 3, 1, 2)


def _conv(before: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, width, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _projection(before: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_conv(before, width, 1, stride), nn.BatchNorm2d(width))


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "small_vgg": small_vgg,
    "resnet18": resnet18,
    "mobilenet_v2": mobilenet_v2,
    "shufflenet_v2": shufflenet_v2,
}


def build(arch: str, **kwargs) -> nn.Module:
    """A network by name: one of ``ARCHITECTURES``, or ``"package.module:callable"``, which is imported and called.

    kwargs: handed to the callable, e.g. ``num_classes=43``
    errors: ValueError for an unknown name, ImportError for what cannot be imported, TypeError for what is no nn.Module

    >>> build("small_vgg", image_size=8).classifier.in_features
    128
    >>> build("torch.nn:Linear", in_features=3, out_features=2)
    Linear(in_features=3, out_features=2, bias=True)
    """
    model = (ARCHITECTURES.get(arch) or _imported(arch))(**kwargs)
    if not isinstance(model, nn.Module):
        raise TypeError(f"build: {arch!r} must return an nn.Module; got {type(model).__name__}")
    return model


def _imported(arch: str) -> Callable[..., nn.Module]:
    known = f'known: {", ".join(ARCHITECTURES)}, or "package.module:callable"'
    module_name, colon, attribute = arch.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"build: no architecture is named {arch!r}; {known}")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"build: cannot import {arch!r} ({error}); {known}") from error
    if not callable(factory):
        raise ValueError(f"build: {arch!r} is not callable but {type(factory).__name__}; {known}")
    return factory
