import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maskops.backdoor import (
    BadNetsSquare,
    Metrics,
    Several,
    der,
    evaluate,
    evaluate_several,
    parse,
    removed,
    rir,
    target_labels,
)


class ReadPrediction(nn.Module):
    """Predicts what the first channel says (in tenths), for images of ``encode``."""

    num_classes = 3

    def forward(self, images):
        return nn.functional.one_hot((images[:, 0, 0, 0] * 10).round().long(), self.num_classes).float()


def encode(clean, triggered):
    """Images on which ReadPrediction says ``clean``, and ``triggered`` once ``swap`` is applied."""
    return torch.tensor([clean, triggered]).T.reshape(-1, 2, 1, 1) / 10


def swap(images):
    return images.flip(1)


def measure(labels, clean, triggered, *arguments, **keywords):
    return evaluate(ReadPrediction(), encode(clean, triggered), torch.tensor(labels), swap, *arguments, **keywords)


def close(values, expected):
    return torch.allclose(values, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_all_to_one_by_hand():
    metrics = measure([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0], [0, 2, 0, 1, 0, 0], 0)
    assert metrics.acc == pytest.approx(4 / 6)
    assert metrics.asr_all == pytest.approx(4 / 6)  # images 0, 2, 4, 5
    assert metrics.asr_excl == pytest.approx(3 / 4)  # of images 2 to 5
    assert metrics.ra == pytest.approx(1 / 4)  # image 3
    assert close(metrics.acc_per_class, [0.5, 1.0, 0.5])
    assert close(metrics.asr_per_class, [0.5, 0.5, 1.0])


def test_all_to_all_by_hand():
    metrics = measure([0, 0, 1, 2, 2], [0, 0, 1, 2, 2], [1, 0, 2, 0, 1], rule="all_to_all")
    assert metrics.acc == 1
    assert metrics.asr_all == metrics.asr_excl == pytest.approx(3 / 5)  # nothing is excluded
    assert metrics.ra == pytest.approx(1 / 5)
    assert close(metrics.asr_per_class, [0.5, 1.0, 0.5])


def test_all_to_all_wraps_at_num_classes_not_at_the_largest_label():
    assert measure([1, 1], [1, 1], [2, 0], rule="all_to_all").asr_all == 0.5
    assert measure([1, 1], [1, 1], [2, 0], rule="all_to_all", num_classes=2).asr_per_class.tolist()[1:] == [0.5]


def test_absent_class_has_no_rate():
    metrics = measure([0, 0, 2], [0, 1, 2], [1, 1, 1], 1)
    assert close(metrics.acc_per_class, [0.5, math.nan, 1.0])
    assert close(metrics.asr_per_class, [1.0, math.nan, 1.0])
    assert metrics.asr_all == metrics.asr_excl == 1


def test_only_target_class_has_no_asr_excl():
    metrics = measure([1, 1], [1, 1], [1, 0], 1)
    assert metrics.asr_all == 0.5
    assert math.isnan(metrics.asr_excl) and math.isnan(metrics.ra)


def test_all_to_all_with_an_absent_class_by_hand():
    metrics = measure([0, 2, 2, 2], [0, 2, 1, 2], [1, 0, 2, 1], rule="all_to_all")
    assert metrics.acc == 0.75 and metrics.asr_all == metrics.asr_excl == 0.5
    assert metrics.ra == 0.25  # the third image alone is still a 2
    assert close(metrics.acc_per_class, [1.0, math.nan, 2 / 3])
    assert close(metrics.asr_per_class, [1.0, math.nan, 1 / 3])


def test_classes_beyond_the_labels_have_no_rate():
    metrics = measure([0, 1], [0, 0], [1, 1], 1, num_classes=5)
    assert close(metrics.acc_per_class, [1.0, 0.0, *[math.nan] * 3])
    assert close(metrics.asr_per_class, [1.0, 1.0, *[math.nan] * 3])
    assert (metrics.asr_all, metrics.asr_excl, metrics.ra) == (1, 1, 0)


def test_nan_logits_of_all_to_all_by_hand():
    class NoTwo(ReadPrediction):
        def forward(self, images):
            logits = super().forward(images)
            return logits.masked_fill(logits[:, 2:] == 1, torch.nan)

    images, labels = encode([0, 1, 2, 2], [1, 2, 0, 2]), torch.tensor([0, 1, 2, 2])
    metrics = evaluate(NoTwo(), images, labels, swap, rule="all_to_all")
    assert metrics.acc == 0.5
    assert metrics.asr_all == metrics.asr_excl == 0.5  # the first and the third; the second's 2 is a NaN
    assert metrics.ra == 0
    assert close(metrics.asr_per_class, [1.0, 0.0, 0.5])


def show(channel):
    """A trigger that shows the model another channel, of images of ``encode_several``."""
    return lambda images: images.roll(-channel, 1)


def encode_several(*predictions):
    """Images on which ReadPrediction says the first, and under show(i) the i-th of the others."""
    return torch.tensor(predictions).T.reshape(-1, len(predictions), 1, 1) / 10


def test_several_triggers_by_hand():
    labels = torch.tensor([0, 1, 1, 2, 2])
    # show(1) and then show(2) is show(3): what the model says under both triggers
    images = encode_several([0, 1, 1, 2, 1], [0, 0, 1, 0, 2], [1, 1, 0, 0, 2], [0, 0, 1, 1, 2])
    several = Several((show(1), show(2)))
    measured = evaluate_several(ReadPrediction(), images, labels, several, 0, batch_size=2)
    first, second = measured.each
    assert first == evaluate(ReadPrediction(), images, labels, show(1), 0)
    assert second == evaluate(ReadPrediction(), images, labels, show(2), 0)
    assert (first.asr_all, first.asr_excl, first.ra) == (3 / 5, 2 / 4, 2 / 4)
    assert (second.asr_all, second.asr_excl, second.ra) == (2 / 5, 2 / 4, 2 / 4)
    any_of = measured.any_of
    assert (any_of.acc, any_of.asr_all, any_of.asr_excl, any_of.ra) == (4 / 5, 4 / 5, 3 / 4, 1 / 4)
    assert close(any_of.asr_per_class, [1.0, 1.0, 0.5])
    assert measured.together == evaluate(ReadPrediction(), images, labels, several, 0)
    assert (measured.together.asr_all, measured.together.asr_excl, measured.together.ra) == (2 / 5, 1 / 4, 2 / 4)


@settings(deadline=None, max_examples=30)
@given(data=st.data(), rule=st.sampled_from(["all_to_one", "all_to_all"]))
def test_any_trigger_is_at_least_the_best_and_at_most_the_sum(data, rule):
    rows = [data.draw(predictions) for _ in range(4)]
    labels, target = torch.tensor([0, 1, 2] * 4), 0 if rule == "all_to_one" else None
    several = Several((show(1), show(2), show(3)))
    measured = evaluate_several(ReadPrediction(), encode_several(*rows), labels, several, target, rule=rule)
    for rate in ("asr_all", "asr_excl"):
        of_each = [getattr(one, rate) for one in measured.each]
        assert max(of_each) - 1e-12 <= getattr(measured.any_of, rate) <= sum(of_each) + 1e-12
    assert measured.any_of.ra <= min(one.ra for one in measured.each) + 1e-12
    assert {one.acc for one in (*measured.each, measured.together)} == {measured.any_of.acc}


def test_several_names_itself_in_errors():
    with pytest.raises(ValueError, match=r"^evaluate_several: at least one image expected; got \(0, 1, 1, 1\)$"):
        evaluate_several(ReadPrediction(), torch.zeros(0, 1, 1, 1), torch.zeros(0).long(), Several((swap,)), 0)


def test_without_trigger_only_accuracy():
    metrics = evaluate(ReadPrediction(), encode([0, 2, 2], [0, 0, 0]), torch.tensor([0, 1, 2]))
    assert metrics.acc == pytest.approx(2 / 3)
    assert (metrics.asr_all, metrics.asr_excl, metrics.ra, metrics.asr_per_class) == (None,) * 4
    assert str(metrics) == "ACC 66.7 %"


def test_metrics_print_in_percent():
    metrics = measure([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0], [0, 2, 0, 1, 0, 0], 0)
    assert str(metrics) == "ACC 66.7 %  asr_all 66.7 %  asr_excl 75.0 %  RA 25.0 %"


predictions = st.lists(st.integers(0, 2), min_size=12, max_size=12)


@settings(deadline=None, max_examples=30)
@given(clean=predictions, triggered=predictions, target=st.integers(0, 2))
def test_asr_conventions_agree_on_balanced_classes(clean, triggered, target):
    metrics = measure([0, 1, 2] * 4, clean, triggered, target)
    stays = metrics.asr_per_class[target].item()
    assert metrics.asr_all == pytest.approx(stays / 3 + (1 - 1 / 3) * metrics.asr_excl)
    assert metrics.asr_all == pytest.approx(metrics.asr_per_class.mean().item())
    assert metrics.acc == pytest.approx(metrics.acc_per_class.mean().item())
    assert metrics.asr_excl + metrics.ra <= 1 + 1e-12


@settings(deadline=None, max_examples=30)
@given(
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    batch_size=st.integers(1, 10),
    rule=st.sampled_from(["all_to_one", "all_to_all"]),
    data=st.data(),
)
def test_metrics_equal_counting_one_by_one_in_any_batch_size(labels, batch_size, rule, data):
    same_length = st.lists(st.integers(0, 2), min_size=len(labels), max_size=len(labels))
    clean, triggered = data.draw(same_length), data.draw(same_length)
    target = 1 if rule == "all_to_one" else None
    metrics = measure(labels, clean, triggered, target, rule=rule, batch_size=batch_size)
    targets = target_labels(torch.tensor(labels), target, rule, 3).tolist()
    assert metrics.acc == pytest.approx(sum(p == y for p, y in zip(clean, labels, strict=True)) / len(labels))
    assert metrics.asr_all == pytest.approx(sum(p == t for p, t in zip(triggered, targets, strict=True)) / len(labels))
    others = [(p, y, t) for p, y, t in zip(triggered, labels, targets, strict=True) if y != t]
    if others:
        assert metrics.asr_excl == pytest.approx(sum(p == t for p, _, t in others) / len(others))
        assert metrics.ra == pytest.approx(sum(p == y for p, y, _ in others) / len(others))


def test_nan_logits_are_wrong_and_no_success():
    class SomeNaN(ReadPrediction):
        def forward(self, images):
            logits = super().forward(images)
            logits[0, 0] = torch.nan
            return logits

    metrics = evaluate(SomeNaN(), encode([0, 0], [0, 0]), torch.tensor([0, 0]), swap, 0)
    assert metrics.acc == metrics.asr_all == 0.5
    alone = evaluate(SomeNaN(), encode([0, 1], [0, 1]), torch.tensor([0, 1]), swap, 0, batch_size=1)
    assert alone.acc == alone.asr_all == alone.asr_excl == alone.ra == 0


def mixed_mode_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3))
    model.train()
    model[1].eval()
    return model


