"""The engine on a GPU: recorded steps, runs side by side, precision. On the CPU the tests compare eager runs."""

import pytest
import torch
from test_gpu import on_each_device, tiny_network

from maskops.purify import sweep
from maskops.purify._phase import WARM_UP
from maskops.purify.methods import METHODS

STEPS = {"awm": {"inner_steps": 6, "outer_steps": 6, "tau": 5.0}, "swm": {"steps": 6}, "anp": {"steps": 6}, "nft": {}}
OPTIONS = {
    "awm": ({"preset": "official"}, {"branches": "sequential", "crop": 1, "flip": True}, {"projection": "project"}),
    "swm": ({}, {"granularity": "neuron"}),
    "anp": ({}, {"noise_steps": 2, "threshold": "auto"}),
    "nft": ({"steps": 6}, {"steps": 6, "augmentation": "cutmix", "tune_bias": True}),
}


def deterministic():
    cudnn = torch.backends.cudnn
    return cudnn.flags(cudnn.enabled, deterministic=True, allow_tf32=cudnn.allow_tf32)


def purified(method, device, **options):
    model, data = tiny_network()
    options = {"epochs": 3, "batch_size": 8, "progress": False, "device": device, **STEPS[method], **options}
    return METHODS[method].run(model, data, **options)


def assert_same(found, expected):
    assert found.history == expected.history
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())
    assert expected.trigger is None or torch.equal(found.trigger, expected.trigger)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "options"), [(m, o) for m, each in OPTIONS.items() for o in each], ids=str)
def test_recorded_steps_are_bit_for_bit_the_eager_ones(method, options, dtype, device):
    with deterministic():
        eager = purified(method, device, dtype=dtype, graphs=False, **options)
        result = purified(method, device, dtype=dtype, **options)
    if device.type == "cuda":
        assert set(result.execution.values()) == {"CUDA graph"}, result.explain()
    assert_same(result, eager)


@on_each_device
@pytest.mark.parametrize("method", STEPS)
def test_runs_side_by_side_are_the_runs_alone(method, device):
    model, data = tiny_network()
    options = {"epochs": 2, "batch_size": 8, "progress": False, "device": device, **STEPS[method]}
    runs = [{"seed": seed} for seed in range(4)]
    with deterministic():
        alone = [METHODS[method].run(model, data, **options, **own) for own in runs]
        together = sweep(method, model, data, runs, **options)
    for found, expected in zip(together, alone, strict=True):
        assert_same(found, expected)


@on_each_device
@pytest.mark.parametrize("tf32", [None, True, False])
def test_precision_is_put_back_and_changes_little(tf32, device):
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    exact, found = (purified("awm", device, epochs=1, tf32=choice) for choice in (False, tf32))
    assert before == (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    for name, values in exact.history.items():
        assert found.history[name] == pytest.approx(values, rel=0.02), name


@on_each_device
def test_memory_of_a_recorded_run_is_given_back(device):
    purified("awm", device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        for _ in range(3):
            purified("awm", device)
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved(device) <= before


def test_the_steps_of_these_tests_are_enough_to_record_one():
    assert all(count > WARM_UP for steps in STEPS.values() for count in steps.values() if isinstance(count, int))
