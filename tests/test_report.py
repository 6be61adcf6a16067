"""The picture, the table and the folder of results."""

import dataclasses
import json

import pytest
import torch

from maskops import report
from maskops.backdoor import Metrics, evaluate
from maskops.demo import TARGET, TRIGGER, digits
from maskops.purify import awm


@pytest.fixture(scope="module")
def purified(backdoored_digits):
    (images, labels), test = digits()
    curves = []
    measure = lambda model: evaluate(model, *test, TRIGGER, TARGET)  # noqa: E731
    result = awm(
        backdoored_digits,
        (images[:50], labels[:50]),
        epochs=2,
        inner_steps=2,
        outer_steps=2,
        progress=False,
        on_epoch=lambda epoch, model: curves.append(measure(model)),
    )
    return result, measure(backdoored_digits), measure(result.model), images[:6], curves


def is_a_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.parametrize("parts", [0, 2, 3, 4])
def test_the_picture_takes_what_there_is(purified, tmp_path, parts):
    result, before, after, images, curves = purified
    given = {"before": before, "after": after, "images": images, "curves": curves}
    report.picture(result, tmp_path / "report.png", **dict(list(given.items())[:parts]))
    assert is_a_picture(tmp_path / "report.png")


@pytest.mark.parametrize("scores", [False, True])
def test_methods_without_masks_and_those_that_prune_are_written_too(purified, tmp_path, scores):
    result, before, after, images, curves = purified
    masks = {name: mask.round() for name, mask in result.masks.items()} if scores else {}
    other = {"masks": masks, "scores": result.masks if scores else None, "trigger": None}
    history = {"loss": [1.0, -2.0]}
    result = dataclasses.replace(result, history=history, **other)
    assert report.write(tmp_path, result, before, after, images, curves=curves) is None
    assert is_a_picture(tmp_path / "report.png")
    named = {path.name for path in tmp_path.iterdir()}
    assert named >= {"model.safetensors", "result.json"}
    assert named & {"masks.safetensors", "scores.safetensors"} == (
        {"masks.safetensors", "scores.safetensors"} if scores else set()
    )


def test_the_picture_leaves_matplotlibs_settings_alone(purified, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams), matplotlib.get_backend()
    report.picture(purified[0], tmp_path / "report.png")
    assert (dict(matplotlib.rcParams), matplotlib.get_backend()) == before


def test_without_matplotlib_everything_else_is_written(purified, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    result, before, after, images, curves = purified
    with report.results_folder(tmp_path / "out") as folder:
        reason = report.write(folder, result, before, after, images, curves=curves)
    assert "matplotlib" in reason and "\n" not in reason
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "masks.safetensors", "result.json", "report.html"}


def test_the_numbers_can_be_read_back(purified, tmp_path):
    result, before, after, images, curves = purified
    with report.results_folder(tmp_path / "out") as folder:
        report.write(folder, result, before, after, images, curves=curves)
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["history"] == result.history and found["options"] == result.options
    assert found["before"]["acc"] == before.acc and found["after"]["asr_all"] == after.asr_all


def test_a_failure_leaves_no_folder_and_no_half_result(tmp_path):
    with pytest.raises(RuntimeError), report.results_folder(tmp_path / "out") as folder:
        (folder / "model.safetensors").write_text("half")
        raise RuntimeError
    assert not any(tmp_path.iterdir())


def test_an_unwritable_place_is_known_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), report.results_folder(tmp_path / "file" / "out"):
        pytest.fail("the folder can't be made")


def test_tables_are_aligned():
    rows = report.table([("", "ACC %"), ("before", "98.8"), ("after", "7.0")]).splitlines()
    assert rows == ["        ACC %", "before   98.8", "after     7.0"]


def test_measurements_without_a_trigger_show_accuracy_alone():
    metrics = Metrics(acc=0.5, asr_all=None, asr_excl=None, ra=None, acc_per_class=torch.ones(1), asr_per_class=None)
    assert report.measured(metrics, metrics).split() == ["ACC", "%", "before", "50.0", "after", "50.0"]
