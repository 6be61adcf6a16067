"""A tape computes what the network computes: logits, and every gradient that was asked for and no other."""

import itertools
import math
import types
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from test_working import with_statistics
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from maskops import models
from maskops.lean import saved_bytes
from maskops.purify._tape import Tape
from maskops.purify._working import WorkingModel, shared_copy

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


@pytest.mark.parametrize("build", TOYS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_every_gradient_is_autograds(build, training):
    network = made(build).train(training)
    check(network, images())


@pytest.mark.parametrize("build", TOYS)
def test_the_triggers_gradient_alone(build):
    check(made(build), images(), learned=False, of_images=False)


@pytest.mark.parametrize("build", TOYS)
def test_gradients_of_weights_alone(build):
    check(made(build), images(), of_images=False, of_shared=False)


@pytest.mark.parametrize("name", ["small_vgg", "resnet18", "mobilenet_v2", "shufflenet_v2"])
def test_our_networks_run_on_steps_of_their_own(name):
    torch.manual_seed(0)
    network = with_statistics(models.build(name))
    x = images(32 if name == "small_vgg" else 16, 2).contiguous(memory_format=torch.channels_last)
    folded = WorkingModel(shared_copy(network), x).network
    tape = check(folded, x, of_images=False)
    kinds = Counter(type(step).__name__ for step in tape._steps)
    shuffled = sum(isinstance(module, (models.ShuffleUnit, models.DownUnit)) for module in network.modules())
    assert kinds["Generic"] <= (name == "small_vgg") + 2 * shuffled
    assert kinds["Conv"] == sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert {"Add", "ReLU"}.isdisjoint(kinds)


def test_functions_have_steps_of_their_own_too():
    tape = Tape.of(made(Functional), images())
    assert [type(step).__name__ for step in tape._steps] == ["Conv", "Conv", "ELU", "MaxPool", "Mean", "Linear"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("build", [ReadTwice, ReadByTwo, InPlace, Doubled, ReLU6, Pieces])
def test_any_layout_of_weights_and_images(build, dtype):
    formats = torch.contiguous_format, torch.channels_last
    for of_weights, of_images in itertools.product(formats, formats):
        network = made(build).to(dtype).to(memory_format=of_weights)
        check(network, images().to(dtype, memory_format=of_images), 1e-4 if dtype == torch.float32 else 1e-10)


def test_batch_norms_in_train_mode_learn_and_track():
    network = made(lambda: nn.Sequential(*[m for m in many_layers() if not isinstance(m, (nn.Dropout, nn.Dropout2d))]))
    twin = shared_copy(network)
    network.train(), twin.train()
    tape = Tape.of(network, images())
    expected, found = (
        gradients(function, model, images())
        for function, model in ((lambda x, trigger: twin(x + trigger), twin), (tape, network))
    )
    assert_same(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), twin.buffers(), strict=True))


def test_a_learned_layer_between_frozen_ones():
    network = made(ReadTwice)
    tape = Tape.of(network, images())
    for parameter in network.parameters():
        parameter.requires_grad_(parameter is network.second.weight)
    total = torch.ones_like(network.second.weight)
    network.second.weight.grad = total.clone()
    with Ops() as ops:
        tape(images()).square().sum().backward()
    (expected,) = torch.autograd.grad(network(images()).square().sum(), network.second.weight)
    torch.testing.assert_close(network.second.weight.grad, expected + total)
    assert "maskops::conv_input_grad" not in ops.names and "maskops::relu_backward" not in ops.names


def test_two_calls_may_be_under_way():
    network = made(InPlace)
    tape = Tape.of(network, images())
    triggers = [torch.zeros(1, 3, 8, 8, requires_grad=True, **DOUBLE) for _ in range(2)]
    batches = images(), images(batch=2) * 0.5
    logits = [tape(x + t.detach(), t) for x, t in zip(batches, triggers, strict=True)]
    for x, trigger, value in zip(batches, triggers, logits, strict=True):
        (found,) = torch.autograd.grad(value.square().sum(), trigger)
        (expected,) = torch.autograd.grad(network(x + trigger).square().sum(), trigger)
        torch.testing.assert_close(found, expected)


def test_parameters_are_those_of_the_moment():
    network = made(SharedWeights)
    tape = Tape.of(network, images())
    network.second.weight = nn.Parameter(network.second.weight * 2)
    assert_same(
        gradients(tape, network, images()),
        gradients(lambda x, trigger: network(x + trigger), network, images()),
    )


