from __future__ import annotations

import json
import multiprocessing
import random
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers_resume import BASELINES, RUNS, images, network, purify, run_and_save

from maskops import checkpoint as files
from maskops.checkpoint import CheckpointError, load_run, save_run
from maskops.purify import Purification, awm, sweep, swm
from maskops.purify._checkpoint import Checkpoint
from maskops.purify._loop import Run
from maskops.purify.awm import AWM


def assert_same(result: Purification, expected: Purification) -> None:
    assert result.masks.keys() == expected.masks.keys()
    assert all(torch.equal(result.masks[name], expected.masks[name]) for name in expected.masks)
    assert result.history == expected.history
    if expected.trigger is not None:
        assert torch.equal(result.trigger, expected.trigger)
    state, same = result.model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(state[name], same[name]) for name in same)


def stop_after(epochs: int):
    """An ``on_epoch`` that stops the run, and the epochs that it has seen."""
    seen = []

    def on_epoch(epoch: int, model) -> None:
        seen.append(epoch)
        if len(seen) == epochs:
            raise KeyboardInterrupt

    return on_epoch, seen


@pytest.fixture(autouse=True)
def every_phase(monkeypatch):
    monkeypatch.setattr("maskops.purify._checkpoint._PAUSE", 0)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_goes_on_ends_as_one_that_was_never_stopped(name, tmp_path):
    file = tmp_path / "run.safetensors"
    expected = purify(name)
    on_epoch, _ = stop_after(2)
    with pytest.raises(KeyboardInterrupt):
        purify(name, checkpoint=file, on_epoch=on_epoch)
    on_epoch, seen = stop_after(99)
    assert_same(purify(name, checkpoint=file, resume=True, on_epoch=on_epoch), expected)
    assert seen == list(range(1, expected.options["epochs"]))  # the epoch that was stopped in is seen again
    again = purify(name, checkpoint=file, resume=True)  # of a run that is complete nothing is left to do
    assert_same(again, expected)
    assert again.timings["total"] > 0


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_goes_on_after_any_phase(name, tmp_path, monkeypatch):
    expected = purify(name)
    save = Checkpoint._save
    for phase in count():
        file, seen = tmp_path / f"{phase}.safetensors", []

        def stop(self, phases, last=phase):
            save(self, phases)
            if phases == last:
                raise KeyboardInterrupt

        def on_epoch(epoch, model, seen=seen):
            seen.append(epoch)

        try:
            with monkeypatch.context() as patched:
                patched.setattr(Checkpoint, "_save", stop)
                purify(name, checkpoint=file, on_epoch=on_epoch)
            break
        except KeyboardInterrupt:
            result = purify(name, checkpoint=file, resume=True, on_epoch=on_epoch)
            assert_same(result, expected)
            assert result.options == expected.options and seen == list(range(expected.options["epochs"]))
    assert phase > expected.options["epochs"]


@pytest.mark.parametrize("name", ["rnp", "nad", "mcr"])
def test_an_optimiser_that_has_done_its_part_is_no_part_of_the_state(name, tmp_path):
    purify(name, checkpoint=tmp_path / "run.safetensors")
    optimizers = {key.split(".")[1] for key in load_run(tmp_path / "run.safetensors")[0] if key.startswith("optimizer")}
    assert optimizers == {"1"}


@pytest.mark.parametrize("name", ["ft", "rnp"])
def test_a_baseline_that_is_stopped_in_a_pass_begins_it_anew(name, tmp_path, monkeypatch):
    file, calls, note = tmp_path / "run.safetensors", count(1), Run.note

    def breaks(self, what, value):
        if next(calls) == 5:
            raise KeyboardInterrupt
        note(self, what, value)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Run, "note", breaks)
        purify(name, checkpoint=file)
    assert_same(purify(name, checkpoint=file, resume=True), purify(name))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ft", {"lr": 0.5}, "ft: .* is the checkpoint of a run with other options: lr 0.01, now 0.5"),
        ("ft_sam", {}, "ft_sam: .* is the checkpoint of another method"),
    ],
)
def test_a_checkpoint_of_another_baseline_is_refused(tmp_path, name, change, message):
    file = tmp_path / "run.safetensors"
    purify("ft", checkpoint=file)
    with pytest.raises(ValueError, match=message):
        purify(name, checkpoint=file, resume=True, **change)
    with pytest.raises(ValueError, match="exists: give resume=True"):
        purify("ft", checkpoint=file)


def test_a_run_with_a_checkpoint_is_the_run_without(tmp_path):
    assert_same(purify("awm", checkpoint=tmp_path / "run.safetensors"), purify("awm"))


