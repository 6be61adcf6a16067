"""The benchmark of a purification's steps: what is compared, timed and counted, on a network that takes no time."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from benchmarks import __main__ as command_line
from benchmarks import dry, epoch, loaders, networks, problem, results, steps, sweep, variants
from benchmarks.contestants import CONTESTANTS, Maskops
from benchmarks.problem import ALPHA, BETA, GAMMA, INNER_LR, LR, SECOND_MOMENT, make_problem
from benchmarks.published import Official
from benchmarks.steps_table import table
from maskops.purify._draws import Batch

CPU = torch.device("cpu")
TINY = f"{__name__}:tiny"
EAGER = {
    method: {name: make for name, make in known.items() if not hasattr(make, "compiles")}
    for method, known in CONTESTANTS.items()
}


def tiny():
    """Two convolutions with batch norms and a linear layer."""
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(12)]
    features = [nn.Conv2d(3, 8, 3, 2), norms[0], nn.ReLU(), nn.Conv2d(8, 12, 3, 2, bias=False), norms[1], nn.ReLU()]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(48, 10))


def tiny_transformer():
    """A network whose linear layers are masked too; its name has to begin like a transformer's."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 10)
    )


@pytest.mark.parametrize("method", CONTESTANTS)
def test_contestants_agree_with_the_published_procedure_and_are_timed(method):
    known = EAGER[method]
    outcome = steps.run(TINY, 6, torch.float32, CPU, 1, 0, method, known, peaks=False, loader=method == "awm")
    assert not outcome.failed, outcome.absent
    cuda_only = {name for name, make in known.items() if getattr(make, "needs_cuda", False)}
    assert outcome.absent == dict.fromkeys(cuda_only, "it needs a CUDA device")
    timed = {(row.contestant, row.phase) for row in outcome.rows if row.contestant != "ceiling"}
    here = {*known, steps.AGAIN} - cuda_only
    expected = {(name, phase) for name in here for phase in steps.PHASES[method]}
    assert timed == expected | ({("official", "loader")} if method == "awm" else set())
    by_key = {(row.contestant, row.phase): row for row in outcome.rows}
    for phase in steps.PHASES[method]:
        official, ours = by_key["official", phase], by_key["maskops", phase]
        assert not ours.saved_mb and float(official.saved_mb) > 0 and int(ours.launches) < int(official.launches)
        assert float(official.gflop) > 0 and 0 < float(official.of_matmul) < 1 and official.of_copy
    assert by_key["ceiling", "matmul"].tflops and by_key["ceiling", "copy"].gb
    text = table(outcome)
    assert "maskops again" in text and "ceiling, copy: " in text and "GB/s read and written" in text


def test_compiled_contestants_agree_and_say_how_long_that_took(monkeypatch):
    how = {"dynamic": False, "backend": "aot_eager"}  # all but the kernels, which take long to compile
    monkeypatch.setattr(variants, "compiled", lambda function, **options: torch.compile(function, **how))
    known = {name: CONTESTANTS["awm"][name] for name in ("official", "naive", "compile")}
    outcome = steps.run(TINY, 6, torch.float32, CPU, repeats=1, warmup=0, contestants=known, peaks=False)
    assert not outcome.failed and not outcome.absent
    for name in ("naive", "compile"):
        rows = {row.phase: row for row in outcome.rows if row.contestant == name}
        assert list(rows) == ["compilation", "inner", "outer"] and not any(row.launches for row in rows.values())
        # its arithmetic is that of what it compiles, where that is there
        assert bool(rows["inner"].gflop) == (name == "naive")
    assert "s of compilation" in table(outcome)


class Fails(Official):
    def outer(self, index=0):
        raise RuntimeError("out of luck")


class FailsLater(Official):
    calls = 0

    def inner(self, index=0):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("out of memory")
        super().inner(index)


class TooLong(Official):
    compiles = "compilation"

    def inner(self, index=0):
        while True:
            pass


def test_a_contestant_that_fails_is_absent_with_the_reason():
    known = {"official": Official, "fails": Fails, "fails later": FailsLater, "too long": TooLong}
    outcome = steps.run(TINY, 4, torch.float32, CPU, 1, 0, contestants=known, compile_limit=1, peaks=False)
    assert outcome.absent["fails"] == "its first step failed: RuntimeError: out of luck"
    assert outcome.absent["too long"] == "compilation failed: TimeoutError: it took longer than 1 s"
    assert outcome.absent["fails later, inner"] == "RuntimeError: out of memory"
    assert {row.phase for row in outcome.rows if row.contestant == "fails later"} == {"outer"}
    assert not outcome.failed and "fails: no numbers, its first step failed" in table(outcome)


