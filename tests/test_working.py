"""The working model computes what the network computes, whatever it folded away."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskops import models
from maskops.purify._working import WorkingModel, shared_copy


def with_statistics(network):
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return network.double().eval()


def working(network, images, **options):
    return WorkingModel(shared_copy(network), images, **options)


def count(network, kind):
    return sum(isinstance(module, kind) for module in network.modules())


@pytest.mark.parametrize(
    ("name", "left"), [("small_vgg", 0), ("resnet18", 0), ("mobilenet_v2", 0), ("shufflenet_v2", 0)]
)
def test_every_batch_norm_of_our_networks_folds(name, left):
    network = with_statistics(models.build(name))
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    fast = working(network, images)
    assert count(fast, nn.BatchNorm2d) == left < count(network, nn.BatchNorm2d)
    torch.testing.assert_close(fast(images), network(images))


@pytest.mark.parametrize("name", ["small_vgg", "resnet18"])
def test_the_triggers_gradient_is_summed_before_the_first_convolution(name):
    network = with_statistics(models.build(name))
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    fast = working(network, images)
    assert fast._first is not None
    trigger = torch.randn(1, 3, 32, 32, dtype=torch.float64).mul_(0.1).requires_grad_()
    labels = torch.tensor([0, 3, 9])
    gradients = [
        torch.autograd.grad(F.cross_entropy(logits, labels), trigger)[0]
        for logits in (network(images + trigger), fast(images, trigger))
    ]
    torch.testing.assert_close(*gradients)


class Preact(nn.Module):
    """Batch norm before the convolution, on a residual stream: nothing to fold into."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return (x + self.conv(F.relu(self.bn(x)))).mean((2, 3))


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return (self.bn(y) * torch.sigmoid(y)).mean((2, 3))


class Twice(nn.Module):
    """One convolution before two batch norms, and one batch norm after two convolutions."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def forward(self, x):
        return self.second(self.conv(self.first(self.conv(x)))).mean((2, 3))


class Returned(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.features = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), None

    def forward(self, x):
        y = self.conv(x)
        return {"features": y, "logits": self.bn(y).mean((2, 3))}


class Resized(nn.Module):
    """The image is read twice: the first convolution isn't its only reader."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x):
        return (self.conv(x) + x.mean(1, keepdim=True)).mean((2, 3))


@pytest.mark.parametrize("network", [Preact, TwoReaders, Twice, Resized])
def test_what_is_not_certain_is_left_alone(network):
    network = with_statistics(network())
    images = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    trigger = torch.rand(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    fast = working(network, images)
    assert count(fast, nn.BatchNorm2d) == count(network, nn.BatchNorm2d)
    torch.testing.assert_close(fast(images, trigger), network(images + trigger))
    gradients = [
        torch.autograd.grad(f.square().sum(), trigger)[0] for f in (fast(images, trigger), network(images + trigger))
    ]
    torch.testing.assert_close(*gradients)


def test_outputs_that_are_returned_are_not_folded_into():
    network = with_statistics(Returned())
    images = torch.rand(2, 2, 8, 8, dtype=torch.float64)

    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            output = self.network(x)
            return output["logits"] + output["features"].mean()

    fast = working(Output(), images)
    assert count(fast, nn.BatchNorm2d) == 1
    torch.testing.assert_close(fast(images), Output()(images))


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(128, 6), nn.BatchNorm1d(6)),
        nn.Sequential(nn.Flatten(2), nn.Linear(64, 6), nn.BatchNorm1d(2), nn.Flatten()),
        nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.Flatten()),
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()),
        nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), nn.Flatten()
        ),
        nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten()),
        nn.Sequential(nn.Unflatten(1, (2, 1)), nn.Conv3d(2, 4, 1), nn.BatchNorm3d(4), nn.Flatten()),
    ],
    ids=["linear", "linear on sequences", "no affine", "no statistics", "grouped circular", "transposed", "3d"],
)
def test_folding_is_exact_for_every_kind_of_layer(network):
    network = with_statistics(copy.deepcopy(network))
    images = torch.rand(3, 2, 8, 8, dtype=torch.float64)
    trigger = torch.rand(1, 2, 8, 8, dtype=torch.float64)
    fast = working(network, images)
    torch.testing.assert_close(fast(images), network(images))
    torch.testing.assert_close(fast(images, trigger), network(images + trigger))


