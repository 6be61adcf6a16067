"""What the tests of the lean mode share: the ops that it replaces, and plain torch to compare with."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from helpers import DEVICE
from torch import nn

from maskops import lean_autograd
from maskops.lean import saved_bytes

channels_last = partial(torch.Tensor.contiguous, memory_format=torch.channels_last)


def frozen(module):
    """The module in eval mode with random frozen state, so that no factor is 1 and no offset 0."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for state in (norm.weight, norm.running_var):
                if state is not None:
                    nn.init.uniform_(state, 0.5, 2.0)
            for state in (norm.bias, norm.running_mean):
                if state is not None:
                    nn.init.normal_(state)
    return module.to(DEVICE).eval().requires_grad_(False)


def state(module):
    return [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []


def run(function, input, mode=nullcontext):
    """Output, gradient of the input, bytes saved."""
    input = input.detach().requires_grad_()
    with mode():
        saved = saved_bytes(lambda: function(input), exclude=state(function))
        output = function(input)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    output.backward(torch.empty_like(output).copy_(grad))
    return output.detach(), input.grad, saved


def assert_same(function, input, rounding=0.0):
    """Outputs bit for bit, and gradients to within ``rounding``; the bytes saved by plain torch and in the mode."""
    output, grad, saved = run(function, input)
    lean_output, lean_grad, lean_saved = run(function, input, lean_autograd)
    assert torch.equal(lean_output, output) and lean_output.stride() == output.stride()
    assert lean_output.dtype == output.dtype and lean_grad.dtype == grad.dtype
    if rounding:
        torch.testing.assert_close(lean_grad, grad, rtol=0, atol=rounding)
    else:
        assert torch.equal(lean_grad, grad)
    assert lean_grad.stride() == grad.stride()
    return saved, lean_saved


def assert_plain(function, *tensors):
    """The same graph as without the mode."""

    def graph(mode):
        with mode():
            node = function(*tensors).grad_fn
        names = []
        while node is not None:
            names.append(node.name())
            node = node.next_functions[0][0] if node.next_functions else None
        return names

    assert graph(lean_autograd) == graph(nullcontext)


BITS = 2 * 6 * 9 * 8 // 8  # bytes of the input of the ops below, one bit each
WINDOWS = 2 * 6 * 4 * 4
IMAGE_OPS = {  # function, bytes saved in the mode
    "F.relu": (F.relu, BITS),
    "torch.relu": (torch.relu, BITS),
    "Tensor.relu": (lambda x: x.relu(), BITS),
    "relu(inplace)": (lambda x: F.relu(x * 1, inplace=True), BITS),
    "torch.relu_": (lambda x: torch.relu_(x * 1), BITS),
    "Tensor.relu_": (lambda x: (x * 1).relu_(), BITS),
    "F.relu_": (lambda x: F.relu_(x * 1), BITS),
    "ReLU": (nn.ReLU(), BITS),
    "ReLU(inplace)": (lambda x: nn.ReLU(inplace=True)(x * 1), BITS),
    "relu_ of a view": (lambda x: (x * 1)[:, 1:].relu_(), 2 * 5 * 9 * 8 // 8),
    "F.relu6": (F.relu6, BITS),
    "ReLU6(inplace)": (lambda x: nn.ReLU6(inplace=True)(x * 1), BITS),
    "F.hardtanh": (lambda x: F.hardtanh(x, 0, 2), BITS),
    "F.hardtanh_": (lambda x: F.hardtanh_(x * 1, 0.0, 2.0), BITS),
    "Hardtanh": (nn.Hardtanh(0.0, 1.0), BITS),
    "F.max_pool2d": (lambda x: F.max_pool2d(x, 2), WINDOWS),
    "torch.max_pool2d": (lambda x: torch.max_pool2d(x, (2, 2), stride=[]), WINDOWS),
    "MaxPool2d": (nn.MaxPool2d(3, stride=2, padding=1), 2 * 6 * 5 * 4),
    "MaxPool2d(ceil_mode)": (nn.MaxPool2d((3, 2), (2, 3), (1, 0), (1, 2), ceil_mode=True), 2 * 6 * 5 * 3),
    "F.avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), 0),
    "AvgPool2d": (nn.AvgPool2d((3, 2), padding=(1, 0), divisor_override=5), 0),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d((3, None)), 0),
    "BatchNorm2d": (frozen(nn.BatchNorm2d(6)), 0),
    "BatchNorm2d(affine=False)": (frozen(nn.BatchNorm2d(6, eps=0.1, affine=False)), 0),
    "Conv2d": (frozen(nn.Conv2d(6, 5, 3)), 0),
    "Conv2d(all)": (frozen(nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 2), (1, 2), groups=2, bias=False)), 0),
    "Conv2d(depthwise)": (frozen(nn.Conv2d(6, 6, 3, padding=1, groups=6)), 0),
    "Conv2d(same)": (frozen(nn.Conv2d(6, 5, (3, 5), padding="same", dilation=(2, 1))), 0),
    "Conv2d(valid)": (frozen(nn.Conv2d(6, 5, 3, padding="valid")), 0),
    "ConvTranspose2d": (frozen(nn.ConvTranspose2d(6, 4, 3, (2, 1), 1, (1, 0), groups=2)), 0),
}
