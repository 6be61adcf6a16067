"""Options from a file, which the command line overrules; and files that are refused in one line."""

import json
import sys

import pytest
from helpers_cli import QUICK, line, refused, write_inputs
from helpers_hostile import little_memory

from maskops.checkpoint import load_masks
from maskops.cli import main, parser

yaml = pytest.importorskip("yaml", reason="files of options in YAML need PyYAML")
NEEDED = {"arch": "a", "weights": "w", "clean": "c", "eval": "e", "out": "o"}


def parsed(tmp_path, content, *argv, name="options.json", command="purify"):
    """The arguments of a command line with a file of these options."""
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    argv = [command, "--options", str(path), *argv]
    return parser(argv).parse_args(argv)


def test_a_file_has_every_kind_of_option(tmp_path):
    content = {
        **NEEDED, "method": "awm", "alpha": 0.5, "epochs": 3, "tau": "auto", "lr-decay": 1, "inner_lr": "1e-3",
        "clamp": False, "--batch-size": 8, "mean": [0.1, "0.2", 0], "std": 1, "layers": ["conv", "linear"],
        "exclude": "a,b", "dtype": "bfloat16", "weight_dtype": None, "device": "cpu", "include": [],
        "trigger": "badnets_square:size=2",
        "target": 3, "n": 20, "one_shot": False, "arch_options": {"width": 8}, "curves": True, "size": None,
    }  # fmt: skip
    found = vars(parsed(tmp_path, content))
    plain = {"alpha": 0.5, "epochs": 3, "tau": "auto", "lr_decay": 1.0, "inner_lr": 1e-3, "clamp": False}
    plain |= {"batch_size": 8, "mean": [0.1, 0.2, 0.0], "std": [1.0], "layers": ["conv", "linear"], "n": 20}
    plain |= {"exclude": ["a", "b"], "weight_dtype": None, "target": 3, "one_shot": False, "curves": True, "size": None}
    assert {name: found[name] for name in plain} == plain and found["arch_options"] == {"width": 8}
    assert str(found["dtype"]) == "torch.bfloat16" and found["out"].name == "o" and found["trigger"].trigger.size == 2


def test_yaml_says_the_same_as_json(tmp_path):
    content = {**NEEDED, "method": "nft", "lr": 0.01, "mean": [0.5, 0.5, 0.5], "flip": True, "arch_options": {"w": 8}}
    for name in ("options.yaml", "options.yml"):
        found = vars(parsed(tmp_path, yaml.safe_dump(content), name=name))
        assert found["lr"] == 0.01 and found["mean"] == [0.5] * 3 and found["flip"] is True
        assert found["arch_options"] == {"w": 8} and found["method"] == "nft"
    assert parsed(tmp_path, "lr: 1e-3\n" + yaml.safe_dump(NEEDED), name="options.yaml").lr == 1e-3


def test_the_command_line_wins(tmp_path):
    content = {**NEEDED, "method": "nft", "epochs": 3, "n": 5, "flip": True, "preset": "paper"}
    found = parsed(tmp_path, content, "--epochs", "7", "--no-flip", "--out=other")
    assert (found.epochs, found.flip, str(found.out), found.n) == (7, False, "other", 5)
    found = parsed(tmp_path, content, "--one-shot")
    assert found.one_shot and found.n is None
    found = parsed(tmp_path, {**NEEDED, "one-shot": True}, "--n", "4")
    assert found.n == 4 and not found.one_shot
    assert parsed(tmp_path, {**NEEDED, "alpha": 0.5}, "--method", "awm").method == "awm"