def test_nothing_is_kept_without_gradients():
    network = made(InPlace)
    tape = Tape.of(network, images())
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    assert not tape(images()).requires_grad
    with torch.no_grad():
        assert not tape(images().requires_grad_()).requires_grad


def test_changed_weights_and_second_backwards_are_refused():
    network = made(InPlace)
    tape = Tape.of(network, images())
    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(tape(x).sum(), x, create_graph=True)
    loss = tape(x).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = tape(x).sum()
    with torch.no_grad():
        network.second.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def hooked():
    network = Doubled()
    network.second.register_forward_hook(lambda module, inputs, output: output * 2)
    return network


def with_forward_of_its_own():
    network = Doubled()
    network.second.forward = types.MethodType(lambda module, x: x, network.second)
    return network


def parametrized():
    network = Doubled()
    parametrizations.weight_norm(network.second)
    return network


class Branching(Net):
    def between(self, x):
        return self.second(x) if x.sum() > 0 else x


class Overwriting(Net):
    def between(self, x):
        y = self.second(x)
        F.relu(x, inplace=True)
        return x + y


class OverwritingAView(Net):
    def between(self, x):
        half, _ = x.chunk(2, 1)
        half.mul_(2)
        return self.second(x)


class Answers(Net):
    def forward(self, x):
        return {"logits": self.linear(F.relu(self.first(x)).mean((2, 3)))}


class RoundsStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Rounding(Net):
    def between(self, x):
        return RoundsStraightThrough.apply(self.second(x))


class PartlyWithoutGradient(Net):
    def between(self, x):
        with torch.no_grad():
            y = F.relu(x)
        return self.second(x) + y


class PartlyInBfloat16(Net):
    def between(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.second(x)


class Lists(Net):
    def between(self, x):
        parts = x.chunk(2, 1)
        x = F.relu(self.second(x))
        return torch.cat(parts, 1) * x


class Remembering(Net):
    def between(self, x):
        self.seen = F.relu(x)
        return self.seen


class Random(Net):
    def between(self, x):
        return x if torch.rand(()) < 2 else F.relu(x)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return -2 * grad


class BackwardOfItsOwn(Net):
    def between(self, x):
        return Reverse.apply(x)


class PartlyFrozen(Net):
    def between(self, x):
        with torch.no_grad():
            scale = torch.sigmoid(self.second(x))
        return x * scale


@pytest.mark.parametrize("build", [BackwardOfItsOwn, PartlyFrozen])
def test_what_tracing_can_not_see_is_found_by_trying(build):
    network = made(build)
    model = WorkingModel(network, images())
    network.requires_grad_()
    model.make_tape(images())
    assert model.tape_reason == "its logits or their gradient come out otherwise"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Remembering, "its forward sets attributes or makes tensors of its own"),
        (Random, "its forward draws random numbers by itself"),
        (hooked, "second has hooks"),
        (with_forward_of_its_own, "second has a forward of its own"),
        (parametrized, "second is parametrized"),
        (Branching, "its forward can't be traced: symbolically traced variables cannot be used as inputs to control"),
        (Overwriting, "relu overwrites a value that add reads later"),
        (OverwritingAView, "mul_ overwrites a value that second reads later"),
        (Answers, "its forward returns something else than a tensor of logits"),
        (Lists, "chunk hands several tensors on as one"),
        (Rounding, "RoundsStraightThrough has a backward of its own"),
        (PartlyWithoutGradient, "its forward sets torch's grad mode or autocast"),
        (PartlyInBfloat16, "its forward sets torch's grad mode or autocast"),
    ],
)
def test_what_can_not_be_taped_is_refused_with_the_reason(build, reason):
    network = build().double()
    found = Tape.of(network, images())
    assert isinstance(found, str) and found.startswith(reason), found
    if build is not Answers:
        model = WorkingModel(network, images(), fold=False)
        model.make_tape(images())
        assert model.tape_reason == found
        assert model(images()).shape == (3, 5)


