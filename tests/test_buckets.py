"""Sums over several processes that begin while the backward still runs."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers_distributed import in_buckets, together
from torch import nn

from maskops.arena import MaskArena
from maskops.purify import _buckets, _masks, awm, swm
from maskops.purify._distributed import Part, Team


class Alike(Team):
    """A process of two, of which the other adds nothing: it takes whole batches, and notes what is summed and when."""

    size, why_eager = 2, "this is a test"

    def __init__(self, events):
        self.events = events

    def part(self, count):
        return Part(count)

    def add(self, *tensors):
        self.events += [("sum", tensor.numel()) for tensor in tensors if tensor.dim() == 1]  # a whole flat gradient

    def adding(self, tensor):
        where = tensor.storage_offset(), tensor.storage_offset() + tensor.numel()
        self.events.append(("begin", where))
        return lambda: self.events.append(("end", where))


class Steps:
    """A working model that hands gradients over when it is told to."""

    def handing_over(self, to):
        self.to = to
        return nullcontext()


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.fixture
def images():
    return torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4


@pytest.fixture
def events(monkeypatch):
    """What is summed when, by a run whose layers are a bucket each."""
    found = []
    take = _buckets.BucketSums._take

    def noted(self, parameter, grad):
        found.append(("take", parameter.grad.storage_offset()))
        take(self, parameter, grad)

    monkeypatch.setattr(_masks, "team_of", lambda method: Alike(found))
    monkeypatch.setattr(_buckets, "_BYTES", 1)
    monkeypatch.setattr(_buckets.BucketSums, "_take", noted)
    return found


RUNS = {
    "one batch": (awm, {"branches": "concatenated", "inner_steps": 1, "outer_steps": 1}),
    "branch by branch": (awm, {"branches": "sequential", "inner_steps": 1, "outer_steps": 1}),
    "noise": (swm, {"steps": 1}),
}


@pytest.mark.parametrize("name", RUNS)
def test_each_bucket_is_summed_before_the_next_layers_gradient_is_there(name, images, events):
    method, options = RUNS[name]
    found = method(network(), images, epochs=1, progress=False, **options)
    first, second, third = (0, 224), (224, 800), (800, 1376)  # rows of 216, 576 and 576 numbers, aligned
    during = [("take", 800), ("begin", third), ("take", 224), ("begin", second), ("take", 0), ("begin", first)]
    once = [*during, *(("end", place) for place in (third, second, first))]
    assert events == once * (2 if name == "noise" else 1)  # for the noise, then for the masks
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(_masks, "team_of", lambda method: Team())
        expected = method(network(), images, epochs=1, progress=False, **options)
    assert all(torch.equal(found.masks[layer], mask) for layer, mask in expected.masks.items())


def test_buckets_wait_for_those_before_them_and_nothing_is_left_out(monkeypatch):
    monkeypatch.setattr(_buckets, "_BYTES", 20 * 4)
    weights = {name: torch.ones(16) for name in "abcde"}
    arena, events = MaskArena(weights, weights), []
    sums, model = _buckets.BucketSums("awm", Alike(events), arena), Steps()
    layers = arena.effective_weights
    with sums.during_backward(model):
        for name in "abde":  # of c there is none, as of a layer that is left as it is
            model.to(layers[name], torch.full((16,), 2.0))
    begun = [place for what, place in events if what == "begin"]
    assert begun == [(48, 80), (16, 48), (0, 16)]
    assert arena.grad.view(5, 16).sum(1).tolist() == [32, 32, 0, 32, 32]


def test_a_step_that_has_begun_a_sum_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(_buckets, "_BYTES", 1)
    weights = {name: torch.ones(16) for name in "ab"}
    arena = MaskArena(weights, weights)
    sums, model = _buckets.BucketSums("awm", Alike([]), arena), Steps()
    with pytest.raises(torch.OutOfMemoryError), sums.during_backward(model):
        raise torch.OutOfMemoryError("early")
    with (
        pytest.raises(RuntimeError, match=r"^awm: no memory was left in the middle of a sum .*late") as caught,
        sums.during_backward(model),
    ):
        model.to(arena.effective_weights["b"], torch.ones(16))
        raise torch.OutOfMemoryError("late")
    assert type(caught.value) is RuntimeError  # and none that a smaller step would follow


def test_two_processes_come_to_the_same_however_large_the_buckets(tmp_path):
    for outcome in together(tmp_path / "team", 2, in_buckets, ["awm", "swm"], 1 << 30, 1):
        assert isinstance(outcome, list), outcome
        in_one, in_many = outcome
        for name, whole in in_one.items():
            assert whole["history"] == in_many[name]["history"]
            assert all(torch.equal(in_many[name]["tensors"][what], value) for what, value in whole["tensors"].items())
