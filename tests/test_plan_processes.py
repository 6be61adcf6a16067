"""What a plan says of one of several processes, and what they then need."""

from threading import Thread

import pytest
import torch
import torch.distributed as dist
from helpers_distributed import LEAN, peaks, together
from torch import nn

from maskops.cli import main
from maskops.purify import plan
from maskops.purify._distributed import ALONE, imagine, team_of
from maskops.purify._savings import out_of_memory, savings_of
from maskops.purify._setting import MaskSetting
from maskops.purify.awm import AWMOptions

SHAPE = (3, 12, 12)
KINDS = {"layers": ("conv", "linear"), "gate": "output"}
RUNS = {
    "whole": {"branches": "concatenated", **KINDS},
    "in parts": {"branches": "concatenated", "shard": True, **LEAN, **KINDS},
}


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 48, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4))


def planned(options, **about):
    return plan(network(), shape=SHAPE, classes=4, images=7, batch_size=7, **about, **options)


def test_the_peak_of_a_plan_is_that_of_the_process_that_needs_most(tmp_path):
    runs = [("awm", network(), {**options, "batch_size": 7}) for options in RUNS.values()]
    found = together(tmp_path / "team", 2, peaks, runs, torch.rand(7, *SHAPE), torch.arange(7) % 4)
    for (name, options), *needed in zip(RUNS.items(), *found, strict=True):
        assert planned(options, processes=2).peak == pytest.approx(max(needed), rel=0.1), name


def test_each_process_has_its_part_of_batches_and_with_shard_of_what_is_learned():
    options = RUNS["in parts"]
    whole = {name: value for name, value in options.items() if name != "shard"}
    alone, several = planned(whole), planned(options, processes=3)
    for name in ("weights", "masks", "optimiser"):
        assert several.kept[name] == pytest.approx(alone.kept[name] / 3, rel=0.05), name
    largest = alone.kept["effective weights"]
    assert largest <= several.kept["effective weights"] <= largest + 4 * 3 * 256
    assert several.phases["inner"] == pytest.approx(3 / 7 * alone.phases["inner"], rel=0.1)
    assert several.parameters == alone.parameters
    assert several.bytes_per_parameter < alone.bytes_per_parameter
    assert "most at one time, in each of 3 processes" in str(several)


def test_several_processes_are_offered_parts_before_the_host_s_memory():
    given = {name: value for name, value in RUNS["in parts"].items() if name != "shard"}
    given |= {"dtype": None, "weight_dtype": None, "state_bits": 32, "mask_bits": 32, "recompute": False}
    given |= {"micro_batch_size": None}
    free = planned(given, processes=2)
    found = planned(given, processes=2, memory=free.peak - 1)
    assert found.fits and found.options["shard"] and "offload" not in found.options and found.processes == 2
    least = planned(given, processes=2, memory=found.peak - 1).options
    assert least["offload"] and "shard" not in least
    assert [name for name, _ in savings_of(1)] == [name for name, _ in savings_of(2) if name != "shard"]


def test_the_error_where_memory_ran_out_names_what_so_many_processes_have():
    several = str(out_of_memory("awm", "full", AWMOptions(), MaskSetting(), processes=2))
    assert "shard=True, offload=True; see" in several and "memory=…, processes=2)" in several
    assert "shard" not in str(out_of_memory("awm", "full", AWMOptions(), MaskSetting()))
    in_parts = str(out_of_memory("awm", "full", AWMOptions(shard=True), MaskSetting(), processes=2))
    assert "mask_bits=16; see" in in_parts


def test_what_a_plan_is_of_does_not_depend_on_a_group_that_is_there(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with imagine(3):
            team = team_of("awm")
            assert (team.rank, team.size, team.part(7).rows) == (0, 3, slice(0, 3))
        with imagine(1):
            assert team_of("awm") is ALONE
    finally:
        dist.destroy_process_group()


def test_a_plan_leaves_the_runs_of_other_threads_alone():
    found = []
    with imagine(3):
        thread = Thread(target=lambda: found.append(team_of("awm")))
        thread.start()
        thread.join()
    assert found == [ALONE] and team_of("awm") is ALONE


def test_the_command_line_plans_several_processes(capsys):
    line = "plan --arch maskops.demo:network --shape 1,8,8 --classes 10 --batch-size 2 --images 2 --processes"
    assert main([*line.split(), "2"]) == 0
    assert "most at one time, in each of 2 processes" in capsys.readouterr().out
    assert main([*line.split(), "0"]) == 2
    assert capsys.readouterr().err == "maskops plan: plan: processes must be at least 1; got 0\n"
