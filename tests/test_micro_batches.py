"""Batches in parts: the gradients of the whole, on as little memory as there is."""

from functools import partial

import pytest
import torch
from helpers import tiny_network
from test_graphs import assert_same as assert_identical
from test_graphs import recorded  # noqa: F401

from benchmarks.counting import count
from maskops.purify import _graphs, anp, awm, nft, swm
from maskops.purify._masks import MaskRun
from maskops.purify.awm import AWM, AWMOptions

METHODS = {"awm": awm, "swm": swm, "anp": anp, "nft": nft}
STEPS = {"awm": {"inner_steps": 2, "outer_steps": 2}, "swm": {"steps": 2}, "anp": {"steps": 2}, "nft": {"steps": 2}}
RUNNING = {"statistics": "running"}


def purified(method, clean_data, network=None, **options):
    torch.manual_seed(3)
    network = tiny_network() if network is None else network
    images, labels = clean_data
    options = {"epochs": 1, "batch_size": 7, "progress": False, **STEPS[method], **options}
    return METHODS[method](network.double(), (images.double(), labels), **options)


def assert_near(result, expected):
    for name, mask in expected.masks.items():
        torch.testing.assert_close(result.masks[name], mask, rtol=0, atol=1e-9, msg=name)
    if expected.trigger is not None:
        torch.testing.assert_close(result.trigger, expected.trigger, rtol=1e-9, atol=1e-12)
    for name, values in expected.history.items():
        assert result.history[name] == pytest.approx(values, rel=1e-9), name


@pytest.mark.parametrize(
    ("method", "options", "size"),
    [
        ("awm", {"preset": "official", "trigger_penalty": 0.1}, 1),
        ("awm", {"branches": "concatenated", "inner_labels": "predicted", "crop": 1, "flip": True}, 3),
        ("awm", {"granularity": "neuron", "gate": "bits", "recompute": True, "mean": (0.4, 0.5), "std": (0.2, 0.3)}, 3),
        ("swm", {"noise_steps": 2}, 3),
        ("anp", {**RUNNING, "threshold": "auto"}, 3),
        ("nft", {**RUNNING, "tune_bias": True}, 1),
        ("nft", {**RUNNING, "augmentation": "adversarial"}, 3),
        ("nft", {**RUNNING, "augmentation": "none"}, 3),
    ],
    ids=str,
)
def test_a_batch_in_parts_is_the_whole_batch(method, options, size, clean_data):
    assert_near(purified(method, clean_data, micro_batch_size=size, **options), purified(method, clean_data, **options))


CASES = [
    ("awm", {"inner_labels": "predicted", "branches": "concatenated"}),
    ("swm", {}),
    ("anp", RUNNING),
    ("nft", {**RUNNING, "augmentation": "adversarial"}),
]


@pytest.fixture
def small_memory(monkeypatch):
    """The sizes of batches that the network gets, of which those above a limit run out of memory every other time."""
    logits, sizes, limit = MaskRun.logits, [], []

    def logits_in_little_memory(run, images, trigger=None):
        sizes.append(len(images))
        too_large = [size for size in sizes if limit and size > limit[0]]
        if limit and len(images) > limit[0] and len(too_large) % 2 == 0:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 2 GiB")
        return logits(run, images, trigger)

    monkeypatch.setattr(MaskRun, "logits", logits_in_little_memory)
    return sizes, limit


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_no_step_takes_more_images_at_a_time(method, options, clean_data, small_memory):
    purified(method, clean_data, micro_batch_size=3, **options)
    assert max(small_memory[0]) == 3


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_where_memory_runs_out_batches_are_halved(method, options, clean_data, small_memory):
    """Of two branches one has added its gradient by then, which must not count twice."""
    expected = purified(method, clean_data, epochs=2, **options)
    sizes, limit = small_memory
    limit.append(4)
    with pytest.warns(
        RuntimeWarning, match=rf"^{method}: memory ran out in the \w+ phase; from now on it takes \d image"
    ):
        result = purified(method, clean_data, epochs=2, **options)
    assert_near(result, expected)
    assert any("4 images at a time for lack of memory" in how for how in result.execution.values())
    assert "at a time" in result.explain()
    assert max(sizes[-3:]) <= 4


