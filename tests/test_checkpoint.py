"""Reading a state dict: every nesting and format, and no code, whatever the file holds."""

import json
import os
import pickle
import struct
import subprocess

import pytest
import safetensors
import safetensors.torch
import torch
from helpers_checkpoint import assert_equal, weights
from torch import nn

from maskops.checkpoint import CheckpointError, load_state_dict, save_state_dict

SUFFIXES = [".pth", ".pt", ".th", ".bin", ".safetensors"]


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


def refused(path):
    """The one line with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"load_state_dict: {path}")
    assert "weights_only=False" not in message
    return message.removeprefix(f"load_state_dict: {path}").strip()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_state_dict_round_trip_is_exact(tmp_path, suffix):
    expected = weights()
    save_state_dict(tmp_path / f"model{suffix}", expected)
    assert_equal(load_state_dict(tmp_path / f"model{suffix}"), expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_load_state_dict_reads_both_torch_formats(tmp_path, zipped):
    expected = weights()
    path = saved(tmp_path / "model.pth", expected, _use_new_zipfile_serialization=zipped)
    assert_equal(load_state_dict(str(path)), expected)


@pytest.mark.parametrize(
    "keys",
    [
        ("net",),
        ("state_dict",),
        ("model",),
        ("model_state_dict",),
        ("netC",),
        ("state_dict", "state_dict"),
        ("model", "net"),
    ],
    ids="/".join,
)
def test_load_state_dict_unwraps_nestings(tmp_path, keys):
    content = expected = weights()
    for key in reversed(keys):
        beside = {"epoch": 3, "acc": 84.5, "arch": "vgg", "optimizer": {"state": {0: {"step": torch.ones(1)}}}}
        content = {key: content, "identity_grid": torch.zeros(2), **beside}
    assert_equal(load_state_dict(saved(tmp_path / "model.pth", content)), expected)


def test_load_state_dict_passes_over_a_configuration(tmp_path):
    expected = weights()
    content = {"model": {"arch": "vgg", "depth": 16}, "net": expected}
    assert_equal(load_state_dict(saved(tmp_path / "model.pth", content)), expected)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_load_state_dict_takes_off_wrapper_prefixes(tmp_path, prefix):
    expected = weights()
    content = {"net": {prefix + name: tensor for name, tensor in expected.items()}}
    assert_equal(load_state_dict(saved(tmp_path / "model.pth", content)), expected)


def test_load_state_dict_takes_off_prefixes_of_safetensors(tmp_path):
    expected = {"bias": torch.ones(3)}
    safetensors.torch.save_file({"module.bias": torch.ones(3)}, tmp_path / "model.safetensors")
    assert_equal(load_state_dict(tmp_path / "model.safetensors"), expected)


def test_load_state_dict_keeps_a_prefix_that_not_all_names_have(tmp_path):
    expected = {"module.weight": torch.ones(1), "head.weight": torch.ones(2)}
    assert_equal(load_state_dict(saved(tmp_path / "model.pth", expected)), expected)


def test_load_state_dict_returns_plain_tensors(tmp_path):
    path = saved(tmp_path / "model.pth", {"weight": nn.Parameter(torch.ones(2))})
    weight = load_state_dict(path)["weight"]
    assert type(weight) is torch.Tensor and not weight.requires_grad


class Reduced:
    """Unpickles as a call of function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stateful:
    """Unpickles by __setstate__ of a class of ours."""

    def __init__(self, target):
        self.target = target

    def __getstate__(self):
        return {"target": self.target}

    def __setstate__(self, state):
        open(state["target"], "w").close()


BOMBS = {
    "shell": lambda target: Reduced(os.system, f"touch {target}"),
    "process": lambda target: Reduced(subprocess.check_call, ["touch", target]),
    "eval": lambda target: Reduced(eval, f"open({target!r}, 'w')"),
    "exec": lambda target: Reduced(exec, f"open({target!r}, 'w')"),
    "open": lambda target: Reduced(open, target, "w"),
    "pickle": lambda target: Reduced(pickle.loads, pickle.dumps(Reduced(open, target, "w"))),
    "setstate": lambda target: Stateful(target),
}