def test_evaluation_runs_in_eval_mode_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model, images, labels = mixed_mode_model(), torch.rand(5, 3, 8, 8), torch.arange(5) % 3
    flags, state = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    model[2].register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_inference_mode_enabled())))
    first = evaluate(model, images, labels, BadNetsSquare(2), 0, batch_size=2)
    assert seen == [(False, True)] * 6
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert evaluate(model, images, labels, BadNetsSquare(2), 0) == first  # no dropout, no batch statistics
    model(images).sum().backward()


def test_training_flags_come_back_after_an_error():
    model = mixed_mode_model()
    flags = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError):
        evaluate(model, torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))
    assert [m.training for m in model.modules()] == flags


def test_evaluate_leaves_images_and_labels_alone():
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0], dtype=torch.uint8)
    before = images.clone(), labels.clone()
    evaluate(mixed_mode_model(), images, labels, BadNetsSquare(2), 0)
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])


def test_batches_go_to_the_models_device():
    class Meta(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.zeros((), device="meta"))

        def forward(self, images):
            raise RuntimeError(f"called on {images.device.type}")

    with pytest.raises(RuntimeError, match="called on meta"):
        evaluate(Meta(), torch.zeros(1, 1, 2, 2), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="called on cpu"):
        evaluate(Meta(), torch.zeros(1, 1, 2, 2), torch.tensor([0]), device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_metrics_agree_on_the_gpu():
    images, labels = encode([0, 1, 2, 0], [2, 2, 2, 0]), torch.tensor([0, 1, 2, 1])
    model = nn.Sequential(ReadPrediction(), nn.Linear(3, 3, bias=False))
    nn.init.eye_(model[1].weight)
    on_cpu = evaluate(model, images, labels, swap, 2)
    assert evaluate(model.cuda(), images, labels, swap, 2) == on_cpu
    assert evaluate(model, images.cuda(), labels.cuda(), swap, 2) == on_cpu


@pytest.mark.parametrize(
    "model, images, labels, keywords, error, message",
    [
        (nn.Flatten(), torch.zeros(0, 1, 2, 2), [], {}, ValueError, r"at least one image expected; got \(0, 1, 2, 2\)"),
        (nn.Flatten(), torch.zeros(1, 1, 2, 2), [0], {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        (nn.Flatten(), torch.zeros(1, 1, 2, 2).byte(), [0], {}, TypeError, "images must be floating point"),
        (nn.Flatten(), -torch.ones(1, 1, 2, 2), [0], {}, ValueError, r"images must lie in \[0, 1\], not normalised"),
        (nn.Flatten(), torch.zeros(1, 1, 2, 2), [4], {}, ValueError, "labels must be below num_classes 4; got 4"),
        (nn.Identity(), torch.zeros(1, 1, 2, 2), [0], {}, ValueError, r"the model must map .*got \(1, 1, 2, 2\)"),
    ],
)
def test_evaluate_errors(model, images, labels, keywords, error, message):
    with pytest.raises(error, match=f"^evaluate: {message}"):
        evaluate(model, images, torch.tensor(labels, dtype=torch.int64), **keywords)


def test_evaluate_with_a_trigger_needs_a_target():
    with pytest.raises(ValueError, match=r"^target_labels: all_to_one needs a target class below 3; got None$"):
        measure([0], [0], [0])


def metrics_of(acc, asr_excl):
    return Metrics(acc, asr_excl, asr_excl, 0.0, torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize(
    "before, after, expected",
    [
        ((0.9, 1.0), (0.9, 1.0), 0.5),
        ((0.9, 1.0), (0.9, 0.0), 1.0),
        ((0.9, 1.0), (0.8, 0.2), (0.8 - 0.1 + 1) / 2),
        ((0.9, 0.5), (0.95, 0.7), 0.5),  # gains are not rewarded, a rising ASR is not punished
        ((1.0, 0.0), (0.0, 0.0), 0.0),
    ],
)
def test_der_by_hand(before, after, expected):
    assert der(metrics_of(*before), metrics_of(*after)) == pytest.approx(expected)


@pytest.mark.parametrize("asr_excl", [None, math.nan])
def test_der_needs_an_asr(asr_excl):
    with pytest.raises(ValueError, match=r"^der: both measurements need an asr_excl; got 'ACC 90.0 %"):
        der(metrics_of(0.9, 1.0), metrics_of(0.9, asr_excl))


def robust(acc, ra):
    return Metrics(acc, 0.0, 0.0, ra, torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize(
    "before, after, expected",
    [
        ((0.9, 0.1), (0.9, 0.1), 0.5),
        ((0.9, 0.0), (0.9, 1.0), 1.0),
        ((0.9, 0.05), (0.8, 0.75), (0.7 - 0.1 + 1) / 2),
        ((0.9, 0.5), (0.95, 0.3), 0.5),  # gains of acc are not rewarded, a falling ra is not punished
        ((1.0, 0.2), (0.0, 0.0), 0.0),
    ],
)
def test_rir_by_hand(before, after, expected):
    assert rir(robust(*before), robust(*after)) == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(rates=st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_der_and_rir_lie_in_the_unit_interval(rates):
    acc_before, acc_after, before, after = rates
    assert 0 <= der(metrics_of(acc_before, before), metrics_of(acc_after, after)) <= 1
    assert 0 <= rir(robust(acc_before, before), robust(acc_after, after)) <= 1


@pytest.mark.parametrize("ra", [None, math.nan])
def test_rir_needs_an_ra(ra):
    with pytest.raises(ValueError, match=r"^rir: both measurements need an ra; got 'ACC 90.0 %"):
        rir(robust(0.9, ra), robust(0.9, 0.1))


def test_ratings_of_measured_models_by_hand():
    labels = [0, 1, 1, 2, 2]
    before = measure(labels, [0, 1, 1, 2, 2], [0, 0, 0, 0, 2], 0)  # acc 1, asr_excl 3/4, ra 1/4
    after = measure(labels, [0, 1, 1, 2, 0], [0, 1, 1, 0, 2], 0)  # acc 4/5, asr_excl 1/4, ra 3/4
    assert der(before, after) == pytest.approx((0.5 - 0.2 + 1) / 2)
    assert rir(before, after) == pytest.approx((0.5 - 0.2 + 1) / 2)


def test_removed_is_below_one_and_a_half_times_chance():
    assert removed(0.149, 10) and not removed(0.15, 10)
    with pytest.raises(ValueError, match=r"^removed: asr_all must be a fraction in \[0, 1\]; got 14.9$"):
        removed(14.9, 10)


@pytest.mark.skipif(
    "MASKOPS_BENCH" not in os.environ, reason="MASKOPS_BENCH does not name the published models' folder"
)
@pytest.mark.parametrize(
    "name, target, spec, acc, asr_all",
    [
        ("badnets_8", 8, "badnets_square", 84.6, 98.3),
        ("trojan_sq_2", 2, "additive:{}/trojan_sq.png", 84.9, 99.5),
        ("l2_inv_0", 0, "additive:{}/l2_inv.png", 84.8, 100.0),
    ],
)
def test_published_models_have_their_published_backdoor(name, target, spec, acc, asr_all):
    from maskops.models import small_vgg

    bench = Path(os.environ["MASKOPS_BENCH"])
    model = small_vgg()
    model.load_state_dict(torch.load(bench / f"vgg_cifar10_{name}.pth", map_location="cpu", weights_only=True)["net"])
    with np.load(bench / "cifar10_original.npz") as arrays:
        images, labels = torch.from_numpy(arrays["x_test"]) / 255, torch.from_numpy(arrays["y_test"]).long()
    metrics = evaluate(model, images, labels, parse(spec.format(bench)), target)
    assert (round(100 * metrics.acc, 1), round(100 * metrics.asr_all, 1)) == (acc, asr_all)
