"""Files of masks and their options."""

import json

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from maskops.checkpoint import CheckpointError, load_masks, save_masks


def test_masks_round_trip_with_their_options(tmp_path):
    buffer = torch.rand(24)
    masks = {
        "stem.mask": torch.rand(4, 3, 3, 3).contiguous(memory_format=torch.channels_last),
        "bn.neuron_mask": nn.Parameter(torch.rand(4)),
        "view": buffer[4:12].view(2, 4),
        "same": buffer[4:12].view(2, 4),
        "strided": buffer[::2],
        "half": torch.rand(3).bfloat16(),
    }
    options = {
        "method": "awm",
        "alpha": 0.9,
        "seed": 0,
        "flip": True,
        "layers": ["stem", None],
        "trigger": {"tau": 1e3},
    }
    save_masks(tmp_path / "masks.safetensors", masks, options)
    found, found_options = load_masks(tmp_path / "masks.safetensors")
    assert found_options == options
    assert set(found) == set(masks)
    assert all(torch.equal(found[name], masks[name]) and found[name].is_contiguous() for name in masks)


def test_masks_can_be_read_by_safetensors_alone(tmp_path):
    save_masks(tmp_path / "masks.safetensors", {"mask": torch.ones(2)}, {"alpha": 0.9})
    with safetensors.safe_open(tmp_path / "masks.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["maskops"]) == {"alpha": 0.9}
        assert file.metadata()["maskops_format"] == "1"


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        (0.9, 0.999),
        {1: "one"},
        {1, 2},
        torch.float32,
        torch.ones(1),
        b"raw",
        object(),
        [[(1,)]],
    ],
    ids=lambda value: type(value).__name__,
)
def test_save_masks_refuses_options_that_json_would_change(tmp_path, value):
    with pytest.raises(TypeError, match=r"^save_masks: option 'betas' must be what JSON can represent; got .+$"):
        save_masks(tmp_path / "masks.safetensors", {"mask": torch.ones(2)}, {"alpha": 0.9, "betas": value})
    assert list(tmp_path.iterdir()) == []


def test_save_masks_refuses_an_option_without_a_name(tmp_path):
    with pytest.raises(TypeError, match=r"^save_masks: option 3 must be what JSON can represent; got 'three'$"):
        save_masks(tmp_path / "masks.safetensors", {"mask": torch.ones(2)}, {3: "three"})


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({}, "is no mask file: its metadata has no entry 'maskops'"),
        ({"maskops": "{}"}, "must have mask format 1; it has None"),
        ({"maskops": "{}", "maskops_format": "2"}, "must have mask format 1; it has 2"),
        ({"maskops": "{", "maskops_format": "1"}, r": the options are not JSON \(JSONDecodeError: .*\)"),
        ({"maskops": "[" * 9999, "maskops_format": "1"}, r": the options are not JSON \(.*\)"),
        ({"maskops": "[]", "maskops_format": "1"}, ": the options must be a JSON object; got list"),
    ],
    ids=["none", "no format", "format", "JSON", "nesting", "list"],
)
def test_load_masks_refuses_other_files(tmp_path, metadata, found):
    safetensors.torch.save_file({"mask": torch.ones(2)}, tmp_path / "masks.safetensors", metadata)
    with pytest.raises(CheckpointError, match=f"^load_masks: .*masks.safetensors ?{found}$"):
        load_masks(tmp_path / "masks.safetensors")


def test_load_masks_says_what_is_at_the_path(tmp_path):
    with pytest.raises(CheckpointError, match=r"^load_masks: there is no file .*missing\.safetensors$"):
        load_masks(tmp_path / "missing.safetensors")
    (tmp_path / "masks.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=r"^load_masks: .* is no valid safetensors file \(SafetensorError: "):
        load_masks(tmp_path / "masks.safetensors")
