"""A plan allocates nothing, and says what a run then needs."""

import pytest
import torch
from helpers_resume import network
from test_working import with_statistics
from torch import nn

from benchmarks.counting import count
from maskops import models
from maskops.cli import main
from maskops.purify import plan
from maskops.purify._plan import _first_epoch, _one_step, plans
from maskops.purify._sweep import ALGORITHMS

ALL = {"layers": ("conv", "linear")}


def counted(model, method, batch, shape, **options):
    """Bytes that a step of each phase needs in a real run, beside what is there before it; and at most, in all."""
    data = torch.rand(batch, *shape), torch.arange(batch) % 4
    settings = {"gate": "output", "batch_size": batch, "progress": False, **options}
    made = []

    def begin():
        made.append(ALGORITHMS[method](model, data, "paper", None, settings))
        for _ in range(2):
            for phase in _first_epoch(made[0]):
                _one_step(made[0], phase)

    peak = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + count(begin).peak
    (algorithm,) = made
    found = {}
    for phase in _first_epoch(algorithm):
        found[phase.name] = count(lambda phase=phase: _one_step(algorithm, phase)).peak
    kept = {"masks": algorithm.run.arena.mask.nbytes, "weights": algorithm.run.arena.weight.nbytes}
    return found, kept, peak


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awm", {}),
        ("awm", {"branches": "sequential", "gate": "bits"}),
        ("awm", {"recompute": True, "step_in_backward": True, "state_bits": 8, "dtype": torch.bfloat16}),
        ("awm", {"granularity": "neuron", "inner_labels": "predicted", "micro_batch_size": 3}),
        ("swm", {"state_bits": 8}),
        ("anp", {"threshold": "auto"}),
        ("nft", {"tune_bias": True, "augmentation": "cutmix"}),
    ],
)
def test_a_plan_is_what_a_run_needs(method, options, name="small_vgg"):
    torch.manual_seed(0)
    model, shape = with_statistics(models.build(name)).float(), (3, 32, 32)
    options = {"branches": "concatenated", **options} if method == "awm" else options
    planned = plan(model, method, shape=shape, classes=10, images=4, batch_size=4, **options)
    phases, kept, peak = counted(model, method, 4, shape, **options)
    assert planned.phases.keys() == phases.keys()
    for phase, needed in phases.items():
        assert abs(planned.phases[phase] - needed) <= 0.1 * needed + 20_000, phase
    assert planned.kept["weights"] == kept["weights"]
    assert planned.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2"])
def test_a_plan_of_other_networks(name):
    test_a_plan_is_what_a_run_needs("awm", {}, name)


def test_a_plan_of_a_model_without_data_allocates_nothing():
    with torch.device("meta"):
        huge = nn.Sequential(
            nn.Conv2d(3, 4096, 3, padding=1), nn.ReLU(), nn.Conv2d(4096, 4096, 3, padding=1),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4096, 1000),
        )  # fmt: skip
    found = plan(huge, shape=(3, 224, 224), classes=1000, batch_size=32)
    assert found.peak > 1e11 and found.parameters == 4096 * 9 * (3 + 4096)
    assert "most at one time" in str(found)


def deep(width=8):
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, width, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def test_a_limit_chooses_what_saves_enough_and_changes_least():
    about = {"shape": (3, 16, 16), "classes": 4, "batch_size": 8}
    free = plan(deep(), **about)
    found = plan(deep(), memory=0.75 * free.peak, **about)
    assert found.fits and found.peak <= 0.75 * free.peak
    assert "dtype" not in found.options and found.options["branches"] == "sequential"
    least = plan(deep(), memory=1, **about)
    assert not least.fits and least.options["micro_batch_size"] == 1 and least.peak < found.peak
    assert least.options["batch_size"] == 8


def test_parts_come_before_what_changes_the_result_and_are_as_large_as_can_be():
    kept = {"weight_dtype": None, "dtype": None, "gate": "bits", "branches": "sequential", "recompute": True}
    about = {"shape": (3, 32, 32), "classes": 4, "batch_size": 4, **kept}
    smallest = plan(deep(), micro_batch_size=1, **about)
    memory = smallest.peak - 4 * smallest.parameters
    exact, rounded = plans(deep(), "awm", [smallest.peak, memory], **about)
    assert exact.fits and exact.options["micro_batch_size"] == 1 and "state_bits" not in exact.options
    assert rounded.fits and rounded.options["state_bits"] == 8
    larger = {**rounded.options, "micro_batch_size": 2 * rounded.options["micro_batch_size"]}
    assert plan(deep(), **{**about, **larger}).peak > memory


def test_a_batch_that_must_stay_whole_is_made_smaller():
    about = {"shape": (3, 16, 16), "classes": 4, "batch_size": 32}
    options = plan(deep(), "nft", memory=1, **about).options
    assert options["batch_size"] == 8 and "micro_batch_size" not in options and "recompute" not in options


