"""Steps on tensors without data: how a plan finds out what memory a purification needs."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn.parameter import Parameter

PLAIN = Tensor, FakeTensor
"""The types of tensors that are no subclass with a behaviour of its own."""


def has_data() -> bool:
    """Whether there are numbers that can be looked at."""
    return detect_fake_mode() is None


def on_host() -> AbstractContextManager[object]:
    """Within, tensors are made with data, also where others are not."""
    return unset_fake_temporarily()


def fake_copy(model: nn.Module) -> nn.Module:
    """A model of the same structure over tensors without data, on the CPU; within a FakeTensorMode."""

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    memo: dict[int, Tensor] = {id(buffer): fake(buffer) for buffer in model.buffers()}
    memo |= {id(value): Parameter(fake(value), requires_grad=value.requires_grad) for value in model.parameters()}
    return copy.deepcopy(model, memo)
