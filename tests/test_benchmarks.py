"""The benchmark of single ops, and what all benchmarks share: rows, times, memory."""

import doctest
import math
import multiprocessing
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command_line
from benchmarks import cases, measure, networks, ops, plan, results
from maskops import _dispatch

CPU = torch.device("cpu")


def rows(**changes):
    extent = results.Extent(saved=2e6, peak=3e6)
    what = "steps", "small_vgg", 4, torch.float32, "official", "inner"
    made = results.make_row(*what, (9.0, 10.0, 11.0), CPU, method="awm", extent=extent)
    return [replace(made, **changes)]


@pytest.fixture
def reference_alone(monkeypatch):
    """On the shapes of real networks Triton's interpreter would take an hour."""
    monkeypatch.setattr(ops, "BACKENDS", ("reference",))


def test_ops_agree_and_are_timed(reference_alone):
    shapes = [shape for layer, shape in networks.layers_of("small_vgg", 2) if not isinstance(layer, nn.MaxPool2d)]
    assert shapes[0] == (2, 3, 32, 32) and shapes[-1] == (2, 2048) and len(shapes) == 7
    outcome = ops.run(["small_vgg"], [2], torch.float32, CPU, repeats=1, warmup=0)
    assert not outcome.failed and not outcome.absent
    assert {row.phase.split()[0] for row in outcome.rows} == {
        *("masked_conv2d", "dual_masked_conv2d", "masked_conv2d_relu", "many_masked_conv2d", "masked_linear"),
        *("effective_weight", "mask", "rescale_to_l1_ball", "project_onto_l1_ball"),
        *("relu_bits", "max_pool", "prepare_images", "trigger_step_"),
    }
    assert {"mask step", "mask step of neuron masks"} <= {row.phase for row in outcome.rows}
    assert {row.contestant for row in outcome.rows} == {"eager", "reference", "floor"}
    assert len(ops.table(outcome).splitlines()) == 1 + len({(row.net, row.phase) for row in outcome.rows})


def seen_settings(monkeypatch):
    """What the environment was in each call of the Triton backend's choice between its two ways."""
    ways = pytest.importorskip("maskops.backends.triton.ways")
    seen, choose = [], ways.choose

    def watched(op, *arguments, start=None):
        seen.append((os.environ["MASKOPS_BACKEND"], os.environ["MASKOPS_LAYERS"], arguments[2].numel()))
        return choose(op, *arguments, start=start)

    monkeypatch.setattr(ways, "choose", watched)
    return seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is there without a GPU alone")
def test_both_ways_of_a_layer_and_its_price_without_a_mask_are_contestants(monkeypatch):
    seen = seen_settings(monkeypatch)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    case = next(cases.conv_cases("conv", layer, (1, 4, 5, 5), torch.float32, CPU))
    outcome = results.Outcome()
    steps = ops.contestants(case, compiles=False, tolerance=1e-5, outcome=outcome)
    ways = ["triton", "triton fused", "triton materialised", "triton unmasked"]
    cuda = [] if isinstance(_dispatch._load("cuda"), str) else ["cuda"]
    assert list(steps) == ["eager", *cuda, *ways, "reference", "floor"] and not outcome.absent
    settings = [("triton", "", 216), ("triton", "fused", 216), ("triton", "materialised", 216), ("triton", "fused", 1)]
    assert seen == settings
    linear = cases.linear_cases("linear", nn.Linear(4, 6), (2, 3, 4), torch.float32, CPU)
    for case in (*linear, *cases.dual_conv_cases("conv", layer, (1, 4, 5, 5), torch.float32, CPU)):
        found = ops.contestants(case, compiles=False, tolerance=1e-5, outcome=outcome)
        assert ("triton unmasked" in found) == ("mask gradient" not in case.phase), outcome.absent
    assert not outcome.failed


def test_the_price_of_the_mask_is_in_the_table():
    fused, unmasked = (
        results.make_row("ops", "conv", 1, torch.float32, name, "op", (ms,) * 3, CPU)
        for name, ms in (("triton fused", 3.0), ("triton unmasked", 2.0))
    )
    lines = ops.table(results.Outcome([fused, unmasked])).splitlines()
    assert lines[0].split()[-1] == "fused/unmasked" and lines[1].split()[-1] == "1.50"


def test_a_gpu_has_masks_of_a_billion_weights_too():
    entries, _ = plan.plan(["small_vgg"], [2], torch.float32, torch.device("cuda"))
    counts = [sum(shape.numel() for shape in entry.make.args[1]) for entry in entries[:2]]
    assert [round(count, -8) for count in counts] == [300_000_000, 1_000_000_000]
    assert len(plan.plan(["small_vgg"], [2], torch.float32, CPU)[0]) == len(entries) - 2


