from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers_distributed import (
    CASES,
    IN_PARTS,
    LEAN,
    all_cases,
    begin,
    broken,
    command_line,
    hanging,
    in_parts,
    killed,
    one_case,
    other_images,
    outcomes,
    purify,
    stopped,
    swept,
    together,
    with_norm,
)
from torch import nn

from maskops import demo
from maskops.checkpoint import load_masks, load_run
from maskops.cli import main
from maskops.purify import _checkpoint, _distributed


def assert_same(found, expected):
    """The results of all processes are those of one, and bit for bit those of each other."""
    for result in found:
        assert isinstance(result, dict), result
        assert result["history"].keys() == expected["history"].keys()
        for what, values in expected["history"].items():
            assert result["history"][what] == pytest.approx(values, rel=1e-9)
        assert result["tensors"].keys() == expected["tensors"].keys()
        for what, value in expected["tensors"].items():
            assert torch.allclose(result["tensors"][what], value, rtol=1e-7, atol=1e-9), what
            assert torch.equal(result["tensors"][what], found[0]["tensors"][what]), what


@pytest.fixture(scope="module")
def alone():
    return {name: purify(name) for name in CASES}


@pytest.fixture(scope="module", params=[2, 4])
def team(request, tmp_path_factory):
    return together(tmp_path_factory.mktemp("team"), request.param, all_cases)


@pytest.mark.parametrize("name", CASES)
def test_several_processes_come_to_what_one_does(alone, team, name):
    assert_same([found[name] for found in team], alone[name])


def test_masks_in_parts_are_those_of_one_process(tmp_path):
    found = together(tmp_path / "team", 2, in_parts)
    for name, more in IN_PARTS.items():
        assert_same([result[name] for result in found], purify(name, **LEAN, **more))
    for result in found:
        kept, masked = result["kept"]
        assert masked / 2 <= kept <= masked / 2 + 3 * 256


def test_what_one_process_began_several_in_parts_end_and_the_other_way_round(tmp_path, monkeypatch):
    monkeypatch.setattr(_checkpoint, "_PAUSE", 0)
    name, eight = "awm in one batch", {**LEAN, "state_bits": 8}
    alone, parts = tmp_path / "alone.safetensors", tmp_path / "parts.safetensors"
    expected = purify(name, **eight)
    assert stopped(0, name, alone, 1, eight) == "stopped"
    assert together(tmp_path / "first", 2, stopped, name, parts, 1, {**eight, "shard": True}) == ["stopped"] * 2
    assert_same([purify(name, **eight, checkpoint=parts, resume=True)], expected)
    more = {**eight, "shard": True, "checkpoint": alone, "resume": True}
    assert_same(together(tmp_path / "second", 2, one_case, name, {0: more, 1: more}), expected)


def test_layers_that_draw_do_so_in_each_process_for_itself(tmp_path):
    found = together(tmp_path / "team", 2, one_case, "nft with dropout")
    assert_same(found, found[0])
    assert found[0]["history"]["loss"] != purify("nft with dropout")["history"]["loss"]


def test_processes_with_other_options_are_refused(tmp_path):
    found = together(tmp_path / "team", 2, one_case, "swm", {0: {"epsilon": 0.1}, 1: {"epsilon": 0.2}})
    assert found == [("ValueError", "swm: processes 0 and 1 have other options: epsilon 0.1 and 0.2")] * 2


def test_processes_with_other_images_are_refused(tmp_path):
    found = together(tmp_path / "team", 2, other_images, "swm")
    assert found == [("ValueError", "swm: processes 0 and 1 have other images")] * 2


def test_an_error_before_the_first_step_ends_all_processes(tmp_path):
    found = together(tmp_path / "team", 2, one_case, "swm", {1: {"lr": -1.0}})
    message = "swm: lr must be a number of at least 0; got -1.0"
    assert found == [("ValueError", f"{message} (in process 1)"), ("ValueError", message)]


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (nn.SyncBatchNorm(8), "1 is a SyncBatchNorm: give a plain batch norm, which becomes one by itself"),
        (
            nn.InstanceNorm2d(8, track_running_stats=True),
            "several processes can't follow the running statistics of the instance norm 1",
        ),
    ],
)
def test_norms_that_cant_be_split_are_refused(tmp_path, norm, message):
    found = together(tmp_path / "team", 2, with_norm, norm)
    assert [kind for kind, _ in found] == ["ValueError"] * 2 and found[0][1] == f"nft: {message}"


@pytest.mark.parametrize(
    ("name", "function", "where"),
    [("swm", "_checkpoint._fingerprint", 1), ("anp", "_masks.MaskRun.hits", 0)],
    ids=["what must be the same", "the threshold"],
)
def test_an_error_where_the_others_wait_ends_all_processes(tmp_path, name, function, where):
    found = together(tmp_path / "team", 2, broken, name, f"maskops.purify.{function}", where)
    assert found[where] == ("ValueError", "it fails")
    assert found[1 - where] == ("ValueError", f"it fails (in process {where})")


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (RuntimeError("[/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41227"), True),
        (RuntimeError("[/gloo/unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation to complete"), True),
        (RuntimeError("[/gloo/gloo/transport/tcp/pair.cc:169] Socket closed [127.0.0.1]:27"), True),
        (dist.DistBackendError("NCCL error in: NCCLUtils.cpp:76, ncclRemoteError: A call failed"), True),
        (dist.DistNetworkError("The client socket has failed to connect to any network address"), True),
        (dist.DistBackendError("NCCL error in: NCCLUtils.cpp:76, ncclInvalidUsage: This usually reflects"), False),
        (RuntimeError("[enforce fail at /gloo/pair.cc:450] op.preamble.length <= op.nbytes. 32 vs 16"), False),
        (RuntimeError("The expanded size of the tensor (3) must match the existing size (4)"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
    ],
    ids=str,
)
def test_what_another_process_has_done_is_told_from_what_it_has_not(error, gone):
    team = object.__new__(_distributed._Processes)
    team._method = "awm"
    with pytest.raises(_distributed.ProcessError if gone else type(error)) as caught, team._others_there():
        raise error
    assert str(caught.value).startswith("awm: another process of the run is gone (") if gone else caught.value is error