@pytest.mark.parametrize(("images", "batch"), [(500, 128), (100, 80), (3, 2)])
def test_a_plan_with_held_out_images_measures_the_batch_of_the_run(images, batch):
    about = {"shape": (3, 16, 16), "classes": 4}
    found = plan(deep(), "anp", threshold="auto", images=images, **about)
    assert found.phases == plan(deep(), "anp", threshold=0.2, images=batch, **about).phases
    assert found.kept["images"] >= images * 3 * 16 * 16


def test_at_last_what_takes_one_backward_of_the_whole_batch_is_tried_though_parts_saved_more_before():
    kept = {"dtype": None, "weight_dtype": None, "gate": "output", "state_bits": 32, "mask_bits": 32}
    options = plan(deep(32), memory=1, shape=(3, 8, 8), classes=4, batch_size=8, **kept).options
    assert options["offload"] and options["step_in_backward"] and "micro_batch_size" not in options


def test_what_was_given_is_never_changed():
    about = {"shape": (3, 8, 8), "classes": 4, "branches": "concatenated", "recompute": False, "gate": "output"}
    options = plan(deep(), memory=1, dtype=None, weight_dtype=None, **about).options
    assert options["branches"] == "concatenated" and options["recompute"] is False and options["dtype"] is None


def test_what_a_method_refuses_a_plan_refuses():
    with pytest.raises(ValueError, match="plan: method must be one of awm, swm, anp, nft; got 'ft'"):
        plan(network(), "ft", shape=(3, 8, 8), classes=4)
    with pytest.raises(TypeError, match="awm: no option nonsense"):
        plan(network(), shape=(3, 8, 8), classes=4, nonsense=1)


def test_the_command_line_plans(capsys):
    options = "plan --arch small_vgg --shape 3,32,32 --classes 10 --batch-size 16 --memory 10GB"
    assert main(options.split()) == 0
    assert "most at one time" in capsys.readouterr().out
    assert main([*options.split()[:-1], "1kB", "--method", "nft"]) == 1
    printed = capsys.readouterr()
    assert "most at one time" in printed.out and "doesn't fit" in printed.err and printed.err.count("\n") == 1


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Doubling(nn.Sequential):
    """A network that no tape can run, so that segments can't be recomputed."""

    def forward(self, x):
        return super().forward(Own.apply(x))


def test_what_a_model_refuses_is_left_out():
    found = plan(Doubling(*deep()), memory=1, shape=(3, 16, 16), classes=4, batch_size=32)
    assert not found.fits and "recompute" not in found.options


def test_what_is_wrong_with_a_plan_is_one_line():
    about = {"shape": (3, 8, 8), "classes": 4}
    for wrong in ({"classes": 0}, {"images": 0}):
        with pytest.raises(ValueError, match=rf"^plan: {next(iter(wrong))} must be at least 1; got 0$"):
            plan(deep(), **{**about, **wrong})
    for memory in (None, 1):
        with pytest.raises(ValueError, match="awm: step_in_backward=True takes one backward"):
            plan(deep(), memory=memory, step_in_backward=True, branches="sequential", **about)


@pytest.mark.parametrize(("images", "batch"), [(50, 16), (400, 32), (600, 128)])
def test_the_batch_is_what_the_method_takes_of_so_many_images(images, batch):
    about = {"shape": (3, 16, 16), "classes": 4}
    assert plan(deep(), images=images, **about).phases == plan(deep(), images=600, batch_size=batch, **about).phases


def test_a_plan_knows_of_weights_that_are_remade():
    about = {"shape": (3, 8, 8), "classes": 4, "batch_size": 4, "layers": ("conv", "linear")}
    how = {"step_in_backward": True, "branches": "concatenated"}
    kept, remade = (plan(deep(32), **about, **how, remake_weights=option) for option in (False, True))
    assert kept.kept["effective weights"] == kept.kept["weights"]
    assert remade.kept["effective weights"] == 4 * 32 * 32 * 9
    assert remade.peak < kept.peak and remade.kept["gradients"] == 0
    assert remade.preparation < kept.preparation


def test_a_plan_tells_the_host_s_memory_apart():
    about = {"shape": (3, 8, 8), "classes": 4, "batch_size": 4, "branches": "concatenated", **ALL}
    lean = {"step_in_backward": True, "remake_weights": True}
    kept, offloaded = plan(deep(32), **about, **lean), plan(deep(32), **about, **lean, offload=True)
    assert offloaded.host == {name: kept.kept[name] for name in ("weights", "masks", "optimiser")}
    assert not offloaded.host.keys() & offloaded.kept.keys()
    assert 0 < offloaded.model <= kept.model - kept.kept["weights"] + 1000
    assert offloaded.kept["effective weights"] == kept.kept["effective weights"]
    assert offloaded.bytes_per_parameter < 1
    largest = 4 * 32 * 32 * 9
    for phase, needed in kept.phases.items():
        assert needed <= offloaded.phases[phase] <= needed + 4 * largest, phase
    assert offloaded.peak < 0.7 * kept.peak and "masks, in the host's memory" in str(offloaded)
