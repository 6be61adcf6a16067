"""Numbers that aren't finite: refused before a run, and afterwards one line that says where they began."""

import copy
import json
import math

import pytest
import safetensors.torch
import torch
from helpers import InfiniteSlope, tiny_network
from helpers_resume import network
from torch import nn

from maskops.checkpoint import CheckpointError, load_run, save_run
from maskops.purify import NonFiniteError, awm, nft, swm
from maskops.purify.awm import AWM
from maskops.purify.baselines import ft, rnp
from maskops.purify.nft import NFT

SHORT = {"epochs": 3, "progress": False, "inner_steps": 2, "outer_steps": 2, "batch_size": 4}


@pytest.fixture(autouse=True)
def every_phase(monkeypatch):
    monkeypatch.setattr("maskops.purify._checkpoint._PAUSE", 0)


def net():
    torch.manual_seed(0)
    return tiny_network()


def failing(clean_data, model=None, **options):
    with pytest.raises(NonFiniteError) as caught:
        awm(net() if model is None else model, clean_data, **{**SHORT, **options})
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.mark.parametrize("method", [awm, swm, nft, ft, rnp], ids=lambda method: method.__name__)
@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "9.bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_with_values_that_are_no_numbers_is_refused_by_name(clean_data, method, name, value):
    model = net()
    model.state_dict()[name].flatten()[-1] = value
    with pytest.raises(
        ValueError, match=rf"^{method.__name__}: {name} of the model has values that are nan or infinite$"
    ):
        method(model, clean_data, progress=False)


def test_a_parameter_of_minus_infinity_is_refused_and_a_mask_of_attention_is_not(clean_data):
    model = net()
    model.register_buffer("attention", torch.full((2, 2), -math.inf))
    model.register_buffer("constant", torch.tensor(math.nan), persistent=False)
    assert awm(model, clean_data, **{**SHORT, "epochs": 1}).masks
    with torch.no_grad():
        model[0].bias[0] = -math.inf
    with pytest.raises(ValueError, match=r"^awm: 0\.bias of the model has values that are nan or infinite$"):
        awm(model, clean_data, **SHORT)


def test_a_loss_names_the_layer_in_which_it_began(clean_data):
    model = net()
    with torch.no_grad():
        model[5].weight.fill_(1e308)
    message = failing(clean_data, model)
    assert message == (
        "awm: the inner loss became nan in the inner phase of epoch 1: first in the output of 5, before anything was "
        "learned; the model is left as it was"
    )


def test_a_loss_of_finite_logits_is_named(clean_data):
    model = net()
    with torch.no_grad():
        model[9].bias.copy_(torch.tensor([1e308, -1e308, 0], dtype=torch.float64))
    assert ": first in the loss, of logits that are finite, before anything was learned;" in failing(clean_data, model)


class Breaking(nn.Module):
    """Gives out NaN while it is told to."""

    breaks = False

    def forward(self, x):
        fine = bool((x == x).all())  # which nothing that records a network can follow
        return x * math.nan if fine and Breaking.breaks else x


def test_a_layer_that_breaks_later_is_named(clean_data, monkeypatch):
    model = net().insert(7, Breaking())

    def on_epoch(epoch, model):
        monkeypatch.setattr(Breaking, "breaks", epoch == 0)

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        NonFiniteError, match=r"^awm: the inner loss became nan in the inner phase of epoch 2: first in t"
    ):
        awm(model, clean_data, **SHORT, on_epoch=on_epoch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("phase", "what"), [("inner", "the mask of 5"), ("outer", "the trigger")])
def test_what_an_earlier_phase_left_is_named(clean_data, monkeypatch, phase, what):
    step = getattr(AWM, phase)

    def breaks(self, batch):
        if self.run.history.get("outer loss" if phase == "outer" else "clean loss", [1]) and self.run._epoch == 1:
            with torch.no_grad():
                (self.trigger if phase == "outer" else self.run.arena.masks["5"]).fill_(math.nan)
                self.run.arena.refresh()
        return step(self, batch)

    monkeypatch.setattr(AWM, phase, breaks)
    assert f"in the {phase} phase of epoch 2: first in {what}; the model is" in failing(clean_data)


