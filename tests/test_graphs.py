"""Steps recorded as graphs, on the CPU with an emulator of CUDA graphs: bit for bit what eager steps compute."""

import graph_emulator
import pytest
import torch
from helpers import tiny_network
from torch import nn

from maskops.purify import _graphs, anp, awm, nft, swm

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


def purified(method, clean_data, **options):
    torch.manual_seed(3)
    options = {"epochs": 2, "batch_size": 5, "progress": False, **STEPS[method], **options}
    return METHODS[method](tiny_network(), clean_data, **options)


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
        options = {"epochs": 2, "steps": 8, "batch_size": 5, "progress": False}
        runs.append(anp(network, (images.double(), labels), **options))
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


def test_augmentation_on_the_host_says_so(clean_data, recorded):
    result = purified("nft", clean_data, augmentation="cutout")
    assert result.execution == {"masks": "eager: cutout draws on the host"} and not recorded


def test_graphs_can_be_declined(clean_data, recorded):
    result = purified("awm", clean_data, graphs=False)
    assert result.execution == {"inner": "eager: graphs=False", "outer": "eager: graphs=False"} and not recorded


def test_phases_too_short_to_record_say_so(clean_data, recorded):
    result = purified("awm", clean_data, epochs=1, inner_steps=1, outer_steps=2)
    reason = "eager: too few steps to record one"
    assert result.execution == {"inner": reason, "outer": reason}