def test_branches_follow_one_another_before_batches_are_halved(clean_data, small_memory, monkeypatch):
    expected = purified("awm", clean_data)
    monkeypatch.setattr(AWMOptions, "_branches_on", lambda options, device: options.branches)
    small_memory[1].append(7)
    result = purified("awm", clean_data)
    assert_near(result, expected)
    assert result.options["branches"] == "sequential" and not any(
        "at a time" in how for how in result.execution.values()
    )
    small_memory[1][0] = 6
    with pytest.warns(RuntimeWarning, match="4 images at a time"):
        result = purified("awm", clean_data)
    assert_near(result, expected)
    assert result.options["branches"] == "sequential" and "4 images" in result.execution["outer"]


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_recorded_parts_compute_what_eager_ones_do(method, options, clean_data, request):
    options = {**options, "micro_batch_size": 3, "epochs": 3, "augmentation": "mixup"}
    if method != "nft":
        del options["augmentation"]
    eager = purified(method, clean_data, **options)
    graphs = request.getfixturevalue("recorded")
    result = purified(method, clean_data, **options)
    assert graphs and all(how == "CUDA graph" for phase, how in result.execution.items() if phase != "predictions")
    assert_identical(result, eager)


def test_a_recording_that_runs_out_of_memory_is_made_again_in_parts(clean_data, small_memory, request):
    graphs = request.getfixturevalue("recorded")
    expected = purified("swm", clean_data, steps=6)
    assert expected.execution == {"masks": "CUDA graph"} and len(graphs) == 1
    limit = small_memory[1]
    record = _graphs.record

    def record_in_little_memory(*arguments):
        limit.append(4)
        try:
            return record(*arguments)
        finally:
            limit.clear()

    request.getfixturevalue("monkeypatch").setattr(_graphs, "record", record_in_little_memory)
    with pytest.warns(RuntimeWarning, match="swm: memory ran out in the masks phase; from now on it takes 4 images"):
        result = purified("swm", clean_data, steps=12, epochs=1)
    assert result.execution == {"masks": "CUDA graph, 4 images at a time for lack of memory"} and len(graphs) == 2
    assert_near(result, purified("swm", clean_data, steps=12, epochs=1, graphs=False))


def test_where_one_image_is_too_much_the_error_says_what_is_left(clean_data, small_memory, tmp_path):
    small_memory[1].append(0)
    network, file = tiny_network().double(), tmp_path / "run.safetensors"
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError) as caught, pytest.warns(RuntimeWarning):
        purified("awm", clean_data, network, checkpoint=file, gate="bits", branches="concatenated")
    assert str(caught.value) == (
        "awm: memory ran out in the inner phase; the model is left as it was; "
        f"checkpoint {file} has the state at the beginning; not in use yet: branches='sequential', recompute=True, "
        "step_in_backward=True, remake_weights=True, state_bits=8, dtype=torch.bfloat16, "
        "weight_dtype=torch.bfloat16, mask_bits=16, offload=True; "
        "see maskops.plan(model, 'awm', shape=(2, 8, 8), classes=…, memory=…) "
        "(out of memory. Tried to allocate 2 GiB)"
    )
    assert caught.value.__context__ is None
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    small_memory[1].clear()
    purified(
        "awm",
        clean_data,
        network,
        checkpoint=file,
        resume=True,
        gate="output",
        micro_batch_size=2,
        branches="concatenated",
    )


def test_what_needs_one_backward_or_a_whole_batch_is_refused(clean_data):
    for method, options, message in [
        (
            "anp",
            {},
            "anp: micro_batch_size=2 can't be done for this model: it computes with the statistics of its batches",
        ),
        ("awm", {"step_in_backward": True}, "awm: step_in_backward=True takes one backward: micro_batch_size=None"),
        ("awm", {"micro_batch_size": 0}, "purify: micro_batch_size must be a whole number of at least 1; got 0"),
    ]:
        with pytest.raises(ValueError) as caught:
            purified(method, clean_data, **{"micro_batch_size": 2, **options})
        assert str(caught.value) == message


def test_a_batch_that_must_stay_whole_is_not_halved(clean_data, small_memory):
    small_memory[1].append(3)
    for method, options in [("nft", {}), ("awm", {"step_in_backward": True})]:
        with pytest.raises(
            torch.OutOfMemoryError, match=rf"^{method}: memory ran out in the \w+ phase; the model is left"
        ):
            purified(method, clean_data, **options)


def test_parts_take_the_memory_of_parts(clean_data):
    data, peaks = (torch.rand(16, 2, 8, 8), torch.arange(16) % 3), []
    for size in (None, 4):
        algorithm = AWM(tiny_network(), data, "paper", None, {"batch_size": 16, "micro_batch_size": size})
        step = partial(algorithm.outer, next(algorithm.run.batches(1, 16)))
        step()
        peaks.append(count(step).peak)
    assert peaks[1] < 0.5 * peaks[0]