def test_a_search_that_fails_takes_nothing_away(clean_data, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr("maskops.purify._finite._in_state", fail)
    beyond = {"mean": (0.0, 0.0), "std": (1e-308, 1e-308)}
    assert "in the inner phase of epoch 1; the model is left" in failing(clean_data, **beyond)


def test_what_the_phase_itself_learns_is_said_to_be_reached(clean_data, monkeypatch):
    step = AWM.inner

    def breaks(self, batch):
        numbers = step(self, batch)
        with torch.no_grad():
            self.trigger.fill_(math.nan)
        return numbers

    monkeypatch.setattr(AWM, "inner", breaks)
    assert "in the inner phase of epoch 1, and has reached the trigger; the model is" in failing(clean_data)


def test_tuned_biases_are_named(clean_data, monkeypatch):
    step = NFT.step

    def breaks(self, batch):
        with torch.no_grad():
            next(iter(self.run.biases.values())).fill_(math.nan)
        return step(self, batch)

    monkeypatch.setattr(NFT, "step", breaks)
    with pytest.raises(
        NonFiniteError, match=r", and has reached the (mask|tuned bias) of [\w.]+; the model is left as it was$"
    ):
        nft(net(), clean_data, tune_bias=True, layers=["conv", "linear"], epochs=1, progress=False)


@pytest.mark.parametrize("method", [ft, rnp], ids=lambda method: method.__name__)
def test_baselines_name_the_layer_of_the_users_model(clean_data, method):
    model = net()
    with torch.no_grad():
        model[5].weight.fill_(1e308)
    with pytest.raises(NonFiniteError, match=r"of epoch 1: first in the output of 5, before anything was learned; the"):
        method(model, clean_data, progress=False)


def broken_in_epoch(monkeypatch, number):
    outer = AWM.outer

    def breaks(self, batch):
        if self.run._epoch == number - 1:
            with torch.no_grad():
                self.run.arena.mask.fill_(math.nan)
                self.run.arena.refresh()
        return outer(self, batch)

    monkeypatch.setattr(AWM, "outer", breaks)


def test_the_message_says_where_the_last_good_state_is(clean_data, monkeypatch, tmp_path):
    file = tmp_path / "run.safetensors"
    expected = awm(net(), clean_data, **SHORT)
    with monkeypatch.context() as patched:
        broken_in_epoch(patched, 3)
        message = failing(clean_data, checkpoint=file)
    assert message.endswith(f"; the model is left as it was; checkpoint {file} has the state after phase 5")
    tensors, notes = load_run(file)
    assert notes["phases"] == 5 and all(bool(torch.isfinite(value.float()).all()) for value in tensors.values())
    resumed = awm(net(), clean_data, **SHORT, checkpoint=file, resume=True)
    assert resumed.history == expected.history
    with monkeypatch.context() as patched:
        broken_in_epoch(patched, 1)
        assert failing(clean_data, checkpoint=tmp_path / "b.safetensors").endswith("has the state after phase 1")


def test_a_state_that_is_no_number_replaces_none(monkeypatch, tmp_path, clean_data):
    file = tmp_path / "run.safetensors"
    slope = {"epochs": 1, "inner_steps": 1, "outer_steps": 1, "tau": 0.0, "progress": False}
    with pytest.raises(
        NonFiniteError, match=rf"^awm: a mask became nan or infinite; .*; checkpoint {file} has the state "
    ):
        awm(InfiniteSlope(), clean_data, **slope, checkpoint=file)
    tensors, notes = load_run(file)
    assert notes["phases"] == 1 and bool(torch.isfinite(tensors["run.mask"]).all())


CHANGES = {
    "a mask that is nan": {"run.mask": lambda value: value * math.nan},
    "a moment that is infinite": {"optimizer.0.0.exp_avg": lambda value: value + math.inf},
    "a moment of another shape": {"optimizer.0.0.exp_avg": lambda value: value[:-1]},
    "a state of an optimiser that isn't there": {"optimizer.7.0.exp_avg": lambda _: torch.ones(1)},
    "a state of a parameter that isn't there": {"optimizer.0.9.exp_avg": lambda _: torch.ones(1)},
    "a name of another kind": {"optimizer.x.y": lambda _: torch.ones(1)},
    "a name with codes": {"optimizer.0.0.\u00a0a": lambda _: torch.ones(1)},
    "a generator's state that is none": {"generator.draws": lambda value: value * 0 + 7},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_whose_tensors_are_no_state_is_refused(clean_data, tmp_path, name):
    file = tmp_path / "run.safetensors"
    awm(net(), clean_data, **SHORT, checkpoint=file)
    tensors, notes = load_run(file)
    for key, change in CHANGES[name].items():
        tensors[key] = change(tensors.get(key))
    save_run(file, tensors, notes)
    refused(clean_data, file)


NOTES = {
    "a phase beyond the last": {"phases": 999},
    "a phase before the first": {"phases": -1},
    "options that there aren't": {"now": {"tow": 1}},
    "options out of range": {"now": {"tau": -1.0}},
    "no seconds": {"seconds": {}},
    "seconds that are text": {"seconds": {"total": "x"}},
    "a history of numbers": {"history": {"clean loss": 3}},
    "a history of text": {"history": {"clean loss": ["x"]}},
    "a history of no numbers": {"history": {"clean loss": [1e999]}},
}


@pytest.mark.parametrize("name", NOTES)
def test_a_checkpoint_whose_notes_are_none_is_refused(clean_data, tmp_path, name):
    file = tmp_path / "run.safetensors"
    awm(net(), clean_data, **SHORT, checkpoint=file)
    tensors, notes = load_run(file)
    text = json.dumps({**notes, **NOTES[name]})
    safetensors.torch.save_file(tensors, file, {"maskops_run": text, "maskops_run_format": "1"})
    refused(clean_data, file)


def refused(clean_data, file):
    before = file.read_bytes()
    with pytest.raises(
        CheckpointError, match=rf"^(awm|load_run): {file}(: a tensor has a name| is no checkpoint of )"
    ) as caught:
        awm(net(), clean_data, **SHORT, checkpoint=file, resume=True)
    assert str(caught.value).isprintable() and file.read_bytes() == before


def test_a_network_in_bfloat16_that_overflows_is_named(clean_data):
    model = network().float()
    with torch.no_grad():
        model[3].weight.fill_(3e38)
    images = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    assert ": first in the output of 3, before anything" in failing(images, model, dtype=torch.bfloat16)