def test_a_stop_within_a_phase_goes_back_to_the_phase_before(tmp_path, monkeypatch):
    expected = purify("awm")
    calls = count(1)
    outer = AWM.outer

    def breaks(self, batch):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return outer(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(AWM, "outer", breaks)
        with pytest.raises(KeyboardInterrupt):
            purify("awm", checkpoint=tmp_path / "run.safetensors")
    assert load_run(tmp_path / "run.safetensors")[1]["phases"] == 3
    assert_same(purify("awm", checkpoint=tmp_path / "run.safetensors", resume=True), expected)


def test_a_run_that_is_killed_at_twenty_moments_ends_as_one_that_was_not(tmp_path):
    file, out = tmp_path / "run.safetensors", tmp_path / "out.pt"
    more = {"epochs": 40}
    expected = purify("awm", **more)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers_resume"])
    moments = random.Random(0)

    def begin():
        process = context.Process(target=run_and_save, args=("awm", str(file), str(out), more))
        process.start()
        return process

    process = begin()
    process.join()
    whole = expected.timings["total"]
    kills = phases = 0
    while kills < 20:
        file.unlink(missing_ok=True)
        out.unlink(missing_ok=True)
        while not out.exists():
            process = begin()
            process.join(moments.uniform(0, whole / 3))
            if process.exitcode is None and kills < 20:
                process.kill()
                kills += 1
            process.join()
            assert not file.exists() or load_run(file)[1]["phases"] >= phases  # a whole file, or none yet
        result = torch.load(out)
        assert all(torch.equal(result["masks"][name], mask) for name, mask in expected.masks.items())
        assert torch.equal(result["trigger"], expected.trigger)
        assert result["history"] == expected.history


def test_a_checkpoint_is_not_replaced_unasked(tmp_path):
    file = tmp_path / "run.safetensors"
    purify("awm", checkpoint=file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"awm: .*exists: give resume=True to go on from it, or another"):
        purify("awm", checkpoint=file)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "swm"}, "swm: .* is the checkpoint of another method"),
        ({"model": True}, "awm: .* is the checkpoint of another model"),
        ({"images": True}, "awm: .* is the checkpoint of another clean images"),
        ({"tau": 3.0}, "awm: .* is the checkpoint of a run with other options: tau .*, now 3.0"),
        ({"seed": 5}, "awm: .* is the checkpoint of a run with other options: seed 0, now 5"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    file = tmp_path / "run.safetensors"
    purify("awm", checkpoint=file)
    before = file.read_bytes()
    model, (pixels, labels) = network(), images()
    if change.pop("model", False):
        model[0].weight.data[0, 0, 0, 0] += 1
    if change.pop("images", False):
        labels = labels.flip(0)
    name = change.pop("name", "awm")
    run, (_, options) = {"awm": awm, "swm": swm}[name], RUNS[name]
    options = {**options, "batch_size": 8, "progress": False, **change}
    with pytest.raises(ValueError, match=message) as caught:
        run(model, (pixels, labels), checkpoint=file, resume=True, **options)
    assert "\n" not in str(caught.value) and file.read_bytes() == before


@pytest.mark.parametrize("cut", [0.0, 0.01, 0.5, 0.999])
def test_a_cut_checkpoint_is_refused(tmp_path, cut):
    file = tmp_path / "run.safetensors"
    purify("awm", checkpoint=file)
    content = file.read_bytes()
    file.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(CheckpointError, match=r"run\.safetensors") as caught:
        purify("awm", checkpoint=file, resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["phases", "options", "now", "history", "seconds"])
def test_a_checkpoint_without_its_notes_is_refused(tmp_path, name):
    file = tmp_path / "run.safetensors"
    purify("awm", checkpoint=file)
    tensors, notes = load_run(file)
    save_run(file, tensors, {**notes, name: None})
    with pytest.raises(CheckpointError, match="is no checkpoint of a run"):
        purify("awm", checkpoint=file, resume=True)


@pytest.mark.parametrize("name", ["run.mask", "run.trigger", "generator.draws"])
def test_a_checkpoint_without_its_tensors_is_refused(tmp_path, name):
    file = tmp_path / "run.safetensors"
    purify("awm", checkpoint=file)
    tensors, notes = load_run(file)
    save_run(file, {**tensors, name: torch.ones(3)}, notes)
    with pytest.raises(CheckpointError, match="lacks tensors of the run"):
        purify("awm", checkpoint=file, resume=True)


def test_a_folder_that_cant_be_written_to_is_refused_before_the_work(tmp_path):
    seen = []
    with pytest.raises(CheckpointError, match="cannot write"):
        purify("awm", checkpoint=tmp_path / "none" / "run.safetensors", on_epoch=lambda *_: seen.append(1))
    assert not seen


def test_a_full_disk_ends_the_run_and_keeps_the_state_before(tmp_path, monkeypatch):
    file = tmp_path / "run.safetensors"
    expected = purify("awm")
    writes = count(1)
    write = files._write_safetensors

    def full(function, path, tensors, metadata):
        if next(writes) < 4:
            return write(function, path, tensors, metadata)

        def write_some(temporary: Path) -> None:
            temporary.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        return files._write_atomically(function, path, write_some)

    with monkeypatch.context() as patched:
        patched.setattr(files, "_write_safetensors", full)
        with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device\); what") as caught:
            purify("awm", checkpoint=file)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.safetensors"]
    assert load_run(file)[1]["phases"] == 2
    assert_same(purify("awm", checkpoint=file, resume=True), expected)


