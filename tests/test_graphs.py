"""Steps recorded as graphs, on the CPU with an emulator of CUDA graphs: bit for bit what eager steps compute."""

from dataclasses import replace

import graph_emulator
import pytest
import torch
from helpers import tiny_network
from torch import nn

from maskops.purify import _graphs, anp, awm, nft, swm
from maskops.purify._losses import Losses
from maskops.purify.awm import AWMOptions

METHODS = {"awm": awm, "swm": swm, "anp": anp, "nft": nft}
STEPS = {"awm": {"inner_steps": 6, "outer_steps": 6}, "swm": {"steps": 6}, "anp": {"steps": 6}, "nft": {"steps": 6}}


@pytest.fixture
def recorded(monkeypatch):
    """As if there were a GPU that records steps; gives what was recorded."""
    graphs = []

    def record(*arguments):
        graphs.append(graph_emulator.record(*arguments))
        return graphs[-1]

    monkeypatch.setattr(_graphs, "why_not", lambda device: None)
    monkeypatch.setattr(_graphs, "record", record)
    return graphs


def purified(method, clean_data, network=None, **options):
    """The result, whose history has the logits that a measurement after each epoch finds."""
    torch.manual_seed(3)
    network = tiny_network() if network is None else network
    options = {"epochs": 3, "batch_size": 5, "progress": False, **STEPS[method], **options}
    measured = []

    def measure(epoch, model):
        with torch.no_grad():
            measured.append(model(clean_data[0].double()).tolist())

    result = METHODS[method](network, clean_data, on_epoch=measure, **options)
    result.history["measured"] = measured
    return result


def assert_same(actual, expected):
    assert actual.history == expected.history
    for name, mask in expected.masks.items():
        assert torch.equal(actual.masks[name], mask), name
    assert all(map(torch.equal, actual.model.state_dict().values(), expected.model.state_dict().values()))
    assert (actual.trigger is None) == (expected.trigger is None)
    assert actual.trigger is None or torch.equal(actual.trigger, expected.trigger)


@pytest.mark.parametrize(
    "method, options",
    [
        ("awm", {}),
        ("awm", {"preset": "official"}),
        ("awm", {"preset": "official", "branches": "concatenated", "crop": 1, "flip": True}),
        ("awm", {"lr_decay_epochs": 1, "projection": "l2", "project_every_step": True}),
        ("awm", {"projection": "project", "trigger_penalty": 0.1, "granularity": "neuron"}),
        ("swm", {"lr_decay_epochs": 1}),
        ("anp", {"noise_steps": 2}),
        ("anp", {"statistics": "running", "threshold": "auto"}),
        ("nft", {"cosine_to": 0.01}),
        ("nft", {"augmentation": "cutmix", "tune_bias": True}),
        ("nft", {"augmentation": "none"}),
    ],
    ids=str,
)
def test_recorded_steps_compute_what_eager_ones_do(method, options, clean_data, request):
    eager = purified(method, clean_data, **options)
    assert all(how.startswith("eager: CUDA graphs need a GPU") for how in eager.execution.values())
    graphs = request.getfixturevalue("recorded")
    result = purified(method, clean_data, **options)
    assert graphs and set(result.execution.values()) == {"CUDA graph"}
    assert_same(result, eager)


def test_dropout_draws_anew_in_every_replay(clean_data, request):
    network = nn.Sequential(tiny_network(), nn.Dropout(0.5)).double()
    images, labels = clean_data
    runs = []
    for _ in range(2):
        runs.append(purified("anp", (images.double(), labels), network, steps=8))
        request.getfixturevalue("recorded")
    assert runs[1].execution == {"masks": "CUDA graph"}
    assert_same(runs[1], runs[0])


