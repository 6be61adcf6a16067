"""The command line: what it writes and prints, and one line and an exit code for what it can't do."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import maskops
from maskops import demo
from maskops.backdoor import evaluate
from maskops.checkpoint import load_masks, load_state_dict, save_state_dict
from maskops.cli import main, parser, unfinished
from maskops.purify._masks import MaskRun
from maskops.purify.methods import METHODS

ONE_EPOCH = ["--epochs", "1", "--no-progress", "--device", "cpu"]
THREE_EPOCHS = ["--epochs", "3", *ONE_EPOCH[2:], "--inner-steps", "1", "--outer-steps", "1"]
QUICK = [*ONE_EPOCH, "--inner-steps", "1", "--outer-steps", "1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory, backdoored_digits):
    folder = tmp_path_factory.mktemp("digits")
    (images, labels), (others, answers) = demo.digits()
    torch.save({"net": backdoored_digits.state_dict(), "epoch": 15}, folder / "model.pth")
    np.savez(folder / "digits.npz", x_train=images, y_train=labels, x_test=others, y_test=answers)
    return folder


@pytest.fixture
def purify(files, tmp_path):
    """Runs ``purify`` on the digits with these options in place of, or beside, the usual ones."""

    def run(*extra, quick=QUICK, **changes):
        options = {
            "arch": "maskops.demo:network",
            "weights": files / "model.pth",
            "clean": f"{files / 'digits.npz'}:train",
            "eval": f"{files / 'digits.npz'}:test",
            "trigger": "badnets_square:size=2,margin=0",
            "target": 0,
            "n": 100,
            "out": tmp_path / "out",
            **changes,
        }
        given = [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]
        return main(["purify", *given, *quick, *extra])

    return run


QUICK_STEPS = {
    "awm": "--inner-steps 1 --outer-steps 1",
    "anp": "--steps 2 --number 3 --flip",
    "nft": "--steps 2 --augmentation cutmix",
    "swm": "--steps 2",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_options_and_writes_its_result(purify, tmp_path, method):
    extra = QUICK_STEPS.get(method, "").split()
    assert purify("--seed", "2", *extra, method=method, quick=ONE_EPOCH) == 0
    options = json.loads((tmp_path / "out" / "result.json").read_text())["options"]
    assert options["method"] == method and options["seed"] == 2
    fields = {field.name for part in METHODS[method].presets["paper"] for field in dataclasses.fields(part)}
    assert options.keys() >= fields


@pytest.mark.parametrize("method", METHODS)
def test_the_help_of_every_method_explains_its_options(capsys, method):
    with pytest.raises(SystemExit, match="0"):
        main(["purify", "--method", method, "--help"])
    printed = capsys.readouterr().out
    assert " ".join(METHODS[method].title.split()) in " ".join(printed.split())
    for part in METHODS[method].presets["paper"]:
        for field in dataclasses.fields(part):
            assert field.name == "folded" or f"--{field.name.replace('_', '-')}" in printed


def test_a_method_that_is_not_there_is_refused_with_those_that_are(purify, capsys):
    with pytest.raises(SystemExit, match="2"):
        purify(method="amw")
    error = capsys.readouterr().err
    assert all(name in error for name in METHODS) and error.count("\n") == 1


def test_purify_writes_model_masks_numbers_and_a_picture(purify, tmp_path, capsys):
    assert purify("--curves", "--tau", "7", "--alpha", "0.8") == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("ACC %", "asr_all %", "asr_excl %", "RA %", "DER", "peak memory"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "masks.safetensors",
        "result.json",
        "report.html",
        "report.png",
    }
    masks, options = load_masks(tmp_path / "out" / "masks.safetensors")
    assert options["tau"] == 7.0 and options["alpha"] == 0.8 and options["method"] == "awm"
    model = demo.network()
    state = load_state_dict(tmp_path / "out" / "model.safetensors")
    model.load_state_dict(state)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    _, test = demo.digits()
    after = evaluate(model.eval(), *test, demo.TRIGGER, demo.TARGET)
    assert result["after"]["asr_all"] == pytest.approx(after.asr_all) and len(masks) == 4


def test_the_report_knows_what_was_warned_of_and_what_was_given(purify, files, tmp_path, capsys):
    arrays = np.load(files / "digits.npz")
    mixed = {name: np.concatenate([arrays[f"{name}_train"][:30], arrays[f"{name}_test"][:5]]) for name in "xy"}
    np.savez(tmp_path / "mixed.npz", **{f"{name}_train": array for name, array in mixed.items()})
    assert purify("--preset", "official", clean=f"{tmp_path / 'mixed.npz'}:train", n=None) == 0
    warning = "5 of 35 clean images are among those of --eval too"
    assert f"warning: {warning}\n" in capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["warnings"] == [warning] and result["preset"] == "official"
    assert result["inputs"]["clean_images"] == 35 and result["evaluation_images"] == 500
    assert result["triggers"].keys() == {"recovered", "real"} and 0 <= result["der"] <= 1
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"Warning: {warning}" in page and "taken for class 0" in page


@pytest.fixture
def stopped(purify, tmp_path, monkeypatch, capsys):
    """A folder with a run that Ctrl-C stopped in its second epoch."""
    report_epoch = MaskRun.report

    def stop(self, on_epoch, epoch, model):
        if epoch == 1:
            raise KeyboardInterrupt
        report_epoch(self, on_epoch, epoch, model)

    with monkeypatch.context() as patched:
        patched.setattr(MaskRun, "report", stop)
        assert purify(quick=THREE_EPOCHS) == 130
    assert capsys.readouterr().err.endswith(
        f"interrupted; --resume goes on from {tmp_path}/out/unfinished.safetensors\n"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unfinished.safetensors"]
    return tmp_path / "out"


def test_purify_goes_on_after_ctrl_c(purify, stopped):
    assert purify("--resume", quick=THREE_EPOCHS) == 0
    assert "unfinished.safetensors" not in {path.name for path in stopped.iterdir()}
    resumed = load_masks(stopped / "masks.safetensors")[0]
    assert purify("--overwrite", quick=THREE_EPOCHS) == 0
    whole = load_masks(stopped / "masks.safetensors")[0]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "is of a run that was stopped: give --resume to go on with it, or --overwrite"),
        (("--resume", "--overwrite"), "give one of them"),
        (("--resume", "--curves"), "was begun without --curves: leave it out"),
        (("--resume", "--tau", "3"), "is the checkpoint of a run with other options: tau"),
        (("--resume", "--seed", "7"), "is the checkpoint of"),
    ],
)
def test_a_stopped_run_is_kept_until_something_is_said(purify, stopped, capsys, options, message):
    before = (stopped / "unfinished.safetensors").read_bytes()
    assert purify(*options, quick=THREE_EPOCHS) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert (stopped / "unfinished.safetensors").read_bytes() == before


@pytest.mark.parametrize("method", ["awm", "ft"])
def test_curves_of_a_run_that_goes_on_are_those_of_one_that_was_not_stopped(purify, tmp_path, monkeypatch, method):
    quick = THREE_EPOCHS if method == "awm" else THREE_EPOCHS[:5]
    monkeypatch.setattr("maskops.purify._checkpoint._PAUSE", 0)
    assert purify("--curves", method=method, quick=quick, out=tmp_path / "whole") == 0
    add = unfinished.Curves.add

    def stop(self, epoch, metrics):
        add(self, epoch, metrics)
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(unfinished.Curves, "add", stop)
        assert purify("--curves", method=method, quick=quick) == 130
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["unfinished.json", "unfinished.safetensors"]
    assert purify("--resume", method=method, quick=quick) == 2  # without --curves
    assert purify("--resume", "--curves", method=method, quick=quick) == 0
    whole, stopped = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "out"))
    assert len(whole["curves"]) == 3 and stopped["curves"] == whole["curves"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_measurements_that_cannot_be_read_are_one_line(purify, stopped, capsys):
    (stopped / "unfinished.json").write_text('[{"acc": 1')
    assert purify("--resume", "--curves", quick=THREE_EPOCHS) == 2
    error = capsys.readouterr().err
    assert "unfinished.json can't be read" in error and error.count("\n") == 1
    assert sorted(path.name for path in stopped.iterdir()) == ["unfinished.json", "unfinished.safetensors"]
    assert purify("--overwrite", quick=THREE_EPOCHS) == 0
    assert not {path.name for path in stopped.iterdir()} & {"unfinished.json", "unfinished.safetensors"}


def test_a_stopped_run_can_be_replaced(purify, stopped):
    assert purify("--overwrite", quick=THREE_EPOCHS) == 0
    assert not (stopped / "unfinished.safetensors").exists()


def test_purify_without_a_trigger_measures_accuracy_alone(purify, capsys):
    assert purify(trigger=None, target=None) == 0
    printed = capsys.readouterr().out
    assert "ACC %" in printed and "asr_all" not in printed and "DER" not in printed


def test_purify_from_one_image_of_each_class(purify, tmp_path):
    assert purify("--one-shot", "--no-flip", n=None) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["options"]["batch_size"] == 32


def test_every_option_of_the_method_and_the_setting_can_be_given(purify, tmp_path):
    options = "--preset official --beta 0.3 --gamma 1e-6 --batch-size 8 --inner-lr 5 --lr 0.02 --lr-decay 0.5"
    options += " --lr-decay-epochs 2 --inner-labels true --projection project --project-every-step"
    options += " --trigger-penalty 0.1 --no-clamp --mean 0.5 --std 0.5 --layers conv,linear --include * --exclude 0,3"
    options += " --granularity neuron --branches concatenated --seed 3"
    assert purify(*options.split()) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())["options"]
    expected = {"beta": 0.3, "projection": "project", "clamp": False, "mean": [0.5], "granularity": "neuron", "seed": 3}
    assert {name: found[name] for name in expected} == expected
    assert found["layers"] == ["conv", "linear"] and found["exclude"] == ["0", "3"]


def broken(folder: Path, name: str) -> str:
    path = folder / name
    if name == "truncated.pth":
        path.write_bytes(b"PK\x03\x04")
    if name == "other.pth":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    if name == "bomb.pth":
        torch.save({"net": Bomb()}, path)
    return str(path)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bomb-went-off",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "vgg_small"}, "small_vgg, resnet18"),
        ({"arch": "maskops.demo:nothing"}, "nothing"),
        ({"weights": "missing.pth"}, "missing.pth"),
        ({"weights": "truncated.pth"}, "truncated.pth"),
        ({"weights": "bomb.pth"}, "bomb.pth"),
        ({"weights": "other.pth"}, "doesn't fit the architecture maskops.demo:network: it lacks 0.weight"),
        ({"clean": "missing.npz"}, "missing.npz"),
        ({"n": 0}, "0"),
        ({"n": 100000}, "1297"),
        ({"trigger": None}, "--trigger and --target belong together"),
        ({"tau": -1}, "tau must be a number of at least 0 or 'auto'; got -1.0"),
        ({"dtype": "int8"}, "int8"),
        ({"mean": 0.5}, "--mean and --std belong together"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(purify, tmp_path, capsys, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    for name in ("truncated.pth", "other.pth", "bomb.pth"):
        broken(tmp_path, name)
    try:
        code = purify(**changes)
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and words in captured.err, captured.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "bomb-went-off").exists()


def test_clean_images_to_measure_on_are_refused(purify, files, capsys):
    assert purify(eval=f"{files / 'digits.npz'}:train") == 2
    assert "measure on others" in capsys.readouterr().err


def test_a_folder_with_results_is_kept_unless_told_otherwise(purify, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("precious")
    assert purify() == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_text() == "precious"
    assert purify("--overwrite") == 0
    assert len(load_state_dict(tmp_path / "out" / "model.safetensors")) > 0


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (maskops.purify.NonFiniteError("awm: the inner loss became nan"), 1, "became nan"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    ],
)
def test_a_run_that_fails_writes_nothing(purify, tmp_path, capsys, monkeypatch, raised, code, words):
    def fail(*args, **kwargs):
        raise raised

    monkeypatch.setitem(METHODS, "awm", dataclasses.replace(METHODS["awm"], run=fail))
    assert purify() == code
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_info_is_a_fact_a_line(capsys, monkeypatch):
    monkeypatch.delenv("MASKOPS_BACKEND", raising=False)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["maskops", maskops.__version__]
    assert any(line.startswith("backend   reference: ") for line in lines)


def test_the_version_and_help_are_there(capsys):
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit, match="0"):
            main([option])
    assert maskops.__version__ in capsys.readouterr().out
    assert parser().format_help().count("purify") >= 1


def test_the_state_dict_of_safetensors_serves_too(purify, files, tmp_path, backdoored_digits):
    save_state_dict(tmp_path / "model.safetensors", backdoored_digits.state_dict())
    assert purify(weights=tmp_path / "model.safetensors") == 0


@pytest.mark.skipif("MASKOPS_BENCH" not in os.environ, reason="MASKOPS_BENCH names no folder of published models")
@pytest.mark.parametrize(("name", "target"), [("badnets_8", 8), ("trojan_sq_2", 2), ("l2_inv_0", 0)])
def test_published_models_run(tmp_path, name, target):
    folder = Path(os.environ["MASKOPS_BENCH"])
    images = folder / "cifar10_original.npz"
    trigger = "badnets_square" if name == "badnets_8" else f"additive:{folder / name.rpartition('_')[0]}.png"
    options = f"--arch small_vgg --weights {folder}/vgg_cifar10_{name}.pth --clean {images}:train --n 100"
    options += f" --eval {images}:test --trigger {trigger} --target {target} --out {tmp_path / 'out'}"
    assert main(["purify", *options.split(), *QUICK]) == 0
    before = json.loads((tmp_path / "out" / "result.json").read_text())["before"]
    assert before["acc"] > 0.84 and before["asr_all"] > 0.98
