import copy
import doctest
import math
import multiprocessing
import os
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from benchmarks import __main__ as command_line
from benchmarks import awm, cases, measure, networks, ops, plan, problem, report, results
from benchmarks.contestants import CONTESTANTS, Maskops
from benchmarks.problem import ALPHA, BETA, GAMMA, INNER_LR, LR, SECOND_MOMENT, make_problem
from benchmarks.published import Official
from maskops import _dispatch

CPU = torch.device("cpu")
COMPARED = {name: make for name, make in CONTESTANTS.items() if name != "compile"}


class ForgetsTheTrigger(Maskops):
    def outer(self, index=0):
        batch, run = self.problem.indices[index], self.awm.run
        run.descend((ALPHA, run.images[batch], run.labels[batch]))
        self.awm.masks.step()


class Descends(Official):
    def inner(self, index=0):
        super().inner(index)
        with torch.no_grad():
            self.trigger.copy_(2 * self.problem.trigger - self.trigger)


def rows(**changes):
    made = results.make_row("awm", "small_vgg", 4, torch.float32, "official", "inner", (9.0, 10.0, 11.0), CPU, 2e6, 3e6)
    return [replace(made, **changes)]


def test_contestants_agree_with_the_published_procedure_and_are_timed():
    outcome = awm.run("small_vgg", 4, torch.float32, CPU, repeats=1, warmup=0, contestants=COMPARED, peaks=False)
    assert not outcome.failed and not outcome.absent
    timed = {(row.contestant, row.phase) for row in outcome.rows}
    assert timed == {(name, phase) for name in (*COMPARED, awm.AGAIN) for phase in awm.PHASES}
    saved = {(row.contestant, row.phase): float(row.saved_mb) for row in outcome.rows if row.saved_mb}
    assert saved["maskops", "inner"] < saved["floor", "inner"] < saved["careful", "inner"] < saved["official", "inner"]
    assert "maskops again" in awm.table(outcome)


@pytest.mark.parametrize(("wrong", "where"), [(ForgetsTheTrigger, "features"), (Descends, "trigger")])
def test_a_contestant_that_computes_something_else_gets_no_number(wrong, where, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(awm, "CONTESTANTS", {"wrong": wrong})
    arguments = ["awm", "--net", "small_vgg", "--batch", "4", "--repeats", "1", "--no-peaks", "--out", str(tmp_path)]
    assert command_line.main(arguments) == 1
    assert f"wrong: no numbers, its {where}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_published_steps_are_those_of_the_formulas():
    """The definition that all contestants are held against, once more, by hand and in float64."""
    given = make_problem("small_vgg", 4, torch.float32, CPU)
    found = awm.first_steps(Official(given))
    assert awm.disagreement(given, awm_by_hand(given), found)[1] < awm.TOLERANCE[torch.float32]


def awm_by_hand(given):
    model = copy.deepcopy(given.model).double()
    weights = {name: model.get_submodule(name).weight.detach() for name in given.masks}
    masks = {name: mask.double().requires_grad_() for name, mask in given.masks.items()}
    images, labels = given.images[given.indices[0]].double(), given.labels[given.indices[0]]
    trigger = given.trigger.double().requires_grad_()

    def loss(images, labels):
        effective = {f"{name}.weight": masks[name] * weight for name, weight in weights.items()}
        logits = functional_call(model, effective, images)
        return -logits.log_softmax(1)[range(len(labels)), labels].mean(), logits.argmax(1)

    _, predicted = loss(images, labels)
    (gradient,) = torch.autograd.grad(loss(images + trigger, predicted)[0], trigger)
    trigger = (trigger + INNER_LR * gradient).detach()

    total = ALPHA * loss(images, labels)[0] + BETA * loss((images + trigger).clamp(0, 1), labels)[0]
    total = total + GAMMA * sum(mask.abs().sum() for mask in masks.values())
    stepped = {}
    for (name, mask), gradient in zip(masks.items(), torch.autograd.grad(total, list(masks.values())), strict=True):
        # Adam from a zero first moment: m̂ = g, v̂ = (0.999 v + 0.001 g²) / 0.001
        second = (0.999 * SECOND_MOMENT + 0.001 * gradient**2) / 0.001
        stepped[name] = (mask - LR * gradient / (second.sqrt() + 1e-8)).clamp(0, 1).detach().float()
    return {"trigger": trigger.float(), **stepped}


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
    assert absent == {"resnet50": "it needs torchvision, which is not installed"} and entries
    wanted = ["ops", "--net", "vit_large_patch16_224", "--ops", "l1_ball", "--repeats", "1", "--out", str(tmp_path)]
    assert command_line.main(wanted) == 0
    assert "vit_large_patch16_224: no numbers, it needs timm, which is not installed" in capsys.readouterr().out
    with pytest.raises(ImportError, match="no_library"):
        plan.plan(["no_library:net"], [2], torch.float32, CPU)


class ReadsNumbers(nn.Sequential):
    """Like networks whose depth is spread over their layers by a linspace."""

    def __init__(self):
        rates = [rate.item() for rate in torch.linspace(0, 0.5, 2)]
        kernels = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, stride=2, groups=6)
        super().__init__(*kernels, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(rates[1]), nn.Linear(6, 2))