def test_a_state_takes_at_most_a_twentieth_of_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr("maskops.purify._checkpoint._PAUSE", 1e9)
    file = tmp_path / "run.safetensors"
    saved = []
    save = files.save_run
    monkeypatch.setattr(
        "maskops.purify._checkpoint.save_run", lambda path, *rest: (saved.append(rest[1]["phases"]), save(path, *rest))
    )
    purify("awm", checkpoint=file)
    assert saved == [0, 8]  # the first and the last are always written


def test_what_is_learned_of_a_run_is_json(tmp_path):
    file = tmp_path / "run.safetensors"
    purify("anp", checkpoint=file, dtype=torch.bfloat16, exclude=("0",), layers=("conv", "norm"))
    _, notes = load_run(file)
    assert json.loads(json.dumps(notes)) == notes
    assert notes["options"]["dtype"] == "bfloat16" and notes["options"]["device"] == "cpu"


def test_a_sweep_goes_on_run_by_run(tmp_path, monkeypatch):
    runs = [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    options = {**RUNS["awm"][1], "batch_size": 8, "progress": False}
    expected = sweep("awm", network(), images(), runs, **options)
    steps = count(1)
    outer = AWM.outer

    def breaks(self, batch):
        if next(steps) == 11:  # in the second run
            raise KeyboardInterrupt
        return outer(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(AWM, "outer", breaks)
        with pytest.raises(KeyboardInterrupt):
            sweep("awm", network(), images(), runs, checkpoint=tmp_path, **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]
    for result, whole in zip(
        sweep("awm", network(), images(), runs, checkpoint=tmp_path, resume=True, **options), expected, strict=True
    ):
        assert_same(result, whole)


def test_a_checkpoint_of_a_gpu_is_refused_on_a_cpu_with_the_reason(tmp_path):
    path = tmp_path / "run.safetensors"
    purify("swm", checkpoint=path)
    tensors, notes = load_run(path)
    notes["options"]["device"] = "cuda"
    save_run(path, tensors, notes)
    with pytest.raises(ValueError, match="other options: device 'cuda', now 'cpu'"):
        purify("swm", checkpoint=path, resume=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer.0.0.exp_avg_sq", None),
        ("optimizer.0.0.step", torch.zeros((), dtype=torch.float64)),
        ("optimizer.0.0.nonsense", torch.zeros(())),
    ],
)
def test_a_state_in_pieces_is_refused(tmp_path, name, value):
    file = tmp_path / "run.safetensors"
    purify("awm", checkpoint=file)
    tensors, notes = load_run(file)
    tensors = {key: tensor for key, tensor in tensors.items() if key != name}
    save_run(file, {**tensors, **({} if value is None else {name: value})}, notes)
    with pytest.raises(CheckpointError, match=r"\(an optimiser's state is in pieces\)"):
        purify("awm", checkpoint=file, resume=True)


@pytest.mark.parametrize("options", [{"state_bits": 8, "mask_bits": 16}, {"state_bits": 8, "step_in_backward": True}])
def test_states_of_eight_bits_and_of_layers_go_on(tmp_path, options):
    expected = purify("awm", **options)
    on_epoch, _ = stop_after(2)
    with pytest.raises(KeyboardInterrupt):
        purify("awm", checkpoint=tmp_path / "run.safetensors", on_epoch=on_epoch, **options)
    assert_same(purify("awm", checkpoint=tmp_path / "run.safetensors", resume=True, **options), expected)
