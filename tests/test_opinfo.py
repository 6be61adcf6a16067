"""torch's own samples: under a mask of ones every masked function is the plain one, and refuses what that refuses."""

from typing import NamedTuple

import pytest
import torch
from helpers import DEVICE, largest
from torch import Tensor

from maskops import functional

opinfo = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations", reason="torch's samples need expecttest"
)

FUNCTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear")
OPS = {op.name.removeprefix("nn.functional."): op for op in opinfo.op_db}


class Call(NamedTuple):
    """The arguments of a plain function, and those of its masked sister with a mask of ones."""

    plain: tuple
    masked: tuple
    options: dict


def call(sample) -> Call:
    weight, *rest = sample.args
    ones = torch.ones_like(weight, dtype=weight.dtype if weight.is_floating_point() else torch.float32)
    return Call((sample.input, weight, *rest), (sample.input, weight, ones, *rest), sample.kwargs)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masked_function_agrees_with_torch_on_all_its_samples(name, dtype):
    plain, masked = getattr(torch.nn.functional, name), getattr(functional, f"masked_{name}")
    samples = [call(sample) for sample in OPS[name].sample_inputs(DEVICE, dtype, requires_grad=True)]
    assert len(samples) >= 10
    for sample in samples:
        expected = plain(*sample.plain, **sample.options)
        actual = masked(*sample.masked, **sample.options)
        leaves = [argument for argument in sample.plain if isinstance(argument, Tensor)]
        upstream = torch.randn_like(expected)
        assert actual.shape == expected.shape
        assert actual.stride() == expected.stride()
        for one, other in zip(
            (actual, *torch.autograd.grad(actual, leaves, upstream)),
            (expected, *torch.autograd.grad(expected, leaves, upstream)),
            strict=True,
        ):
            assert largest(one - other) <= 4 * torch.finfo(dtype).eps * largest(other)


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d"])
def test_masked_function_refuses_what_torch_refuses(name):
    plain, masked = getattr(torch.nn.functional, name), getattr(functional, f"masked_{name}")
    refused = [call(error.sample_input) for error in OPS[name].error_inputs(DEVICE)]
    assert len(refused) >= 10
    for sample in refused:
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            plain(*sample.plain, **sample.options)
        with pytest.raises((TypeError, ValueError), match=f"^masked_{name}: .*; got "):
            masked(*sample.masked, **sample.options)
