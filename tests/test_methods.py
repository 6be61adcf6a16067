"""What holds for every method: one calling convention, one kind of result, no harm to the user's model."""

import copy
import dataclasses
import inspect
import json

import pytest
import torch
from helpers import tiny_network

from maskops import demo
from maskops.backdoor import evaluate
from maskops.data import split
from maskops.purify import Purification
from maskops.purify.methods import METHODS

QUICK = {
    "awm": {"inner_steps": 2, "outer_steps": 2},
    "anp": {"steps": 2},
    "swm": {"steps": 2},
    "rnp": {"threshold": 0.5},
}
each_method = pytest.mark.parametrize("method", METHODS)


@each_method
def test_the_calling_convention_is_the_same(method):
    run = METHODS[method].run
    parameters = inspect.signature(run).parameters
    beside = ["preset", "on_epoch", "checkpoint", "resume"]
    assert list(parameters) == ["model", "clean_data", *beside, "options"]
    assert parameters["preset"].default == "paper" in METHODS[method].presets
    for preset in METHODS[method].presets.values():
        names = [field.name for part in preset for field in dataclasses.fields(part)]
        assert len(set(names)) == len(names)
    sections = ("model", "returns:", "errors:", "source:", "measured:", ">>> ")
    assert all(section in run.__doc__ for section in sections)


@each_method
def test_the_result_is_complete_and_the_users_model_untouched(clean_data, method):
    model = tiny_network()
    model[1].weight.requires_grad_(False)
    model[3].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    seen = []
    options = {"epochs": 2, "progress": False, **QUICK.get(method, {})}
    result = METHODS[method].run(
        model, clean_data, on_epoch=lambda epoch, m: seen.append((epoch, m.training)), **options
    )
    assert isinstance(result, Purification) and seen == [(0, False), (1, False)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert type(result.model) is type(model) and result.model.state_dict().keys() == before.keys()
    assert [module.training for module in result.model.modules()] == modes
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in model.parameters()]
    assert result.options["method"] == method and json.loads(json.dumps(result.options)) == result.options
    assert result.timings["total"] > 0 and all(len(values) >= 1 for values in result.history.values())
    theirs = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert theirs.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in result.model.state_dict().values())


@each_method
def test_bad_input_is_one_line_that_names_the_method(clean_data, method):
    images, labels = clean_data
    for data, options, kind in [
        ((images, labels + 5), {}, ValueError),
        ((images, labels[:3]), {}, ValueError),
        (clean_data, {"no_such_option": 1}, TypeError),
        (clean_data, {"preset": "best"}, ValueError),
        (clean_data, {"mean": (0.5,), "std": (0.5,)}, ValueError),
        (clean_data, {"device": "cud"}, ValueError),
    ]:
        with pytest.raises(kind) as error:
            METHODS[method].run(tiny_network(), data, progress=False, **options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("anp", {"epochs": 2, "steps": 40, "threshold": "auto"}),
        ("nft", {"epochs": 20}),
        ("swm", {"epochs": 10, "epsilon": 0.1, "alpha": 0.5, "lr": 0.05}),
    ],
)
def test_digits_keep_their_accuracy(backdoored_digits, method, options):
    """The backdoor stays, more or less: the docstrings say how much of it after the papers' settings."""
    train, test = demo.digits()
    clean = split(*train, 100, torch.Generator().manual_seed(0))[0]
    result = METHODS[method].run(backdoored_digits, clean, flip=False, progress=False, **options)
    before, after = (evaluate(model, *test, demo.TRIGGER, demo.TARGET) for model in (backdoored_digits, result.model))
    assert after.acc >= before.acc - 0.08 and after.asr_all <= before.asr_all
