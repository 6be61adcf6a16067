"""What is said where: dry runs, JSON, quiet and verbose; and ``maskops bench``."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from helpers_cli import ARCH, QUICK, line, refused, write_inputs
from helpers_hostile import tree

from maskops.cli import bench, dry_run, main
from maskops.purify._plan import Plan
from maskops.purify.methods import METHODS

STEPS = ["--inner-steps", "1", "--outer-steps", "1"]


@pytest.fixture
def purify(tmp_path):
    """The command line of ``purify`` on a small network."""
    inputs = write_inputs(tmp_path)

    def argv(*extra, **changes):
        quick = [*QUICK, *(STEPS if changes.get("method", "awm") == "awm" else [])]
        return ["purify", *line({**inputs, "out": tmp_path / "out", **changes}), *quick, *extra]

    return argv


def fail(*args, **kwargs):
    raise AssertionError("it ran")


@pytest.mark.parametrize("method", ["awm", "nft", "ft"])
def test_a_dry_run_says_what_would_run_and_writes_nothing(purify, tmp_path, capsys, monkeypatch, method):
    monkeypatch.setitem(METHODS, method, dataclasses.replace(METHODS[method], run=fail))
    before = tree(tmp_path)
    attack = {"trigger": "badnets_square:size=2", "target": 2}
    assert main(purify("--dry-run", method=method, n=9, **attack)) == 0
    said = capsys.readouterr().out
    assert all(words in said for words in (METHODS[method].title, "(9, 3, 8, 8) clean", "epochs=1", "nothing was run"))
    assert ("MB of tensors" in said) == (method != "ft")
    assert method != "awm" or "beta=0.1," in said
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_dry_run_in_json_has_all_settings(purify, capsys):
    assert main(purify("--dry-run", "--json", "--tau", "3", "--shard")) == 0
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert said["method"] == "awm" and said["options"]["tau"] == 3 and said["options"]["batch_size"] == 12
    assert said["steps"] == {"epochs": 1, "inner_steps": 1, "outer_steps": 1} and printed.err == ""
    assert said["plan"]["peak"] > 0 and said["inputs"]["clean_images"] == 12 and said["images"]["classes"] == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trigger": "badnets_square", "target": 3}, "--target must be below the model's 3 classes; got 3"),
        ({"trigger": "badnets_square:size=20", "target": 1}, "images must hold 20 x 20 pixels"),
        ({"clean": "labels.npz"}, "--clean: labels must be below the model's 3 classes; got 9"),
        ({"clean": "grey.npz", "eval": "grey.npz"}, "can't compute on images (1, 8, 8)"),
        ({"tau": -1}, "tau must be a number of at least 0"),
        ({"micro-batch-size": 0}, "micro_batch_size must be"),
        ({"include": "no*"}, "pattern 'no*' fits none of the model's conv layers"),
        ({"out": "x.npz"}, "can't write to"),
        ({"out": "x.npz/deeper"}, "can't write to"),
        ({"out": "full"}, "is not empty"),
        ({"weights": "x.npz"}, "x.npz"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(purify, tmp_path, capsys, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    images = np.random.default_rng(1).random((4, 3, 8, 8))
    np.savez("labels.npz", x=images, y=np.array([0, 9, 1, 2]))
    np.savez("grey.npz", x=images[:2, :1], y=np.array([0, 1]))
    if changes.get("eval") == "grey.npz":
        np.savez("others.npz", x=images[2:, :1], y=np.array([0, 1]))
        changes = {**changes, "eval": "others.npz"}
    before = tree(tmp_path)
    assert words in refused(capsys, purify("--dry-run", **changes))
    assert tree(tmp_path) == before


def test_a_dry_run_is_for_one_process_and_knows_the_memory_of_a_gpu(purify, capsys, monkeypatch):
    with monkeypatch.context() as several:
        several.setenv("WORLD_SIZE", "2")
        assert "--dry-run is for one process" in refused(capsys, purify("--dry-run"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**9))
    dry_run._check_memory({"peak": 10**6}, torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"^it needs 2.5 GB, and 1 MB are free on cuda: maskops plan --memory"):
        dry_run._check_memory({"peak": 25 * 10**8}, torch.device("cuda"))


def test_json_is_the_result_and_nothing_else(purify, tmp_path, capsys, no_picture):
    assert main(purify("--json", "--verbose")) == 0
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {name: said[name] for name in written} == written
    assert said["out"] == str(tmp_path / "out") and "model.safetensors" in said["files"]
    assert "backend reference: " in printed.err and "eager" in printed.err


def test_quiet_says_errors_alone(purify, capsys, no_picture):
    argv = [text for text in purify("--quiet") if text != "--no-progress"]
    assert main(argv) == 0
    assert "".join(capsys.readouterr()) == ""
    assert "give --overwrite" in refused(capsys, argv)
    assert "not allowed with" in refused(capsys, purify("--quiet", "--verbose"))


def test_progress_goes_to_stderr(purify, capsys, no_picture):
    assert main([text for text in purify() if text != "--no-progress"]) == 0
    printed = capsys.readouterr()
    assert "ACC %" in printed.out and "epoch" in printed.err and "awm" not in printed.out


def test_an_error_leaves_nothing_in_json(purify, capsys):
    assert "tau must be" in refused(capsys, purify("--json", "--tau", "-1"))


def test_info_and_plan_speak_json(capsys, monkeypatch):
    assert main(["info", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["torch"] == torch.__version__ and "reference" in said["backends"]
    found = Plan(1, {"weights": 2}, {"step": 3}, 4, {"dtype": torch.bfloat16, "layers": ["conv"]}, 5, fits=False)
    monkeypatch.setattr("maskops.cli.plan.plan", lambda *model, **about: found)
    named = {"arch": ARCH, "shape": "3,8,8", "classes": 3, "memory": "1B"}
    assert main(["plan", *line(named), "--json"]) == 1
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert said["fits"] is False and said["peak"] == 6 and said["options"] == {"dtype": "bfloat16", "layers": ["conv"]}
    assert "doesn't fit" in printed.err and printed.err.count("\n") == 1


def test_the_demo_speaks_json(tmp_path, capsys, monkeypatch):
    def run(folder, *how):
        print("a table")
        folder.mkdir()
        (folder / "result.json").write_text('{"der": 0.9}')

    monkeypatch.setattr("maskops.demo.run", run)
    assert main(["demo", "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(tmp_path / "out"), "der": 0.9}


def test_bench_runs_the_checkout_s_benchmarks_or_says_where_they_are(tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(bench.subprocess, "run", lambda *given, **how: calls.append((given, how)) or done)
    done = type("Done", (), {"returncode": 7})
    assert main(["bench", "steps", "--device", "cpu", "--help"]) == 7
    ((command,), how) = calls[0]
    assert command[1:] == ["-m", "benchmarks", "steps", "--device", "cpu", "--help"]
    assert os.path.isdir(os.path.join(how["env"]["PYTHONPATH"].split(os.pathsep)[0], "benchmarks"))
    monkeypatch.setattr(bench, "_ROOT", tmp_path)
    assert "python -m benchmarks in a checkout" in refused(capsys, ["bench", "steps"])


@pytest.mark.parametrize("command", ["purify", "fold", "plan", "info", "demo"])
def test_every_command_explains_itself(capsys, command):
    for argv in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(argv)
    said = capsys.readouterr().out
    assert f"usage: maskops {command}" in said and "bench" in said