def test_a_network_without_norms_or_library_gives_the_reason(monkeypatch):
    outcome = steps.run(f"{__name__}:tiny_transformer", 4, torch.float32, CPU, 1, 0, "anp", peaks=False)
    assert "has none" in outcome.absent["maskops"] and not outcome.rows
    monkeypatch.setattr(networks, "find_spec", lambda library: None)
    outcome = steps.run("resnet50", 4, torch.float32, CPU, 1, 0, peaks=False)
    assert outcome.absent["official"] == "it needs torchvision or transformers, which is not installed"


def test_linear_layers_of_transformers_are_masked_by_everybody(monkeypatch):
    monkeypatch.setattr(networks, "TRANSFORMERS", (__name__,))
    given = make_problem(f"{__name__}:tiny_transformer", 4, torch.float32, CPU)
    assert list(given.masks) == ["0", "3", "5"]
    expected = steps.first_steps(Official(given))
    for name in ("lean", "careful", "parametrize", "functional", "maskops", "floor"):
        found = steps.first_steps(CONTESTANTS["awm"][name](given))
        where, error = steps.disagreement(given, expected, found)
        assert error < steps.TOLERANCE[torch.float32], (name, where, error)


@pytest.mark.parametrize("phase", ["inner", "outer"])
def test_without_memory_the_same_is_counted(phase, monkeypatch):
    def counted():
        found = {}
        for name in ("official", "lean", "careful", "functional", "floor"):
            counts = dry.counts(CONTESTANTS["awm"][name], f"{__name__}:tiny_transformer", 32, "awm", phase)
            found[name] = counts.by_op, counts.flops, counts.bytes, counts.peak
        return found

    monkeypatch.setattr(networks, "masked_kinds", lambda net: ("conv", "linear"))
    monkeypatch.setattr(networks, "TRANSFORMERS", ())
    expected = counted()
    monkeypatch.setattr(networks, "TRANSFORMERS", (__name__,))
    assert counted() == expected


class ForgetsTheTrigger(Maskops):
    def outer(self, index=0):
        self.run.descend((ALPHA, *self.run.sample(Batch(self.problem.indices[index]))))
        self.algorithm.masks.step()


class Descends(Official):
    def inner(self, index=0):
        super().inner(index)
        with torch.no_grad():
            self.trigger.copy_(2 * self.problem.trigger - self.trigger)


