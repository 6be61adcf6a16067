"""The demo's promise, end to end: a backdoor that is there, and gone afterwards."""

import json

import pytest
import torch

from maskops import demo
from maskops.backdoor import evaluate
from maskops.checkpoint import load_masks, load_state_dict
from maskops.cli import main


def test_the_backdoor_is_planted(backdoored_digits):
    _, test = demo.digits()
    metrics = evaluate(backdoored_digits, *test, demo.TRIGGER, demo.TARGET)
    assert metrics.acc > 0.95 and metrics.asr_all > 0.95


def test_training_and_test_images_are_disjoint():
    (images, _), (others, _) = demo.digits()
    assert len(images) == demo.TRAIN_IMAGES and len(images) + len(others) == 1797
    known = {image.numpy().tobytes() for image in images}
    assert not any(image.numpy().tobytes() in known for image in others)


def test_the_demo_removes_the_backdoor_and_leaves_its_files(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for words in ("ACC %", "asr_all %", "asr_excl %", "before", "after", "peak memory", str(tmp_path / "out")):
        assert words in printed
    found = {path.name for path in (tmp_path / "out").iterdir()}
    files = {"model.safetensors", "masks.safetensors", "result.json", "backdoored.safetensors", "digits.npz"}
    assert found == {*files, "report.html", "report.png"}
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    masks, options = load_masks(tmp_path / "out" / "masks.safetensors")
    assert options["method"] == "awm" and result["options"] == options
    model = demo.network()
    model.load_state_dict(load_state_dict(tmp_path / "out" / "model.safetensors"))
    _, test = demo.digits()
    after = evaluate(model.eval(), *test, demo.TRIGGER, demo.TARGET)
    assert after.asr_all < 0.2 and after.acc > 0.9
    assert masks.keys() == {"0.mask", "3.mask", "7.mask", "10.mask"}


def test_without_scikit_learn_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == "maskops demo: demo: the digits come with scikit-learn: pip install maskops[demo]\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_the_demo_runs_on_a_gpu(tmp_path):
    after = demo.run(tmp_path / "out", torch.device("cuda"))
    assert after.asr_all < 0.2 and after.acc > 0.9