def test_a_missing_library_is_named(reference_alone, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(networks, "find_spec", lambda library: None)
    entries, absent = plan.plan(["resnet50", "small_vgg"], [2], torch.float32, CPU)
    assert absent == {"resnet50": "it needs torchvision or transformers, which is not installed"} and entries
    wanted = ["ops", "--net", "vit_l", "--ops", "l1_ball", "--repeats", "1", "--out", str(tmp_path)]
    assert command_line.main(wanted) == 0
    assert "vit_l: no numbers, it needs timm or transformers, which is not installed" in capsys.readouterr().out
    with pytest.raises(ImportError, match="no_library"):
        plan.plan(["no_library:net"], [2], torch.float32, CPU)


class ReadsNumbers(nn.Sequential):
    """Like networks whose depth is spread over their layers by a linspace."""

    def __init__(self):
        rates = [rate.item() for rate in torch.linspace(0, 0.5, 2)]
        kernels = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, stride=2, groups=6)
        super().__init__(*kernels, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(rates[1]), nn.Linear(6, 2))


def test_networks_of_other_libraries_are_built_without_memory(monkeypatch):
    monkeypatch.setattr(networks, "OTHERS", {"other": (f"{__name__}:ReadsNumbers",)})
    titles = [cases.layer_title(*placed) for placed in networks.layers_of("other", 5)]
    assert titles == [
        "conv 5x3x224x224 to 6, 3x3",
        "conv 5x6x222x222 to 6, 3x3 stride 2, 6 groups",
        "linear 5x6 to 2",
    ]
    entries, _ = plan.plan(["other"], [5, 7], torch.float32, CPU)
    assert [entry.batch for entry in entries if entry.op == "masked_linear"] == [5, 7]
    assert sum(entry.op == "neuron_masks" for entry in entries) == 1


def test_nothing_begins_after_the_deadline():
    outcome = ops.run(["small_vgg"], [2], torch.float32, CPU, repeats=1, warmup=0, wanted=["l1_ball"], deadline=0)
    assert outcome.absent == {"ops": "the time was up before the last 3 of 3"} and not outcome.rows


def test_kernels_are_compiled_in_shares(reference_alone):
    what = ["small_vgg"], [2], torch.float32, CPU, ["l1_ball", "trigger_step_"]
    counts = [ops.run_share(share, 3, *what, math.inf) for share in range(3)]
    assert all(counts) and sum(counts) == ops.run_share(0, 1, *what, math.inf)
    assert ops.run_share(0, 1, *what, 0) == 0


