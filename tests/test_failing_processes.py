"""An error in one process ends the others soon, and with its reason: long before the group's patience ends."""

import pytest
import torch
import torch.distributed as dist
from helpers_distributed import (
    begin,
    failing,
    failing_at_the_end,
    failing_command_line,
    failing_in_parts,
    outcomes,
    purify,
)
from test_distributed import QUICK, assert_same, digits  # noqa: F401

from maskops.purify import _distributed, _failures

PATIENT = 3600
REASON = "process {} has failed: ValueError: it fails; a checkpoint goes on from its last phase"


def together(folder, task, *arguments):
    return outcomes(folder, begin(folder, 2, task, *arguments, seconds=PATIENT))


def test_an_error_in_the_middle_of_a_step_ends_all_processes(tmp_path):
    file = tmp_path / "run.safetensors"
    found = together(tmp_path / "team", failing, "anp", 0, file)
    alike, whole, last = zip(*found, strict=True)
    assert alike == (("ValueError", "it fails"),) * 2
    expected = purify("anp")
    assert_same(whole, expected)  # an error of all leaves the group as it was
    assert last == (("ValueError", "it fails"), ("ProcessError", f"anp: {REASON.format(0)}"))
    assert_same([purify("anp", checkpoint=file, resume=True)], expected)


def test_a_run_does_not_hear_why_the_one_before_has_failed(tmp_path):
    (failed, one), (ended, other) = together(tmp_path / "team", failing_at_the_end, "swm")
    assert failed == ("ValueError", "it fails")
    assert_same([ended, one, other], purify("swm"))


@pytest.mark.parametrize(
    ("function", "message"),
    [("_masks.MaskRun.check_labels", "awm: it fails"), ("_masks.MaskRun.report", "it fails")],
    ids=["preparation", "after a phase"],
)
def test_an_error_where_the_others_put_layers_together_ends_all_processes(tmp_path, function, message):
    one, other = together(tmp_path / "team", failing_in_parts, f"maskops.purify.{function}", 1)
    reason = REASON.format(1) if message == "it fails" else REASON.format(1).replace("ValueError: ", "")
    assert (one, other) == (("ProcessError", f"awm: {reason}"), ("ValueError", message))


def test_the_command_line_ends_with_the_reason_of_another_process(tmp_path, digits):  # noqa: F811
    line = ["purify", *digits, *QUICK, "--out", str(tmp_path / "out")]
    (code, printed), other = together(tmp_path / "team", failing_command_line, *line)
    assert code == 1 and printed.splitlines()[-1] == f"maskops purify: awm: {REASON.format(1)}"
    assert other == (2, "maskops purify: it fails\n")


class Event:
    """A GPU's work that waits for another process."""

    def record(self):
        pass

    def query(self):
        return False


@pytest.fixture
def notes(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(_failures, "_notes", lambda: store)
    monkeypatch.setattr(_failures, "_PATIENCE", 0.1)
    monkeypatch.setattr(_distributed, "_LOOK", 0.01)
    return store


def test_a_gpu_that_waits_for_a_process_that_has_failed_is_not_waited_for(notes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    team = _distributed._Processes("awm", 0, 2)
    _failures.leave(2, "process 1 has failed: it fails")
    _failures.leave(2, "process 0 has failed: it fails too")
    with pytest.raises(_distributed.ProcessError, match=r"^awm: process 1 has failed: it fails; a checkpoint goes on"):
        team.settled(torch.device("cuda"))


def test_a_connection_that_ends_is_explained_by_what_the_other_process_has_said(notes):
    team = _distributed._Processes("awm", 0, 2)
    closed = RuntimeError("[/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41227")
    with pytest.raises(_distributed.ProcessError, match="another process of the run is gone"), team._others_there():
        raise closed
    _failures.leave(2, "process 1 has failed: it fails")
    with pytest.raises(_distributed.ProcessError, match=r"^awm: process 1 has failed: it fails"), team._others_there():
        raise closed


class Work:
    """A sum that waits once, and then ends by an error of the network; it isn't waited for once more."""

    def __init__(self):
        self.errors = ["Operation timed out!", "[/gloo/gloo/transport/tcp/pair.cc:547] read: Operation timed out"]

    def wait(self, *_):
        raise RuntimeError(self.errors.pop(0))


def test_a_network_that_times_out_is_not_waited_for_again(notes):
    team = _distributed._Processes("awm", 0, 2)
    with pytest.raises(_distributed.ProcessError, match=r"is gone \(read: Operation timed out\)"):
        team._wait(Work(), looks=True)


def test_notes_of_a_group_that_is_gone_say_nothing():
    assert _failures.heard() is None
    _failures.leave(2, "it fails")
