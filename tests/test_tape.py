"""A tape computes what the network computes: logits, and every gradient that was asked for and no other."""

import itertools
import math
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers_tape import (
    DOUBLE,
    TOYS,
    Doubled,
    Functional,
    InPlace,
    Means,
    Ops,
    Pieces,
    ReadByTwo,
    ReadTwice,
    ReLU6,
    SharedWeights,
    Transformer,
    assert_same,
    check,
    check_recomputed,
    gradients,
    images,
    made,
    many_layers,
)
from test_working import with_statistics
from torch import nn

from benchmarks import counting
from maskops import models
from maskops.lean import saved_bytes
from maskops.purify._tape import Tape
from maskops.purify._working import WorkingModel, shared_copy


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


@pytest.mark.parametrize("build", TOYS)
def test_segments_that_are_run_again_give_the_same_gradients(build):
    check_recomputed(made(build), images())
    check_recomputed(made(build), images(), learned=False, of_images=False)
    check_recomputed(made(build), images(), of_shared=False, of_images=False)


@pytest.mark.parametrize(
    ("name", "share"), [("small_vgg", 0.9), ("resnet18", 0.8), ("mobilenet_v2", 0.4), ("shufflenet_v2", 0.45)]
)
def test_segments_of_our_networks_need_less_memory(name, share):
    torch.manual_seed(0)
    network = with_statistics(models.build(name)).float()
    x = images(32, 8).float().contiguous(memory_format=torch.channels_last)
    folded = WorkingModel(shared_copy(network), x).network
    peaks = {}
    for recompute, learned in itertools.product((False, True), repeat=2):
        tape = Tape.of(folded, x, recompute=recompute)
        gradients(tape, folded, x, of_images=False)  # those of weights are there
        for parameter in folded.parameters():
            parameter.requires_grad_(learned)
        trigger = torch.zeros_like(x[:1]).requires_grad_()
        peaks[recompute, learned] = counting.count(partial(_step, tape, x, trigger)).peak
    assert peaks[True, True] < share * peaks[False, True]
    assert peaks[True, False] <= 1.3 * peaks[False, False]


def _step(tape, x, trigger):
    tape(x, trigger).sum().backward()


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
