"""Which ops are measured on which shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from benchmarks import network_cases
from benchmarks.cases import (
    Case,
    conv_cases,
    conv_relu_cases,
    dual_conv_cases,
    layer_title,
    linear_cases,
    many_conv_cases,
)
from benchmarks.measure import first_line
from benchmarks.networks import OTHERS, Placed, image_size, layers_of, why_not

LAYERS: dict[type[nn.Module], dict[str, Callable[..., Iterator[Case]]]] = {
    nn.Conv2d: {
        "masked_conv2d": conv_cases,
        "dual_masked_conv2d": dual_conv_cases,
        "masked_conv2d_relu": conv_relu_cases,
        "many_masked_conv2d": many_conv_cases,
    },
    nn.Linear: {"masked_linear": linear_cases},
    nn.MaxPool2d: {"max_pool": network_cases.max_pool_cases},
}
IMAGES = {"prepare_images": network_cases.image_cases, "trigger_step_": network_cases.trigger_cases}
NETWORKS = {"masks": network_cases.mask_cases, "neuron_masks": network_cases.neuron_mask_cases}
LARGE = {"300 million weights": 18, "1 billion weights": 60}
"""Masks of no network, for GPUs alone: so many layers of 4096 x 4096."""
OPS = (*(op for makers in LAYERS.values() for op in makers), *NETWORKS, "relu_bits", *IMAGES, "l1_ball")
"""What can be asked for by name."""


class Entry(NamedTuple):
    """An op on one shape: its cases are made, with their tensors, when they are asked for."""

    op: str
    batch: int
    make: Callable[[], Iterator[Case]]


def plan(
    nets: Sequence[str], batches: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[list[Entry], dict[str, str]]:
    """Every op on every different layer of the networks, and the ops on whole networks, images and triggers.

    returns: the entries; and the networks that can't be built, with the reason
    """
    entries: dict[object, Entry] = {}
    absent: dict[str, str] = {}
    if device.type == "cuda":
        for title, layers in LARGE.items():
            make = partial(network_cases.mask_cases, title, [torch.Size((4096, 4096, 1, 1))] * layers, device)
            entries[title] = Entry("masks", 1, make)
    for batch in batches:
        sizes = {32}
        for net in nets:
            layers = _layers(net, batch)
            if isinstance(layers, str):
                absent[net] = layers
                continue
            sizes.add(image_size(net))
            _add_network(entries, net, layers, batch, dtype, device)
        for size in sorted(sizes):
            for op, make in IMAGES.items():
                entries[op, batch, size] = Entry(op, batch, partial(make, batch, size, dtype, device))
        for shape in ((1, 3, 32, 32), (batch, 3, 32, 32), (1, 3, 224, 224)):
            make = partial(network_cases.l1_cases, shape, device)
            entries.setdefault(("l1_ball", shape), Entry("l1_ball", batch, make))
    return list(entries.values()), absent


def _layers(net: str, batch: int) -> list[Placed] | str:
    """The layers of a network; of another library's that isn't there, or isn't one for this torch, the reason."""
    reason = why_not(net)
    if reason is not None:
        return reason
    try:
        return layers_of(net, batch)
    except (ImportError, RuntimeError) as error:
        if net not in OTHERS:
            raise
        return first_line(error)


def _add_network(
    entries: dict, net: str, layers: list[Placed], batch: int, dtype: torch.dtype, device: torch.device
) -> None:
    for layer, shape in layers:
        title = layer_title(layer, shape)
        for op, make in LAYERS[type(layer)].items():
            entries.setdefault((op, title), Entry(op, batch, partial(make, title, layer, shape, dtype, device)))
    weights = [layer.weight.shape for layer, _ in layers if isinstance(layer, nn.Conv2d)]
    if not weights:
        return
    for op, make in NETWORKS.items():
        entries.setdefault((op, net), Entry(op, batch, partial(make, net, weights, device)))
    largest = max((shape for _, shape in layers if len(shape) == 4), key=math.prod)
    make = partial(network_cases.relu_cases, largest, dtype, device)
    entries.setdefault(("relu_bits", largest), Entry("relu_bits", batch, make))