def test_a_working_model_uses_its_tape_in_the_modes_it_was_made_in(monkeypatch):
    network = made(many_layers)
    model = WorkingModel(network, images(), torch.full((3,), 0.5, **DOUBLE), torch.full((3,), 0.2, **DOUBLE))
    trigger = torch.rand(1, 3, 8, 8, requires_grad=True, **DOUBLE)
    expected = model(images(), trigger)
    (gradient,) = torch.autograd.grad(expected.square().sum(), trigger)
    model.make_tape(images())
    assert model.tape_reason is None
    taped = model(images(), trigger)
    assert type(taped.grad_fn).__name__ == "_TapedBackward"
    torch.testing.assert_close(taped, expected)
    torch.testing.assert_close(torch.autograd.grad(taped.square().sum(), trigger)[0], gradient)
    with model.network[0].register_forward_hook(lambda module, inputs, output: None):
        assert type(model(images(), trigger).grad_fn).__name__ != "_TapedBackward"
    assert type(model(images(), trigger).grad_fn).__name__ == "_TapedBackward"
    model.train()
    assert type(model(images(), trigger).grad_fn).__name__ != "_TapedBackward"
    model.make_tape(images())
    assert model.tape_reason is None
    monkeypatch.setattr(Tape, "__call__", lambda tape, x, shared: x.flatten(1)[:, :5])
    model.make_tape(images())
    assert model.tape_reason == "its logits or their gradient come out otherwise"


@pytest.mark.parametrize("build", [ReadTwice, InPlace, Pieces, Means, Transformer, many_layers, models.small_vgg])
def test_bfloat16_is_within_its_rounding(build):
    size = 32 if build is models.small_vgg else 8
    network, x = made(build, size).float(), images(size).float()
    model = WorkingModel(network, x, dtype=torch.bfloat16)

    def run(model):
        found = gradients(model, model.network, x, of_images=False)
        assert found["logits"].dtype == torch.float32
        return found

    exact = gradients(lambda x, trigger: model.network(x + trigger), model.network, x, of_images=False)
    plain = run(model)
    model.make_tape(x)
    assert model.tape_reason is None
    taped = run(model)
    for name, value in exact.items():
        if value is not None:
            assert (value is None) == (plain[name] is None)
            allowed = 2 * (plain[name] - value).norm() + 2**-8 * value.norm()
            assert taped[name].dtype == value.dtype
            assert (taped[name] - value).norm() <= allowed, name


def test_frozen_weights_are_cast_once_unless_they_change():
    network = made(Doubled).float().requires_grad_(False)
    x = images().float()
    tapes = [Tape.of(network, x, torch.bfloat16, changing=changing) for changing in ((), [network.second.weight])]
    counts = []
    for tape in tapes:
        with torch.no_grad():
            tape(x)
            with Ops() as ops:
                tape(x)
        counts.append(ops.names.count("aten::_to_copy"))
    assert counts == [2, 3]  # the images and the logits; and the weight that changes


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


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    network = with_statistics(models.resnet18()).float()
    x = torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return WorkingModel(network, x).network.to(memory_format=torch.channels_last), x


def count(tape, x, trigger):
    labels = torch.arange(len(x)) % 10
    with Ops() as ops:
        F.cross_entropy(tape(x, trigger), labels).backward()
    print(len(ops.names), Counter(ops.names))
    return len(ops.names)


def test_launches_of_a_resnets_inner_step(resnet):
    network, x = resnet
    network.requires_grad_(False)
    trigger = torch.zeros_like(x[:1]).requires_grad_()
    assert count(Tape.of(network, x, gate="output"), x, trigger) <= 56


def test_launches_of_a_resnets_outer_step(resnet):
    network, x = resnet
    for parameter in network.parameters():
        learned = parameter.dim() == 4
        parameter.requires_grad_(learned)
        parameter.grad = torch.zeros_like(parameter) if learned else None
    assert count(Tape.of(network, x, gate="output"), torch.cat((x, x)), None) <= 82


def test_an_inner_phase_keeps_bits_alone(resnet):
    network, x = resnet
    network.requires_grad_(False)
    tape = Tape.of(network, x, gate="bits")
    kept = kept_tensors(tape, x, torch.zeros_like(x[:1]).requires_grad_())
    own = {parameter.data_ptr() for parameter in network.parameters()}
    others = [tensor for tensor in kept if tensor.data_ptr() not in own]
    elements = 2 * 1024 * (64 * 5 + 128 * 4 / 4 + 256 * 4 / 16 + 512 * 4 / 64)
    assert {tensor.dtype for tensor in others} == {torch.uint8}
    assert sum(tensor.nbytes for tensor in others) == math.ceil(elements / 8)


def kept_tensors(tape, x, trigger):
    """All tensors that a call holds until its backward."""
    logits = tape(x, trigger)
    assert saved_bytes(lambda: tape(x, trigger)) == 0
    call = logits.grad_fn.call
    entries = [entry for saved in call.saved.values() for entry in saved]
    gates = [gate.gate for gate in call._gates.values()]
    return [tensor for tensor in (*entries, *gates, *call.values) if isinstance(tensor, torch.Tensor)]