def test_layers_with_hooks_are_left_alone():
    network = with_statistics(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten()))
    network[0].register_forward_hook(lambda module, inputs, output: output * 2)
    images = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(working(network, images)(images), network(images))


def test_kept_layers_are_not_folded():
    network = with_statistics(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten()))
    images = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    assert count(working(network, images, masked=["1"]), nn.BatchNorm2d) == 1


def test_the_users_tensors_and_flags_stay_as_they_were():
    network = with_statistics(models.small_vgg()).train()
    before = copy.deepcopy(network.state_dict())
    working(network, torch.rand(2, 3, 32, 32, dtype=torch.float64))
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_shared_copies_share_tensors_but_no_parameters():
    network = models.small_vgg()
    shared = shared_copy(network)
    for ours, theirs in zip(shared.parameters(), network.parameters(), strict=True):
        assert ours is not theirs and ours.data_ptr() == theirs.data_ptr()
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(network.buffers(), shared.buffers(), strict=True))


class Overwritten(nn.Module):
    """The convolution's output is changed in place, by a statement that returns nothing."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        y[:, 0] = 0
        return self.bn(y).mean((2, 3))


class WeightReadTwice(Overwritten):
    def forward(self, x):
        return (self.bn(self.conv(x)) + F.conv2d(x * 2, self.conv.weight)).mean((2, 3))


class ForwardReplaced(Overwritten):
    def __init__(self):
        super().__init__()
        self.conv.forward = types.MethodType(lambda conv, x: F.relu(F.conv2d(x, conv.weight)), self.conv)

    def forward(self, x):
        return self.bn(self.conv(x)).mean((2, 3))


class CalledByKeyword(Overwritten):
    def forward(self, x):
        return self.bn(input=self.conv(input=x)).mean((2, 3))


@pytest.mark.parametrize("network", [Overwritten, WeightReadTwice, ForwardReplaced, CalledByKeyword])
def test_other_readers_and_writers_are_seen(network):
    network = with_statistics(network())
    images = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    trigger = torch.rand(1, 2, 8, 8, dtype=torch.float64)
    fast = working(network, images)
    torch.testing.assert_close(fast(images), network(images))
    torch.testing.assert_close(fast(images, trigger), network(images + trigger))


def test_an_unforeseen_difference_undoes_the_folding(monkeypatch):
    def wrongly(network, readers, masked):
        network[0].bias.data.add_(1)

    monkeypatch.setattr("maskops.purify._working._fold_batch_norms", wrongly)
    network = with_statistics(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten()))
    images = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    expected = network(images)
    assert count(working(copy.deepcopy(network), images), nn.BatchNorm2d) == 1
    torch.testing.assert_close(network(images), expected)


def test_gradients_of_weights_pass_the_trigger():
    network = with_statistics(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten()))
    images, trigger = torch.rand(3, 2, 8, 8, dtype=torch.float64), torch.rand(1, 2, 8, 8, dtype=torch.float64)
    fast = working(network, images)
    weight = fast.network[0].weight.requires_grad_()
    (found,) = torch.autograd.grad(fast(images, trigger).square().sum(), weight)
    (expected,) = torch.autograd.grad(network(images + trigger).square().sum(), network[0].weight)
    torch.testing.assert_close(found, expected)


def test_the_working_model_is_in_eval_mode():
    fast = working(models.small_vgg().train(), torch.rand(2, 3, 32, 32))
    assert not any(module.training for module in fast.modules())
