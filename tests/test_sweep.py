"""Several purifications at once are those that would have come one after the other."""

import graph_emulator
import pytest
import torch
from helpers import InfiniteSlope, tiny_network
from torch import nn

from maskops.purify import NonFiniteError, _algorithm, _graphs, anp, awm, sweep
from maskops.purify.awm import AWM

OPTIONS = {"epochs": 2, "batch_size": 5, "inner_steps": 5, "outer_steps": 4, "progress": False}
RUNS = [{"seed": 0}, {"seed": 1, "epochs": 3}, {"tau": 2.0, "inner_steps": 7}]


@pytest.fixture
def side_by_side(monkeypatch):
    """As on a GPU: all runs at once, and their steps recorded."""

    def complete_together(algorithms, *rest):
        with pytest.MonkeyPatch.context() as patch:
            for algorithm in algorithms:
                patch.setattr(algorithm.run, "device", torch.device("cuda"))
                patch.setattr(algorithm.run, "quiet", lambda: torch.autocast("cpu", enabled=False))
            return _algorithm.complete_together(algorithms, *rest)

    monkeypatch.setattr(_graphs, "why_not", lambda device: None)
    monkeypatch.setattr(_graphs, "record", graph_emulator.record)
    monkeypatch.setattr("maskops.purify._sweep.complete_together", complete_together)


def assert_same(actual, expected):
    assert actual.history == expected.history
    assert all(torch.equal(actual.masks[name], mask) for name, mask in expected.masks.items())
    assert torch.equal(actual.trigger, expected.trigger)


@pytest.mark.parametrize("fixtures", [(), ("side_by_side",)], ids=["one after the other", "side by side"])
def test_each_run_of_a_sweep_is_the_run_alone(fixtures, clean_data, request):
    network = tiny_network()
    alone = [awm(network, clean_data, **{**OPTIONS, **own}) for own in RUNS]
    for fixture in fixtures:
        request.getfixturevalue(fixture)
    for result, expected in zip(sweep("awm", network, clean_data, RUNS, **OPTIONS), alone, strict=True):
        assert_same(result, expected)
        assert set(result.execution.values()) == {"CUDA graph"} or not fixtures


@pytest.mark.parametrize("fixtures", [(), ("side_by_side",)], ids=["one after the other", "side by side"])
def test_a_run_that_fails_doesn_t_end_the_others(fixtures, clean_data, request):
    for fixture in fixtures:
        request.getfixturevalue(fixture)
    network = tiny_network()
    alone = awm(network, clean_data, graphs=False, **OPTIONS)
    runs = [{}, {"mean": (0, 0), "std": (1e-308, 1e-308)}]
    good, bad = sweep("awm", network, clean_data, runs, **OPTIONS)
    assert_same(good, alone)
    assert isinstance(bad, NonFiniteError) and "in the " in str(bad)


def test_masks_that_are_no_numbers_end_their_own_run(clean_data, request):
    request.getfixturevalue("side_by_side")
    options = {"epochs": 1, "inner_steps": 1, "outer_steps": 1, "tau": 0.0, "progress": False}
    good, bad = sweep("awm", InfiniteSlope(), clean_data, [{"exclude": "unused"}, {}], **options)
    assert isinstance(bad, NonFiniteError) and torch.isfinite(good.masks["conv.mask"]).all()


@pytest.mark.parametrize("dropout", [True, False])
def test_runs_with_dropout_come_one_after_the_other(dropout, clean_data, side_by_side, monkeypatch):
    network = nn.Sequential(tiny_network(), nn.Dropout(0.5) if dropout else nn.Identity()).double()
    options = {"epochs": 1, "steps": 5, "number": 1, "progress": False}
    together = []

    def count(pairs, run=_algorithm.side_by_side):
        together.append(len(pairs))
        return run(pairs)

    monkeypatch.setattr(_algorithm, "side_by_side", count)
    assert len(sweep("anp", network, clean_data, [{"seed": 0}, {"seed": 1}], **options)) == 2
    assert together == ([1, 1] if dropout else [2, 0])


def test_runs_on_other_layers_keep_their_own_weights(clean_data):
    network = tiny_network()
    runs = [{"layers": "conv"}, {"layers": "linear"}]
    alone = [awm(network, clean_data, **OPTIONS, **own) for own in runs]
    for found, expected in zip(sweep("awm", network, clean_data, runs, **OPTIONS), alone, strict=True):
        assert_same(found, expected)


def test_the_runs_of_a_sweep_have_one_weight(clean_data, monkeypatch):
    seen = []
    monkeypatch.setattr("maskops.purify._sweep.complete_together", lambda algorithms, *_: seen.extend(algorithms) or [])
    sweep("awm", tiny_network(), clean_data, [{}, {"seed": 1}], **OPTIONS)
    first, second = (algorithm.run.arena for algorithm in seen)
    assert isinstance(seen[0], AWM) and first.weight is second.weight and first.mask is not second.mask


def test_other_methods_and_no_runs_are_refused(clean_data):
    with pytest.raises(ValueError, match=r"^sweep: method must be one of awm, swm, anp, nft; got 'ft'$"):
        sweep("ft", nn.Flatten(), clean_data, [{}])
    with pytest.raises(ValueError, match=r"^sweep: expected at least one run; got none$"):
        sweep("awm", nn.Flatten(), clean_data, [])
    with pytest.raises(ValueError, match=r"^sweep: all runs have one tf32: give it beside them$"):
        sweep("awm", nn.Flatten(), clean_data, [{}, {"tf32": True}])
    for runs in (5, [1], {"seed": 0}):
        with pytest.raises(TypeError, match=r"^sweep: runs must be a list of options by name, such as .*; got .*$"):
            sweep("awm", nn.Flatten(), clean_data, runs)


def test_anp_is_swept_too(clean_data):
    options = {"epochs": 1, "steps": 2, "number": 1, "progress": False}
    network = tiny_network()
    results = sweep("anp", network, clean_data, [{"seed": 4}, {"alpha": 0.5}], **options)
    alone = anp(network, clean_data, seed=4, **options)
    assert all(torch.equal(results[0].scores[name], score) for name, score in alone.scores.items())
    assert results[1].options["alpha"] == 0.5


def test_a_checkpoint_that_must_not_be_replaced_is_found_before_the_first_run(clean_data, tmp_path, monkeypatch):
    (tmp_path / "1.safetensors").touch()
    monkeypatch.setattr(_algorithm, "side_by_side", lambda pairs: pytest.fail("a run has begun"))
    with pytest.raises(ValueError, match=r"1\.safetensors exists"):
        sweep("awm", tiny_network(), clean_data, [{}, {"seed": 1}], checkpoint=tmp_path, **OPTIONS)
