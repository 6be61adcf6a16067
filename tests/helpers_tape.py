"""What the tests of the tape share: networks that differ in what lies between their layers, and autograd's answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from test_working import with_statistics
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from maskops.purify._tape import Tape, segments

DOUBLE = {"dtype": torch.float64}


class Net(nn.Module):
    """Two convolutions and a linear layer, for forwards that differ in what lies between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        return self.linear(self.between(self.first(x)).mean((2, 3)))


class ReadTwice(Net):
    def between(self, x):
        y = F.relu(x)
        return y * torch.sigmoid(self.second(y)) + y


class ReadByTwo(Net):
    """A convolution's output before and after its ReLU."""

    def between(self, x):
        return F.relu(x) + self.second(x)


class SharedWeights(Net):
    def between(self, x):
        return F.relu(self.second(F.relu(self.second(F.relu(x)))))


class InPlace(Net):
    def between(self, x):
        x = F.relu_(x)
        y = self.second(x)
        y += x
        return F.relu(y, inplace=True)


class Doubled(Net):
    def between(self, x):
        x = torch.relu(x)
        x = F.relu(x + x)
        y = self.second(x)
        return y.add_(x).relu_()


class ReLU6(Net):
    def between(self, x):
        return F.relu6(self.second(F.hardtanh(3 * x, 0, 2)) + x) * 2


class Functional(Net):
    """Layers by their functions; ``same`` padding, groups, stride and dilation."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 2, 3, 3))

    def forward(self, x):
        x = F.conv2d(x, self.first.weight, self.first.bias, 1, "same", 2)
        x = torch.conv2d(F.relu(x), self.weight, stride=2, groups=4)
        x = F.max_pool2d(F.elu(x), 2)
        return F.linear(x.mean((2, 3)), self.linear.weight, bias=self.linear.bias)


class Pieces(Net):
    """Views, lists of tensors, sizes, an extra argument."""

    def forward(self, x, scale=None, times: int = 1):
        a, b = F.relu(self.first(x)).chunk(2, dim=1)
        x = torch.cat([b, self.second(torch.cat((a, b), 1)), a], dim=1)
        x = x.view(x.size(0), 2, -1, x.shape[2], x.shape[3]).mean(1) * times
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Means(Net):
    """The mean of each channel in other ways."""

    def forward(self, x):
        x = F.relu(self.first(x))
        pooled = F.adaptive_avg_pool2d(x, 1)
        x = F.relu(self.second(x * torch.mean(x, [-1, 2], keepdim=True))) + pooled
        return self.linear(nn.functional.adaptive_avg_pool2d(x, (1, 1)).flatten(1) + x.mean((-2, -1)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.position = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.randn(1, 4, 8))
        self.before, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.relu(self.up(self.after(x))))
        return self.head(x[:, 0])


def many_layers():
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Dropout(0.4), nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        *(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.PReLU(), nn.Dropout2d(0.3, inplace=True)),
        *(nn.Identity(), nn.Flatten(), nn.LazyLinear(6), nn.BatchNorm1d(6), nn.ReLU6(), nn.Linear(6, 5)),
    )


TOYS = (
    ReadTwice,
    ReadByTwo,
    SharedWeights,
    InPlace,
    Doubled,
    ReLU6,
    Functional,
    Pieces,
    Means,
    Transformer,
    many_layers,
)


def made(build, size=8):
    torch.manual_seed(0)
    network = build()
    network(torch.rand(2, 3, size, size))
    return with_statistics(network)


def images(size=8, batch=3):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1), **DOUBLE)


def gradients(function, network, x, learned=True, of_images=True, of_shared=True):
    """Logits, and the gradients of the images, of a trigger and of all parameters."""
    for parameter in network.parameters():
        parameter.requires_grad_(learned)
        parameter.grad = None
    x = x.clone().requires_grad_(of_images)
    trigger = torch.zeros_like(x[:1]).requires_grad_(of_shared)
    torch.manual_seed(3)
    logits = function(x, trigger)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (logits * weights.to(logits)).sum().backward()
    found = {"logits": logits.detach(), "images": x.grad, "trigger": trigger.grad}
    return found | {name: parameter.grad for name, parameter in network.named_parameters()}


def assert_same(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (found[name] is None), name
        if value is not None:
            error = (found[name] - value).abs().max()
            assert error <= tolerance * value.abs().max().clamp_min(1e-6), f"{name}: {error}"


def check(network, x, tolerance=1e-10, **how):
    """The tape against autograd, both gates, and the gates against each other; returns the tape."""
    plain = gradients(lambda x, trigger: network(x + trigger), network, x, **how)
    found = []
    for gate in ("bits", "output"):
        tape = Tape.of(network, x, gate=gate)
        assert isinstance(tape, Tape), tape
        found.append(gradients(tape, network, x, **how))
        assert_same(found[-1], plain, tolerance)
    for name, value in found[0].items():
        assert value is None or torch.equal(value, found[1][name]), name
    return tape


def check_recomputed(network, x, **how):
    """A tape cut wherever it can be, and one cut where that saves most, against one that keeps all."""
    for gate in ("bits", "output"):
        tape = Tape.of(network, x, gate=gate, recompute=True)
        found = [gradients(tape, network, x, **how)]
        everywhere = segments.at(tape._steps, segments.places(tape._steps))
        for cut in (everywhere, segments.whole(tape._steps)):
            tape._plans.clear()
            tape._cut = lambda plan, cut=cut: cut
            found.append(gradients(tape, network, x, **how))
        *found, kept = found
        for of_segments in found:
            assert_same(of_segments, kept, 1e-12)


class Ops(TorchDispatchMode):
    """The ops that run, without views."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if not views and func is not torch.ops.aten.detach.default:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))