def test_networks_of_other_libraries_are_built_without_memory(monkeypatch):
    monkeypatch.setattr(networks, "OTHERS", {"other": f"{__name__}:ReadsNumbers"})
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
    with pytest.raises(ValueError, match=r"old\.csv: expected the columns benchmark, net"):
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
    assert 60e6 < measure.peak_bytes(allocate, 64, device=CPU) < 80e6


def test_time_limit_ends_what_takes_longer():
    with pytest.raises(TimeoutError, match="longer than 1 s"), measure.time_limit(1):
        while True:
            pass


def test_what_would_mean_nothing_is_not_timed(monkeypatch, capsys):
    assert "float16" in problem.why_not(torch.float16, CPU)
    assert problem.why_not(torch.float32, CPU) is None
    monkeypatch.setattr(awm, "why_not", lambda dtype, device: "this CPU has no arithmetic of its own in bfloat16")
    outcome = awm.run("small_vgg", 4, torch.bfloat16, CPU, repeats=1, warmup=0)
    assert not outcome.rows and not outcome.failed
    assert "maskops: no numbers, this CPU has no arithmetic of its own in bfloat16" in awm.table(outcome)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command_line.main(["awm", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "benchmarks: torch sees no CUDA device\n"


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


def test_report_is_made_from_the_rows(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    results.write(
        rows(threads="7")
        + rows(contestant="maskops", ms_p50="4", saved_mb="0.5", threads="2")
        + rows(contestant=awm.AGAIN, ms_p50="4.4", saved_mb="", threads="2")
        + rows(contestant="compile", ms_p50="3", threads="2")
        + rows(contestant="floor", ms_p50="2.5", threads="2"),
        tmp_path,
    )
    assert command_line.main(["report", "--readme", str(readme), "--results", str(tmp_path), "--check"]) == 1
    assert command_line.main(["report", "--readme", str(readme), "--results", str(tmp_path)]) == 0
    text = readme.read_text()
    assert "threads 7 and 2," in text and "at revision" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| small_vgg, 4, float32 | inner | 10 | 3 | **4** | 2.50 | 2.5 | 2 | 0.5 |" in text
    assert "`compile` is faster than maskops, 3 against 4 ms" in text
    assert "differs by up to 10%" in text
    assert command_line.main(["report", "--readme", str(readme), "--results", str(tmp_path), "--check"]) == 0


def test_report_says_on_how_many_ops_we_lose():
    made = []
    for phase, ours in (("a forward", "8"), ("b forward", "15")):
        made += rows(benchmark="ops", phase=phase, contestant="eager")
        made += rows(benchmark="ops", phase=phase, contestant="triton", ms_p50=ours)
        made += rows(benchmark="ops", phase=phase, contestant="reference", ms_p50="1")
    assert "1 of 2 are slower than plain torch, at worst 1.50 times (b forward on" in report.device_report(made)


def test_report_without_results_is_empty(tmp_path):
    text = f"{report.BEGIN}\n{report.END}"
    assert report.between_marks(text, report.report(tmp_path)) == text


def test_report_needs_its_marks():
    with pytest.raises(ValueError, match="expected one <!-- benchmarks:begin -->"):
        report.between_marks("no marks", "content")


def test_readme_agrees_with_the_results():
    readme = results.ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md")
    assert report.main(readme, results.FOLDER, check=True) == 0