def test_a_process_that_hangs_ends_the_others(tmp_path):
    processes = begin(tmp_path / "team", 2, hanging, "anp", seconds=3)
    processes[0].join(60)
    processes[1].kill()
    (kind, message), _ = outcomes(tmp_path / "team", processes)
    assert kind == "ProcessError" and message.startswith("anp: another process of the run is gone (")


def test_a_sweep_in_several_processes_is_refused(tmp_path):
    message = "sweep: the runs of a sweep aren't spread over processes: sweep outside of a process group"
    assert together(tmp_path / "team", 2, swept) == [("ValueError", message)] * 2


def test_what_several_processes_began_one_can_end(tmp_path):
    file = tmp_path / "run.safetensors"
    assert together(tmp_path / "first", 2, stopped, "awm", file, 1) == ["stopped"] * 2
    assert load_run(file)[1]["phases"] == 2
    refused = f"awm: {file} exists: give resume=True to go on from it, or another checkpoint="
    found = together(tmp_path / "again", 2, one_case, "awm", {rank: {"checkpoint": file} for rank in (0, 1)})
    assert found == [("ValueError", refused), ("ValueError", f"{refused} (in process 0)")]
    assert_same([purify("awm", checkpoint=file, resume=True)], purify("awm"))


def test_a_checkpoint_that_cant_be_written_ends_all_processes(tmp_path):
    file = tmp_path / "none" / "run.safetensors"
    found = together(tmp_path / "team", 2, one_case, "swm", {rank: {"checkpoint": file} for rank in (0, 1)})
    assert [kind for kind, _ in found] == ["CheckpointError"] * 2
    assert "cannot write" in found[0][1] and found[1][1] == f"{found[0][1]} (in process 0)"


def test_a_process_that_is_killed_ends_the_others_which_go_on_to_the_same_result(tmp_path):
    file = tmp_path / "run.safetensors"
    processes = begin(tmp_path / "team", 2, killed, "anp", file)
    survivor, gone = outcomes(tmp_path / "team", processes)
    assert gone is None and processes[1].exitcode == -9
    kind, message = survivor
    assert kind == "ProcessError" and "\n" not in message
    assert message.startswith("anp: another process of the run is gone (")
    assert message.endswith("); a checkpoint goes on from its last phase")
    both = {rank: {"checkpoint": file, "resume": True} for rank in (0, 1)}
    assert_same(together(tmp_path / "resumed", 2, one_case, "anp", both), purify("anp"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The options that say which model and images a command line works on."""
    folder = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    torch.save(demo.network().state_dict(), folder / "model.pth")
    (images, labels), (others, answers) = demo.digits()
    np.savez(folder / "digits.npz", x_train=images, y_train=labels, x_test=others[:50], y_test=answers[:50])
    data = {"clean": f"{folder / 'digits.npz'}:train", "eval": f"{folder / 'digits.npz'}:test", "n": 30}
    options = {"arch": "maskops.demo:network", "weights": folder / "model.pth", **data}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


QUICK = ["--epochs", "1", "--inner-steps", "2", "--outer-steps", "2", "--device", "cpu"]


def test_the_first_process_alone_prints_and_writes(tmp_path, digits):
    line = ["purify", *digits, *QUICK, "--curves", "--out"]
    assert main([*line, str(tmp_path / "alone"), "--no-progress"]) == 0
    (code, printed), other = together(tmp_path / "team", 2, command_line, *line, str(tmp_path / "out"))
    assert code == 0 and "written to" in printed and "awm: 100%" in printed
    assert other == (0, "")
    expected, found = (load_masks(tmp_path / folder / "masks.safetensors")[0] for folder in ("alone", "out"))
    assert all(torch.allclose(found[name], mask, atol=1e-5) for name, mask in expected.items())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(
        file.name for file in (tmp_path / "alone").iterdir()
    )


def test_the_first_process_alone_says_what_is_wrong(tmp_path, digits):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    line = ["purify", *digits, *QUICK, "--out", str(tmp_path / "out")]
    full = f"maskops purify: --out {tmp_path / 'out'} is not empty; name another folder, or give --overwrite\n"
    assert together(tmp_path / "full", 2, command_line, *line) == [(2, full), (2, "")]
    line = ["purify", *digits, "--method", "ft", "--device", "cpu", "--out", str(tmp_path / "other")]
    refused = "maskops purify: ft can't be split over processes: start it without torchrun\n"
    assert together(tmp_path / "ft", 2, command_line, *line) == [(2, refused), (2, "")]
