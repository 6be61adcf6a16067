"""What the tests of the ops share: every op on every backend against plain torch, and ways to watch what is kept."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rand(*size: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """Normal random numbers, the same in every dtype up to rounding."""
    return torch.randn(size, dtype=torch.float64).to(DEVICE, dtype).requires_grad_(grad)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_weight(weight: Tensor, mask: Tensor, noise: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The effective weight as anyone would write it."""
    return (weight * (mask if noise is None else mask + noise)).to(dtype or weight.dtype)


def plain_layer(layer, input, weight, mask, noise=None, bias=None, **options):
    """A layer of torch.nn.functional over the effective weight; for ``check``, with the layer bound by partial."""
    bias = bias if bias is None else bias.to(input.dtype)
    return layer(input, plain_weight(weight, mask, noise, input.dtype), bias, **options)


def plain_dual(layer, input, weight, mask, noise=None, bias=None, perturbed_input=None, **options):
    """The two calls that a dual op stands for."""
    perturbed_input = input if perturbed_input is None else perturbed_input
    clean = plain_layer(layer, input, weight, mask, None, bias, **options)
    return clean, plain_layer(layer, perturbed_input, weight, mask, noise, bias, **options)


def check(op, plain, inputs: dict[str, Tensor], backend: str | None, exact: bool = False) -> None:
    """Forward and every gradient of ``op`` on ``backend`` by FlashAttention's rule.

    The truth is ``plain`` in float64. The op's error may be at most twice the error of ``plain`` in the dtypes of the
    inputs, plus a few units in the last place; with ``exact``, the outputs are those of ``plain`` bit for bit.
    Dtypes, shapes and strides are those of ``plain`` in any case. New tensors are poisoned with NaN.
    """
    expected = outputs_and_gradients(plain, inputs)
    truth = outputs_and_gradients(plain, {name: tensor.double() for name, tensor in inputs.items()}, expected)
    try:
        with poisoned():
            actual = outputs_and_gradients(partial(op, backend=backend), inputs, expected)
    except RuntimeError as error:
        if "was asked for, but" not in str(error):
            raise
        pytest.skip(str(error))
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        plain_value = expected[name]
        if value is None or plain_value is None:
            assert value is plain_value, name
            continue
        assert (value.dtype, value.shape) == (plain_value.dtype, plain_value.shape), name
        is_output = name.startswith("output")
        if is_output:
            assert value.stride() == plain_value.stride(), name
        if is_output and exact:
            assert torch.equal(value, plain_value), name
        slack = 4 * torch.finfo(value.dtype).eps * largest(truth[name])
        error, allowed = largest(value - truth[name]), 2 * largest(plain_value - truth[name]) + slack
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def outputs_and_gradients(op, inputs: dict[str, Tensor], like: dict | None = None) -> dict[str, Tensor | None]:
    """``output 0``, … and ``gradient of input``, …, for random output gradients in the dtypes of ``like``'s outputs."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = op(**leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(1)
    upstream = []
    for index, output in enumerate(outputs):
        dtype = output.dtype if like is None else like[f"output {index}"].dtype
        random = torch.randn(output.shape, dtype=torch.float64, generator=generator)
        upstream.append(random.to(dtype).to(output))
    gradients = torch.autograd.grad(outputs, tuple(leaves.values()), upstream, allow_unused=True)
    result = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return result | {f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}


@contextmanager
def poisoned():
    """Deterministic torch, in which memory that nobody has written to holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def largest(tensor: Tensor) -> float:
    return tensor.double().abs().max().item() if tensor.numel() else 0.0


def saved_for_backward(function) -> list[Tensor]:
    """The tensors that the graph of ``function()`` keeps."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return saved


class Calls(TorchDispatchMode):
    """Records the name and the arguments of every op that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func._schema.name, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def arguments(self, name: str) -> list[tuple]:
        """The arguments of each call of the op of this name, such as ``"aten::convolution_backward"``."""
        return [args for called, args, _ in self.calls if called == name]

    def backends(self, name: str) -> list[str | None]:
        """The backend that each call of the op asked for."""
        return [kwargs.get("backend") for called, _, kwargs in self.calls if called == name]


def relative_error(value: Tensor, expected: Tensor) -> float:
    return largest(value - expected) / max(largest(expected), 1e-300)


class InfiniteSlope(nn.Module):
    """A loss of it is a number, its gradient in the weight of ``unused`` isn't: the root of 0 has an infinite slope."""

    def __init__(self):
        super().__init__()
        self.conv, self.unused = nn.Conv2d(2, 3, 3, bias=False), nn.Conv2d(2, 3, 1, bias=False)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) + (self.unused(x.detach() * 0)).square().mean((2, 3)).sqrt()


def tiny_network(channels=2, classes=3):
    """Convolutions with and without bias and batch norm, a residual, strides and a linear layer, in float64."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            return F.relu(x + self.bn(self.conv(x)))

    net = nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ELU(inplace=True),
        Block(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net.double().train()