@pytest.mark.parametrize("wrap", ["zip", "legacy", "pickle-2", "pickle-4"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_load_state_dict_never_runs_code(tmp_path, bomb, wrap):
    target = tmp_path / "ran"
    content = {"net": {"weight": torch.ones(2), "bomb": BOMBS[bomb](str(target))}}
    path = tmp_path / "model.pth"
    if wrap.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(wrap[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=wrap == "zip")
    message = refused(path)
    assert not target.exists()
    assert message.endswith("ask for torch.save(model.state_dict(), …) or a .safetensors file")
    assert "refused, and nothing in it was run" in message
    pickle.loads(pickle.dumps(content))
    assert target.exists(), "the bomb is a real one"


def test_load_state_dict_names_what_would_run(tmp_path):
    path = saved(tmp_path / "model.pth", {"net": Reduced(os.system, "true")})
    assert refused(path).startswith(f"would run code when read ({os.system.__module__}.system): refused")
    path = saved(tmp_path / "model.pth", {"net": Reduced(os.system, "true")}, _use_new_zipfile_serialization=False)
    assert refused(path).startswith(f"would run code when read ({os.system.__module__}.system): refused")


def test_load_state_dict_stays_safe_when_the_environment_asks_for_less(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target = tmp_path / "ran"
    refused(saved(tmp_path / "model.pth", Reduced(open, str(target), "w")))
    assert not target.exists()


def test_load_state_dict_reads_no_pickle_behind_a_safetensors_name(tmp_path):
    target = tmp_path / "ran"
    path = saved(tmp_path / "model.safetensors", Reduced(open, str(target), "w"))
    assert refused(path).startswith("is no valid safetensors file (")
    assert not target.exists()


def test_load_state_dict_refuses_a_whole_module(tmp_path):
    path = saved(tmp_path / "model.pth", nn.Sequential(nn.Linear(2, 2)))
    assert refused(path).startswith("holds a whole pickled nn.Module, and reading one runs code (torch.nn.modules.")
    path = saved(path, {"model": nn.Linear(2, 2)}, _use_new_zipfile_serialization=False)
    assert refused(path).startswith("holds a whole pickled nn.Module, and reading one runs code (torch.nn.modules.")


def test_load_state_dict_refuses_torchscript(tmp_path, recwarn):
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    recwarn.clear()
    assert refused(path).startswith("is a TorchScript archive, which holds code: refused")
    assert len(recwarn) == 0


def test_load_state_dict_prints_no_terminal_codes_of_a_file(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"\x80\x02cevil\x1b[31mname\nrun\n.")
    assert refused(path).isprintable()


def test_load_state_dict_says_what_is_at_the_path(tmp_path):
    with pytest.raises(CheckpointError, match=r"^load_state_dict: there is no file .*missing\.pth$"):
        load_state_dict(tmp_path / "missing.pth")
    assert refused(tmp_path) == "is a folder; name the file in it"
    empty = tmp_path / "empty.pth"
    empty.touch()
    assert refused(empty) == "is empty"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_load_state_dict_says_that_a_file_is_truncated(tmp_path, suffix, kept):
    path = tmp_path / f"model{suffix}"
    save_state_dict(path, weights())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    expected = "is no valid safetensors file (" if suffix == ".safetensors" else "is truncated, corrupt or no torch"
    assert refused(path).startswith(expected)


@pytest.mark.parametrize(
    "content", [b"hello world", b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b"\0" * 99]
)
def test_load_state_dict_refuses_other_formats(tmp_path, content):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    assert refused(path).startswith(
        ("is truncated, corrupt or no torch checkpoint (", "cannot be read as tensors alone (")
    )


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_load_state_dict_refuses_a_tensor_beyond_its_storage(tmp_path):
    storage = torch.zeros(4).untyped_storage()
    lying = Reduced(
        torch._utils._rebuild_tensor_v2, torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32)
    )
    lying.call = lying.call[0], (*lying.call[1], 0, (1000, 1000), (1000, 1), False, {})
    message = refused(saved(tmp_path / "model.pth", {"weight": lying}))
    assert "a tensor reaches up to element 999999 of a storage of 4" in message


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, "holds no tensors; expected tensors, or a dict of them under net or state_dict or .*; got nothing"),
        ({"epoch": 3, "net": {}}, r"holds no tensors; expected .*; got 'epoch', 'net'"),
        ({"encoder": {"weight": torch.ones(1)}}, "holds no tensors; expected .*; got 'encoder'"),
        (torch.ones(3), "must hold a dict of names and tensors; it holds Tensor"),
        ([torch.ones(3)], "must hold a dict of names and tensors; it holds list"),
        ({"net": {"net": weights()}, "model": weights()}, r"holds several models \(net, model\); save one alone"),
        ({"a": torch.ones(1), "epoch": 3}, ": the state dict must hold names and tensors; got 'epoch': int"),
        ({"net": {"a": torch.ones(1), "b": None}}, ": the state dict must hold names and tensors; got 'b': NoneType"),
        (
            {"net": {"a": torch.ones(1), 5: torch.ones(1)}},
            ": the state dict must hold names and tensors; got 5: Tensor",
        ),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "content",
)
def test_load_state_dict_says_what_the_file_holds_instead(tmp_path, content, found):
    path = saved(tmp_path / "model.pth", content)
    with pytest.raises(CheckpointError, match=f"^load_state_dict: .*model.pth ?{found}$"):
        load_state_dict(path)


def test_load_state_dict_ends_on_a_dict_that_holds_itself(tmp_path):
    content = {"epoch": 3}
    content["net"] = content
    assert refused(saved(tmp_path / "model.pth", content)).startswith("holds no tensors; expected")


def test_load_state_dict_refuses_safetensors_without_tensors(tmp_path):
    safetensors.torch.save_file({}, tmp_path / "model.safetensors")
    assert refused(tmp_path / "model.safetensors") == "holds no tensors"


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"w": {"dtype": "object", "shape": [4], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        ["no", "object"],
    ],
    ids=["beyond the file", "shape", "overflow", "backwards", "dtype", "data left over", "list"],
)
def test_load_state_dict_refuses_a_lying_safetensors_header(tmp_path, header):
    path = tmp_path / "model.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)
    assert refused(path).startswith("is no valid safetensors file (SafetensorError: ")


def test_load_state_dict_refuses_a_safetensors_header_of_lying_length(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert refused(path).startswith("is no valid safetensors file (SafetensorError: ")