def test_plan_reads_files_too(tmp_path):
    content = {"arch": "small_vgg", "shape": [3, 32, 32], "classes": 10, "method": "nft", "memory": "2GB", "lr": 0.1}
    found = parsed(tmp_path, content, command="plan")
    assert found.shape == (3, 32, 32) and found.memory == 2e9 and found.lr == 0.1 and found.method == "nft"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"alpah": 1}, "there is no option alpah; did you mean alpha?"),
        ({"zzz": 1, "yyy": 2}, "there is no option zzz, yyy"),
        ({"\x1b[2Jevil\n": 1}, "there is no option ?[2Jevil"),
        ({"options": "more.json"}, "there is no option options"),
        ({"folded": False}, "there is no option folded"),
        ({"method": "amw"}, "method: it must be one of awm, swm"),
        ({"method": ["awm"]}, "method: it must be text; got ['awm']"),
        ({"alpha": True}, "alpha: it must be a number; got True"),
        ({"alpha": "much"}, "alpha: it can't be 'much'"),
        ({"alpha": [0.5]}, "alpha: it must be a number; got [0.5]"),
        ({"alpha": None}, "required: "),
        ({"epochs": 2.5}, "epochs: it can't be 2.5"),
        ({"clamp": "yes"}, "clamp: it must be true or false; got 'yes'"),
        ({"curves": 1}, "curves: it must be true or false; got 1"),
        ({"mean": [0.5, None]}, "mean: it must be numbers or text; got [0.5, None]"),
        ({"arch": 5}, "arch: it must be text; got 5"),
        ({"trigger": "badnets"}, "trigger: parse: unknown trigger 'badnets'"),
        ({"dtype": "int8"}, "dtype: expected a floating dtype"),
        ({"n": 5, "one_shot": True}, "n and one_shot can't be given together"),
        ({"batch-size": 5, "batch_size": 6}, "batch_size is there twice"),
        ([1, 2], "it must hold options by name; got list"),
        ('{"epochs": 1, "epochs": 2}', "a name is there twice"),
        ('{"epochs": 1', "can't be read (JSONDecodeError: "),
        ('{"alpha": NaN}', "NaN is no number of JSON's"),
        ('{"a": ' * 100000, "can't be read (RecursionError"),
        ("[" * 1000000, "can't be read (RecursionError"),
        (" " * (1 << 24) + "{}", "it has more than 16777216 bytes"),
        ('{"epochs": ' + "9" * 5000 + "}", "can't be read (ValueError: "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_json_of_no_use_is_one_line(tmp_path, capsys, content, words):
    (tmp_path / "o.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with little_memory():
        said = refused(capsys, ["purify", "--options", str(tmp_path / "o.json")])
    assert words in said and said.startswith("maskops purify: ") and len(said) < 700, said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: &a [1, 2]\nb: *a\n", "it has an alias"),
        ("a: &a [x]\n" + "".join(f"a{i}: &a{i} [{'*a' * 0}*a, *a]\n" for i in range(9)), "it has an alias"),
        ("a: &a {b: *a}", "it has an alias"),
        ("!!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
        ("[" * 60000, "it has brackets in brackets"),
        ("".join(" " * i + "a:\n" for i in range(350)), "can't be read (RecursionError"),
        ("a: " * 20000, "can't be read"),
        ("#" * 70000, "it has more than 65536 bytes"),
        ("epochs: 1\nepochs: 2", "a name is there twice"),
        ("1: 2", "names must be text; got 1"),
        ("? [1, 2]\n: 3", "is no text"),
        ("epochs: 2026-01-01", "epochs: it must be a number"),
        ("a: 1\n---\nb: 2", "can't be read"),
        ("\x00", "can't be read"),
        ("", "it must hold options by name; got NoneType"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_yaml_of_no_use_is_one_line(tmp_path, capsys, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o.yaml").write_text(content)
    with little_memory():
        assert words in refused(capsys, ["purify", "--options", "o.yaml"])
    assert [path.name for path in tmp_path.iterdir()] == ["o.yaml"]


def test_files_that_are_none_are_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "o.toml").touch()
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    (tmp_path / "folder.json").mkdir()
    for name, words in (
        ("o.toml", "must end in .json, .yaml, .yml"),
        ("no.json", "there is no such file"),
        ("folder.json", "there is no such file"),
        ("bytes.json", "can't be read (UnicodeDecodeError"),
    ):
        assert words in refused(capsys, ["plan", "--options", str(tmp_path / name)])
    assert "argument --options: expected one argument" in refused(capsys, ["purify", "--options"])
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "o.yaml").write_text("epochs: 1")
    said = refused(capsys, ["purify", "--options", str(tmp_path / "o.yaml")])
    assert "YAML needs PyYAML: pip install maskops[yaml], or write JSON" in said


@pytest.mark.parametrize("command", ["plan", "purify"])
def test_no_file_has_code_run(tmp_path, capsys, command):
    asked = {"arch": "os:system", "arch_options": {"command": f"touch {tmp_path}/ran"}}
    (tmp_path / "o.json").write_text(json.dumps(asked))
    said = refused(capsys, [command, "--options", str(tmp_path / "o.json")])
    assert "arch: os:system would be imported and called" in said and "--arch" in said
    assert not (tmp_path / "ran").exists()


def test_a_result_repeats_its_run(tmp_path, capsys, no_picture):
    inputs = write_inputs(tmp_path)
    given = {**inputs, "out": tmp_path / "first", "n": 9, "seed": 3, "trigger": "badnets_square:size=2", "target": 1}
    steps = ["--inner-steps", "1", "--outer-steps", "2", "--alpha", "0.7", "--mean", ".5,.5,.5", "--std", "1,1,1"]
    assert main(["purify", *line(given), *QUICK, *steps, "--arch-options", "width=4"]) == 0
    result = tmp_path / "first" / "result.json"
    said = json.loads(result.read_text())
    assert said["inputs"]["trigger"] == "badnets_square:size=2" and said["inputs"]["n"] == 9
    capsys.readouterr()
    again = ["purify", "--options", str(result), "--out", str(tmp_path / "second")]
    assert "helpers_cli:network would be imported and called" in refused(capsys, again)
    assert main([*again, "--arch", said["inputs"]["arch"]]) == 0
    (masks, options), (others, same) = (
        load_masks(tmp_path / name / "masks.safetensors") for name in ("first", "second")
    )
    assert same == {**options, "include": ["*"], "layers": ["conv"]}
    assert all((others[name] == mask).all() for name, mask in masks.items())
    assert json.loads((tmp_path / "second" / "result.json").read_text())["inputs"] == said["inputs"]
