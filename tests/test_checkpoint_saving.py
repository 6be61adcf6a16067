"""Writing files: whole or not at all, and refused in one line."""

import os
import sys

import pytest
import safetensors
import safetensors.torch
import torch
from helpers_checkpoint import assert_equal, weights

from maskops import checkpoint
from maskops.checkpoint import CheckpointError, load_state_dict, save_masks, save_state_dict


def test_save_state_dict_writes_a_plain_dict_without_the_buffer_behind_it(tmp_path):
    arena = torch.zeros(1_000_000)
    save_state_dict(tmp_path / "model.pth", {"weight": arena[:4].view(2, 2)})
    assert (tmp_path / "model.pth").stat().st_size < 10_000
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert type(content) is dict and torch.equal(content["weight"], torch.zeros(2, 2))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_save_state_dict_stores_tied_weights_under_both_names(tmp_path, suffix):
    tied = torch.rand(3)
    save_state_dict(tmp_path / f"model{suffix}", {"embed": tied, "head": tied})
    assert_equal(load_state_dict(tmp_path / f"model{suffix}"), {"embed": tied, "head": tied})


@pytest.mark.parametrize(("suffix", "writer"), [(".pth", torch), (".safetensors", safetensors.torch)])
@pytest.mark.parametrize("failing", ["write", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_interrupted_save_leaves_the_old_file_alone(tmp_path, monkeypatch, suffix, writer, failing, error):
    path, expected = tmp_path / f"model{suffix}", weights()
    save_state_dict(path, expected)

    def fail(*arguments):
        if failing == "write":
            target = next(argument for argument in arguments if isinstance(argument, os.PathLike))
            target.write_bytes(b"half a file")
        raise error

    if failing == "write":
        monkeypatch.setattr(writer, "save" if writer is torch else "save_file", fail)
    else:
        monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError) as caught:
        save_state_dict(path, {"weight": torch.zeros(1)})
    if caught.type is CheckpointError:
        expected_message = f"save_state_dict: cannot write {path} (OSError: disk full); what was there is untouched"
        assert str(caught.value) == expected_message
    assert list(tmp_path.iterdir()) == [path]
    assert_equal(load_state_dict(path), expected)


def test_save_forces_the_new_file_to_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(checkpoint.os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    save_masks(tmp_path / "masks.safetensors", {"mask": torch.ones(1)}, {})
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_saved_file_has_ordinary_permissions(tmp_path, suffix):
    save_state_dict(tmp_path / f"model{suffix}", weights())
    (tmp_path / "ordinary").touch()
    assert (tmp_path / f"model{suffix}").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_loaded_tensors_outlive_the_file_that_replaces_theirs(tmp_path):
    path = tmp_path / "model.safetensors"
    save_state_dict(path, {"weight": torch.ones(1000)})
    before = load_state_dict(path)["weight"]
    save_state_dict(path, {"weight": torch.zeros(10)})
    assert torch.equal(before, torch.ones(1000))


@pytest.mark.parametrize("name", ["nowhere/model.pth", "nowhere/model.safetensors", "file/model.pth"])
def test_save_says_that_a_folder_cannot_be_written(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match=r"^save_state_dict: cannot write .* \((FileNotFound|NotADirectory)Error: .*\)"
    ):
        save_state_dict(tmp_path / name, weights())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes to every folder")
def test_save_says_that_a_folder_is_read_only(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"^save_masks: cannot write .* \(PermissionError: .*\)"):
        save_masks(tmp_path / "masks.safetensors", {"mask": torch.ones(1)}, {})


def test_save_refuses_unknown_suffixes():
    with pytest.raises(CheckpointError, match=r"^save_masks: the file name must end in .safetensors; got masks.pth$"):
        save_masks("masks.pth", {"mask": torch.ones(1)}, {})
    expected = r"^save_state_dict: the file name must end in .safetensors or .pth or .pt or .th or .bin; got model.npz$"
    with pytest.raises(CheckpointError, match=expected):
        save_state_dict("model.npz", weights())


@pytest.mark.parametrize("save", [save_state_dict, lambda path, tensors: save_masks(path, tensors, {})])
def test_save_refuses_what_is_no_tensor(tmp_path, save):
    path = tmp_path / "model.safetensors"
    with pytest.raises(TypeError, match=r"^save_(state_dict|masks): expected names and tensors; got 'epoch': int$"):
        save(path, {"weight": torch.ones(1), "epoch": 3})
    with pytest.raises(TypeError, match=r"^save_(state_dict|masks): expected names and tensors; got 0: Tensor$"):
        save(path, {0: torch.ones(1)})
    with pytest.raises(ValueError, match=r"^save_(state_dict|masks): expected at least one tensor; got none$"):
        save(path, {})
    assert list(tmp_path.iterdir()) == []


def test_missing_safetensors_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(
        ImportError, match=r"^save_masks: .safetensors files need safetensors: pip install safetensors$"
    ):
        save_masks(tmp_path / "masks.safetensors", {"mask": torch.ones(1)}, {})