@pytest.mark.parametrize(("wrong", "where"), [(ForgetsTheTrigger, ""), (Descends, "trigger")])
def test_a_contestant_that_computes_something_else_gets_no_number(wrong, where, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(CONTESTANTS["awm"], "maskops", wrong)
    arguments = [
        "steps",
        "--contestants",
        "maskops",
        "--net",
        TINY,
        "--batch",
        "4",
        "--repeats",
        "1",
        "--no-peaks",
        "--out",
        str(tmp_path),
    ]
    assert command_line.main(arguments) == 1
    assert f"maskops: no numbers, its {where}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_published_steps_are_those_of_the_formulas():
    """The definition that all contestants are held against, once more, by hand and in float64."""
    given = make_problem(TINY, 4, torch.float32, CPU)
    found = steps.first_steps(Official(given))
    assert steps.disagreement(given, awm_by_hand(given), found)[1] < steps.TOLERANCE[torch.float32]


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


def test_what_would_mean_nothing_is_not_timed(monkeypatch, capsys):
    assert "float16" in problem.why_not(torch.float16, CPU)
    assert problem.why_not(torch.float32, CPU) is None
    monkeypatch.setattr(steps, "why_not", lambda dtype, device: "this CPU has no arithmetic of its own in bfloat16")
    outcome = steps.run(TINY, 4, torch.bfloat16, CPU, repeats=1, warmup=0)
    assert not outcome.rows and not outcome.failed
    assert "floor-graph: no numbers, this CPU has no arithmetic of its own in bfloat16" in table(outcome)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command_line.main(["steps", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "benchmarks: torch sees no CUDA device\n"


def test_graphs_are_captured_for_each_step_and_batch(monkeypatch):
    """What a GPU would do, with graphs that run their step when they are replayed."""

    class Graph:
        def replay(self):
            self.step()

    class Capture:
        def __init__(self, graph, pool):
            self.graph = graph

        __enter__ = __exit__ = lambda self, *error: None

    streams = type("Stream", (), {"wait_stream": lambda self, other: None})
    for name, value in {
        "Stream": lambda device: streams(),
        "current_stream": lambda device: streams(),
        "stream": lambda stream: Capture(None, None),
        "graph_pool_handle": lambda: None,
        "CUDAGraph": Graph,
        "graph": Capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    ran = []
    inner, outer = (lambda index, phase=phase: ran.append((phase, index)) for phase in ("inner", "outer"))
    graphs = variants.capture(inner, outer, CPU)
    each = [(phase, index) for phase in ("inner", "outer") for index in (3, 2, 1, 0)]
    assert list(graphs) == each and ran == each * (variants.WARMUP + 1)


def test_contestants_for_gpus_compute_the_published_steps_too(monkeypatch):
    """On the CPU, without what only a GPU has: what is compiled or captured is called."""
    monkeypatch.setattr(variants, "compiled", lambda function, **how: function)
    graph = type("Graph", (), {"__init__": lambda self, step, index: setattr(self, "replay", lambda: step(index))})
    monkeypatch.setattr(
        *(variants, "capture"),
        lambda inner, outer, device: {
            (phase, index): graph(step, index)
            for phase, step in (("inner", inner), ("outer", outer))
            for index in (0, 1)
        },
    )
    given = make_problem(TINY, 6, torch.float32, CPU)
    expected = steps.first_steps(Official(given))
    names = {name for name, make in CONTESTANTS["awm"].items() if getattr(make, "needs_cuda", False)}
    assert names == {"tf32", "naive-graphs", "naive-autotune", "compile-graphs", "graph", "floor-graph"}
    before = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    for name in names:
        contestant = CONTESTANTS["awm"][name](given)
        trigger = contestant.trigger
        found = steps.first_steps(contestant)
        assert contestant.trigger is trigger, f"{name}: a captured step would go on with another trigger"
        where, error = steps.disagreement(given, expected, found)
        assert error < steps.TOLERANCE[torch.float32], (name, where, error)
    assert (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32) == before


def test_published_loaders_give_batches():
    given = make_problem(TINY, 5, torch.float32, CPU)
    batches = list(loaders.batches(given, 2))
    assert [(images.shape, labels.dtype) for images, labels in batches] == [((5, 3, 32, 32), torch.int64)] * 2
    pytest.importorskip("PIL")
    given = make_problem(TINY, 5, torch.float32, CPU, "anp")
    ((images, labels),) = loaders.batches(given, 1)
    assert images.shape == (5, 3, 32, 32) and -2 <= images.min() < images.max() <= 2 and labels.shape == (5,)


def test_pillow_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(loaders, "find_spec", lambda library: None)
    assert loaders.why_not("awm") is None and "Pillow" in loaders.why_not("anp")


def test_an_epoch_is_timed_with_and_without_its_loader(tmp_path, capsys):
    assert command_line.main(["epoch", "--net", TINY, "--batch", "4", "--repeats", "1", "--out", str(tmp_path)]) == 0
    (rows,) = map(results.read, tmp_path.iterdir())
    assert [(row.contestant, row.phase) for row in rows] == [
        ("official", epoch.WITH_LOADER),
        ("official", epoch.WITHOUT),
        ("maskops", epoch.WITHOUT),
    ]
    assert "official, epoch with loader" in capsys.readouterr().out


def test_dry_counts_without_a_clock(capsys, monkeypatch):
    monkeypatch.setitem(dry.LEAST, ("awm", TINY, "inner"), dry.Amount(3, 0.5, 0.25))
    assert command_line.main(["steps", "--dry", "--net", TINY, "--method", "awm", "nft"]) == 0
    out = capsys.readouterr().out
    assert f"awm on {TINY}, batch 128, float32: inner, counted" in out and "nft on" in out
    assert "least, 16 bits" in out and "compile" not in out
    both = ["--net", TINY, "--dtype", "float32", "bfloat16", "--contestants", "floor"]
    assert command_line.main(["steps", "--dry", *both]) == 0
    out = capsys.readouterr().out
    assert f"{TINY}, batch 128, float32: outer" in out and f"{TINY}, batch 128, bfloat16: outer" in out
    single, half = (
        dry.counts(CONTESTANTS["awm"]["floor"], TINY, 128, dtype=d) for d in (torch.float32, torch.bfloat16)
    )
    assert half.flops == single.flops and half.bytes < single.bytes
    found = dry.counts(CONTESTANTS["awm"]["maskops"], TINY, 128, "awm", "outer")
    assert found.ops < dry.counts(Official, TINY, 128, "awm", "outer").ops
    monkeypatch.setitem(dry.CONTESTANTS["nft"], "maskops", Fails)
    assert command_line.main(["steps", "--dry", "--net", TINY, "--method", "nft", "--contestants", "maskops"]) == 1
    assert "maskops: no numbers, " in capsys.readouterr().out


def test_a_sweep_is_timed_side_by_side_and_one_after_the_other(tmp_path, capsys, monkeypatch):
    arguments = ["sweep", "--net", TINY, "--batch", "4", "--runs", "2", "--repeats", "1", "--out", str(tmp_path)]
    assert command_line.main(arguments) == 0
    (path,) = tmp_path.glob("*.csv")
    assert {(row.contestant, row.phase) for row in results.read(path)} == {
        (name, "epoch of 2 runs") for name in sweep.WAYS
    }
    assert "one after the other" in capsys.readouterr().out

    def one_epoch_too_few(problem, seeds, epochs):
        return sweep._side_by_side(problem, seeds, epochs - 1)

    monkeypatch.setitem(sweep.WAYS, "maskops", one_epoch_too_few)
    assert command_line.main(arguments) == 1
    assert "maskops: no numbers, its runs side by side are not the runs alone" in capsys.readouterr().out