def test_a_step_that_asks_for_a_number_goes_on_as_it_is(clean_data, recorded):
    class Curious(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x

    torch.manual_seed(3)
    network = nn.Sequential(tiny_network(), Curious())
    result = awm(network, clean_data, epochs=2, inner_steps=6, outer_steps=6, progress=False)
    reason = "eager: operation not permitted when stream is capturing: _local_scalar_dense"
    assert result.execution == {"inner": reason, "outer": reason}
    assert not recorded


class AsksInItsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad if float(grad.sum()) > 0 else grad.clone()


class Asking(nn.Module):
    def forward(self, x):
        return AsksInItsBackward.apply(x)


def test_a_recording_that_breaks_off_leaves_nothing_behind(clean_data, request):
    network = nn.Sequential(*tiny_network()[:-1], Asking(), nn.Linear(6, 3)).double()
    options = {"augmentation": "none", "tune_bias": True, "network": network}
    eager = purified("nft", clean_data, **options)
    request.getfixturevalue("recorded")
    result = purified("nft", clean_data, **options)
    assert "capturing" in result.execution["masks"]
    assert_same(result, eager)


def test_steps_that_wait_are_found_before_they_are_recorded(clean_data, recorded, monkeypatch):
    def waits(step, device):
        step()
        return True

    monkeypatch.setattr(_graphs, "waits", waits)
    result = purified("awm", clean_data)
    assert set(result.execution.values()) == {"eager: it waits for the device"} and not recorded


@pytest.mark.parametrize("method", ["awm", "swm"])
def test_a_learning_rate_that_has_decayed_to_nothing_moves_no_mask(method, clean_data, request):
    for fixtures in ((), ("recorded",)):
        for fixture in fixtures:
            request.getfixturevalue(fixture)
        once = purified(method, clean_data, epochs=1)
        thrice = purified(method, clean_data, epochs=3, lr_decay=0.0, lr_decay_epochs=1)
        assert all(torch.equal(thrice.masks[name], mask) for name, mask in once.masks.items())


def test_augmentation_on_the_host_says_so(clean_data, recorded):
    result = purified("nft", clean_data, augmentation="cutout")
    assert result.execution == {"masks": "eager: cutout draws on the host"} and not recorded


@pytest.mark.parametrize("given", ["auto", "concatenated"])
def test_a_recording_that_runs_out_of_memory_is_made_again_of_one_branch_after_the_other(
    given, clean_data, request, monkeypatch
):
    descend, for_images, calls = Losses._descend, AWMOptions.for_images, []

    def for_images_on_a_gpu(options, images):
        return replace(for_images(options, images), branches=options.branches)

    def noted(losses, *branches, **how):
        calls.append(len(branches) > 1)
        return descend(losses, *branches, **how)

    def descend_three_times_together(losses, *branches, **how):
        found = noted(losses, *branches, **how)
        if given == "auto" and len(branches) > 1 and sum(calls) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return found

    monkeypatch.setattr(AWMOptions, "for_images", for_images_on_a_gpu)
    monkeypatch.setattr(Losses, "_descend", descend_three_times_together)
    eager = purified("awm", clean_data, branches=given)
    graphs = request.getfixturevalue("recorded")
    record = _graphs.record

    def record_in_little_memory(*arguments):
        calls.clear()
        graph = record(*arguments)
        if any(calls):
            graphs.remove(graph)
            raise torch.OutOfMemoryError("out of memory")
        return graph

    monkeypatch.setattr(Losses, "_descend", noted)
    monkeypatch.setattr(_graphs, "record", record_in_little_memory)
    if given == "auto":
        result = purified("awm", clean_data, branches=given)
        assert_same(result, eager)
        assert result.options["branches"] == "sequential"
        # the trigger's step anew too: its graph would have kept the memory
        assert len(graphs) == 3 and result.execution == {"inner": "CUDA graph", "outer": "CUDA graph"}
        return
    message = r"awm: memory ran out in the outer phase; from now on it takes \d images? at a time"
    with pytest.warns(RuntimeWarning, match=message) as warned:
        result = purified("awm", clean_data, branches=given)
    assert str(warned[-1].message).endswith("it takes 1 image at a time")
    for name, mask in eager.masks.items():
        torch.testing.assert_close(result.masks[name], mask, rtol=0, atol=1e-9)
    assert result.options["branches"] == "concatenated"
    how = "eager: out of memory, 1 image at a time for lack of memory"
    assert result.execution == {"inner": "CUDA graph", "outer": how}


def test_graphs_can_be_declined(clean_data, recorded):
    result = purified("awm", clean_data, graphs=False)
    assert result.execution == {"inner": "eager: graphs=False", "outer": "eager: graphs=False"} and not recorded


def test_phases_too_short_to_record_say_so(clean_data, recorded):
    result = purified("awm", clean_data, epochs=1, inner_steps=1, outer_steps=2)
    reason = "eager: too few steps to record one"
    assert result.execution == {"inner": reason, "outer": reason}