def test_a_contestant_that_fails_fails_the_run_and_no_other(reference_alone, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no such luck\nat all")

    monkeypatch.setitem(plan.IMAGES, "prepare_images", fails)
    wanted = ["prepare_images", "trigger_step_"]
    outcome = ops.run(["small_vgg"], [2], torch.float32, CPU, repeats=1, warmup=0, wanted=wanted)
    assert outcome.failed and {row.phase for row in outcome.rows} == {"trigger_step_"}
    assert outcome.absent == {"prepare_images, 1 of 2": "RuntimeError: no such luck"}


def test_an_op_that_computes_something_else_gets_no_number():
    ones, twos = (torch.ones(2),), (torch.full((2,), 2.0),)
    case = cases.Case("shape", "op", lambda: lambda: ones, lambda: lambda: twos, lambda: lambda: twos)
    outcome = results.Outcome()
    steps = ops.contestants(case, compiles=False, tolerance=0.1, outcome=outcome)
    assert list(steps) == ["eager", "floor"] and outcome.failed
    assert outcome.absent["reference, op, shape"] == "1 away from plain torch"


def test_a_rerun_replaces_its_rows_and_no_others(tmp_path):
    first = results.write(rows() + rows(contestant="compile"), tmp_path)
    assert first == results.write(rows(net="resnet18"), tmp_path)
    results.write(rows(ms_p50="5"), tmp_path)
    kept = [(row.net, row.contestant, row.ms_p50) for row in results.read(first)]
    assert kept == [("resnet18", "official", "10"), ("small_vgg", "official", "5")]
    assert results.write([], tmp_path) is None
    large = results.make_row("ops", "shape", 1, torch.float32, "eager", "op", (1, 2, 12345.6), CPU)
    assert (large.ms_p20, large.ms_p80, large.saved_mb) == ("1", "12346", "")


def test_results_of_other_columns_are_refused(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("net,ms\n")
    with pytest.raises(ValueError, match=r"old\.csv: expected the columns benchmark, method, net"):
        results.read(path)


def test_device_names_become_file_names():
    assert results.file_name("NVIDIA H200") == "nvidia-h200.csv"
    assert (
        results.file_name("AMD Ryzen 9 7950X 16-Core Processor/../x") == "amd-ryzen-9-7950x-16-core-processor-..-x.csv"
    )
    assert "/" not in results.file_name(results.device_name(CPU))
    assert doctest.testmod(results).failed == 0


def test_saved_bytes_are_the_most_at_one_time():
    x = torch.ones(1000, requires_grad=True)

    def twice():
        for _ in range(2):
            x.exp().sum().backward()

    assert measure.peak_saved_bytes(twice) == 4000
    assert measure.peak_saved_bytes(lambda: (x.exp() + x.exp()).sum()) == 8000
    assert measure.peak_saved_bytes(lambda: (x * x.detach()).sum(), [x]) == 0


def allocate(megabytes):
    return lambda: torch.ones(megabytes * 250_000).sum()


def test_peak_memory_on_the_cpu_is_that_of_the_step():
    assert multiprocessing.current_process().name == "MainProcess"
    assert 60e6 < measure.peak_bytes(allocate, 64, device=CPU).allocated < 80e6


def test_time_limit_ends_what_takes_longer():
    with pytest.raises(TimeoutError, match="longer than 1 s"), measure.time_limit(1):
        while True:
            pass


def test_timings_alternate_and_give_percentiles():
    order = []
    timed = {
        name: measure.Timed(lambda repetition, name=name: order.append((name, repetition)), lambda repetition: None)
        for name in "ab"
    }
    samples = measure.interleaved(timed, repeats=2, warmup=1, device=CPU)
    assert order == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert len(samples["a"].ms) == 2
    assert measure.Samples([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]).percentiles() == (2.0, 3.5, 5.0)
    assert (measure.Samples([1.0]) + measure.Samples([30.0]) / 15).ms == [3.0]


def test_a_step_that_fails_is_dropped_and_the_others_are_timed():
    def fails(repetition):
        raise RuntimeError("no such luck\nat all")

    timed = {"a": measure.Timed(fails), "b": measure.Timed(lambda repetition: None)}
    failed = {}
    samples = measure.interleaved(timed, repeats=2, warmup=1, device=CPU, failed=failed)
    assert failed == {"a": "RuntimeError: no such luck"} and list(samples) == ["b"]
    with pytest.raises(RuntimeError, match="no such luck"):
        measure.interleaved(timed, repeats=1, warmup=0, device=CPU)


def test_a_row_has_rates_and_shares_of_the_ceilings():
    extent = results.Extent(flops=4e9, bytes=2e9, launches=7, reserved=5e6)
    ceilings = results.Ceilings(flops=8e8, bytes=4e8)  # in a millisecond
    row = results.make_row("steps", "n", 1, torch.float32, "a", "p", (9, 10, 11), CPU, extent=extent, ceilings=ceilings)
    assert (row.gflop, row.gb, row.tflops, row.of_matmul, row.of_copy) == ("4", "2", "0.4", "0.5", "0.5")
    assert (row.launches, row.reserved_mb, row.saved_mb, row.ms) == ("7", "5", "", 10.0)


def test_launches_on_a_gpu_are_those_that_the_profiler_sees(monkeypatch):
    device_type = torch.autograd.DeviceType
    events = [
        type("Event", (), {"name": name, "device_type": device, "is_user_annotation": named})
        for name, device, named in (
            ("aten::mm", device_type.CPU, False),
            ("sm90_gemm", device_type.CUDA, False),
            ("Memcpy DtoD", device_type.CUDA, False),
            ("Optimizer.step#Adam.step", device_type.CUDA, False),
            ("mine", device_type.CUDA, True),
        )
    ]

    class Profile:
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731
        events = lambda self: events_seen  # noqa: E731

    events_seen = events
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: Profile())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert measure.launches(lambda: None) == 2


def test_memory_on_a_gpu_is_the_growth_during_the_step(monkeypatch):
    memory = {"memory_allocated": 100, "memory_reserved": 200, "max_memory_allocated": 150, "max_memory_reserved": 400}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    ran = []
    assert measure.growth(lambda: ran.append(1), torch.device("cuda")) == (50, 200) and ran == [1]


@pytest.mark.parametrize("net", ["resnet50", "convnext_l", "vit_l"])
def test_networks_for_large_images_are_those_of_their_names(net):
    pytest.importorskip("transformers")
    weights = {"resnet50": 25.6e6, "convnext_l": 197.8e6, "vit_l": 304.3e6}
    with torch.device("meta"):
        model = networks.build(net)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(weights[net], rel=0.01)
    kinds = {type(layer) for layer in networks.masked_layers(net, model).values()}
    assert kinds == ({nn.Conv2d} if net == "resnet50" else {nn.Conv2d, nn.Linear})
    assert networks.usual_batch(net) == (64 if net == "resnet50" else 32) and networks.image_size(net) == 224
