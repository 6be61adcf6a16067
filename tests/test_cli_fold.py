"""``maskops fold``: a model with its masks in the weights, or one line and nothing written."""

import json

import numpy as np
import pytest
import torch
from helpers_cli import ARCH, line, network, refused

from maskops.checkpoint import load_state_dict, save_masks
from maskops.cli import main
from maskops.purify.methods import METHODS

STEPS = {"steps": 2}
ONE_STEP = {"awm": {"inner_steps": 1, "outer_steps": 1}, "swm": STEPS, "anp": STEPS, "nft": STEPS}


@pytest.fixture
def fold(tmp_path):
    """Runs ``fold`` on a model and masks in the folder."""
    torch.manual_seed(0)
    torch.save(network().state_dict(), tmp_path / "model.pth")
    save_masks(tmp_path / "masks.safetensors", {"0.mask": torch.rand(4, 3, 3, 3), "1.neuron_mask": torch.rand(4)}, {})

    def argv(*extra, **changes):
        options = {"arch": ARCH, "weights": "model.pth", "masks": "masks.safetensors", "out": "out.pth", **changes}
        options = {name: value if name == "arch" else tmp_path / value for name, value in options.items()}
        return ["fold", *line(options), *extra]

    return argv


@pytest.mark.parametrize("method", ["awm", "swm", "anp", "nft", "rnp"])
def test_folding_a_run_s_masks_gives_the_run_s_model(fold, tmp_path, capsys, method):
    model, data = network(), (torch.rand(12, 3, 8, 8), torch.arange(12) % 3)
    model.load_state_dict(load_state_dict(tmp_path / "model.pth"))
    result = METHODS[method].run(model.eval(), data, epochs=1, progress=False, **ONE_STEP.get(method, {}))
    save_masks(tmp_path / "masks.safetensors", result.masks, result.options)
    assert main(fold()) == 0
    found, expected = load_state_dict(tmp_path / "out.pth"), result.model.state_dict()
    differing = {name.rpartition(".")[2] for name in found if not torch.equal(found[name], expected[name])}
    assert ("new statistics" in capsys.readouterr().err) == bool(differing)
    assert differing == ({"running_mean", "running_var", "num_batches_tracked"} if method == "nft" else set())


def test_every_granularity_and_kind_of_layer_folds(fold, tmp_path, capsys):
    masks = {"0.mask": torch.rand(4, 3, 1, 1), "3.mask": torch.rand(4, 1, 1, 1), "4.neuron_mask": torch.rand(4)}
    save_masks(tmp_path / "masks.safetensors", {**masks, "8.mask": torch.rand(3, 4).round()}, {})
    assert main(fold("--json")) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["masks"] == 4 and said["zeros"] > 0 and said["out"] == str(tmp_path / "out.pth")
    before, found = (load_state_dict(tmp_path / name) for name in ("model.pth", "out.pth"))
    for name, mask in masks.items():
        weight = name.rpartition(".")[0] + ".weight"
        assert torch.equal(found[weight], before[weight] * mask)
    assert torch.equal(found["0.bias"], before["0.bias"])


def test_masks_of_bytes_fold_as_steps_of_a_255th(fold, tmp_path):
    mask = torch.rand(4, 3, 3, 3)
    save_masks(tmp_path / "masks.safetensors", {"0.mask": mask}, {}, dtype=torch.uint8)
    assert main(fold()) == 0
    before, found = (load_state_dict(tmp_path / name)["0.weight"] for name in ("model.pth", "out.pth"))
    assert torch.equal(found, before * ((255 * mask).round() / 255))


def test_layers_that_share_a_weight_share_a_mask(tmp_path, capsys):
    model = tied()
    mask = torch.rand(3, 3, 3, 3)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    save_masks(tmp_path / "masks.safetensors", {"0.mask": mask}, {})
    files = {"weights": tmp_path / "model.pth", "masks": tmp_path / "masks.safetensors", "out": tmp_path / "out.pth"}
    assert main(["fold", *line({"arch": f"{__name__}:tied", **files})]) == 0
    found = load_state_dict(tmp_path / "out.pth")
    assert torch.equal(found["0.weight"], model[0].weight * mask)
    assert torch.equal(found["1.weight"], found["0.weight"])


def tied():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.Conv2d(3, 3, 3))
    model[1].weight = model[0].weight
    return model


def test_a_file_that_is_there_stays_unless_told_otherwise(fold, tmp_path, capsys):
    (tmp_path / "out.pth").write_text("precious")
    assert "out.pth is there already; name another file, or give --overwrite" in refused(capsys, fold())
    assert (tmp_path / "out.pth").read_text() == "precious"
    assert main(fold("--overwrite", "--quiet")) == 0
    assert "".join(capsys.readouterr()) == "" and load_state_dict(tmp_path / "out.pth")
    (tmp_path / "folder.pth").mkdir()
    assert refused(capsys, fold("--overwrite", out="folder.pth")).endswith("is there already; name another file\n")


MASK = torch.rand(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("masks", "changes", "words"),
    [
        ({"9.mask": MASK}, {}, "doesn't fit the model: it has no layer for 9.mask"),
        ({"2.mask": MASK}, {}, "doesn't fit the model: it has no layer for 2.mask"),
        ({"0.masks": MASK}, {}, "doesn't fit the model: it has no layer for 0.masks"),
        ({"0.mask": MASK[:3]}, {}, "doesn't fit the model: scores of 0 must have one of the shapes"),
        ({"0.mask": MASK * np.nan}, {}, "0.mask must hold finite numbers; got NaN or infinite ones"),
        ({"0.mask": MASK.round().int()}, {}, "0.mask must hold floating numbers or bytes; got torch.int32"),
        ({f"{i}.mask": MASK for i in range(10, 20)}, {}, "and 6 more"),
        ({"0.mask": MASK}, {"masks": "model.pth"}, "model.pth is no valid safetensors file"),
        ({"0.mask": MASK}, {"masks": "nothing.safetensors"}, "there is no file"),
        ({"0.mask": MASK}, {"weights": "masks.safetensors"}, "doesn't fit the architecture"),
        ({"0.mask": MASK}, {"out": "out.onnx"}, "must end in .safetensors or .pth"),
        ({"0.mask": MASK}, {"out": "no/out.pth"}, "there is no folder"),
    ],
)
def test_what_cannot_be_folded_is_one_line_and_nothing_written(fold, tmp_path, capsys, masks, changes, words):
    save_masks(tmp_path / "masks.safetensors", masks, {})
    before = sorted(tmp_path.iterdir())
    assert words in refused(capsys, fold(**changes))
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_is_full_is_a_run_that_failed(fold, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    assert main(fold()) == 1
    printed = capsys.readouterr()
    assert "No space left on device" in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "out.pth").exists()
