"""Networks that can't be taped, and the sentences that say why."""

import types
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers_tape import Doubled, Net, images, made
from torch.nn.utils import parametrizations

from maskops.purify._masks import MaskRun
from maskops.purify._setting import MaskSetting
from maskops.purify._tape import Tape, graph, tracers
from maskops.purify._working import WorkingModel


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


class PartlyInBfloat16(Net):
    def between(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.second(x)


def test_what_tracing_can_not_see_is_found_by_trying(monkeypatch):
    network = made(BackwardOfItsOwn)
    model = WorkingModel(network, images())
    network.requires_grad_()
    monkeypatch.setattr(graph, "_no_functions_of_its_own", nullcontext)
    monkeypatch.setattr(tracers, "_modes", tuple)
    model.make_tape(images())
    assert model.tape_reason == "its logits or their gradient come out otherwise"
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (BackwardOfItsOwn, "Reverse has a backward of its own"),
        (PartlyFrozen, "its forward sets torch's grad mode or autocast"),
        (PartlyInBfloat16, "its forward sets torch's grad mode or autocast"),
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


class BranchingInReLUs(Net):
    def between(self, x):
        return F.relu(self.second(F.relu(x))) if x.sum() > -1e9 else x


def test_without_a_tape_bits_are_kept_while_no_mask_is_learned():
    clean_data = images().float().clamp(0, 1), torch.arange(3)
    run = MaskRun("awm", BranchingInReLUs(), clean_data, MaskSetting(progress=False))
    trigger = run.new_trigger()

    def kept():
        dtypes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: dtypes.append(t.dtype) or t, lambda t: t):
            run.logits(run.images[:2], trigger)
        return dtypes.count(torch.uint8)

    assert "can't be traced" in run.model.tape_reason and kept() == 0
    with run.frozen_masks():
        assert kept() == 2
    assert kept() == 0
