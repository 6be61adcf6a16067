import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from maskops.augment import adversarial
from maskops.backdoor import (
    BPPA,
    SIG,
    BadNetsSquare,
    FourCorners,
    Several,
    WaNet,
    poison,
    poison_clean_label,
    target_labels,
)


def random_images(seed, shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_target_labels_of_both_rules():
    labels = torch.tensor([0, 1, 2, 3, 255], dtype=torch.uint8)
    assert target_labels(labels, 3).tolist() == [3] * 5
    assert target_labels(labels, None, "all_to_all", 256).tolist() == [1, 2, 3, 4, 0]
    assert target_labels(labels, 3).dtype == torch.int64


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None,), "all_to_one needs a target class; got None"),
        ((10, "all_to_one", 10), "all_to_one needs a target class below 10; got 10"),
        ((None, "all_to_all"), "all_to_all needs num_classes >= 2 and no target; got num_classes=None and target=None"),
        ((3, "all_to_all", 10), "all_to_all needs num_classes >= 2 and no target; got num_classes=10 and target=3"),
        ((0, "all_to_one", 1), "labels must be below num_classes 1; got 1"),
        ((3, "one_to_one"), "rule must be one of all_to_one, all_to_all; got 'one_to_one'"),
    ],
)
def test_target_labels_errors(arguments, message):
    with pytest.raises(ValueError, match=f"^target_labels: {message}$"):
        target_labels(torch.tensor([0, 1]), *arguments)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(0, 60),
    rate=st.floats(0, 0.5),
    rule=st.sampled_from(["all_to_one", "all_to_all"]),
)
def test_poison_changes_exactly_the_drawn_images(seed, count, rate, rule):
    images, labels = random_images(seed, (count, 1, 4, 4)) * 0.9, torch.arange(count) % 4
    before = images.clone(), labels.clone()
    target, classes = (2, None) if rule == "all_to_one" else (None, 4)
    draw = torch.Generator().manual_seed(seed)
    trigger = BadNetsSquare(size=1, margin=0)
    poisoned = poison(images, labels, trigger, target, rate, draw, rule=rule, num_classes=classes)
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[poisoned.indices] = True
    assert chosen.sum() == len(poisoned.indices) == round(rate * count)
    assert torch.equal(chosen, poisoned.labels != labels)
    assert torch.equal(poisoned.images[chosen], trigger(images[chosen]))
    assert torch.equal(poisoned.images[~chosen], images[~chosen])
    assert torch.equal(poisoned.labels[chosen], target_labels(labels, target, rule, classes)[chosen])
    again = poison(images, labels, trigger, target, rate, draw.manual_seed(seed), rule=rule, num_classes=classes)
    assert torch.equal(again.indices, poisoned.indices)


def test_poison_draws_every_candidate_at_the_highest_rate():
    images, labels = torch.zeros(8, 1, 4, 4), torch.arange(8) % 4
    draw = torch.Generator().manual_seed(0)
    every = poison(images, labels, BadNetsSquare(1), None, 1.0, draw, rule="all_to_all", num_classes=4)
    assert every.indices.tolist() == list(range(8))
    assert poison(images, labels, BadNetsSquare(1), 0, 0.75, draw).indices.tolist() == [1, 2, 3, 5, 6, 7]
    with pytest.raises(ValueError, match=r"^poison: rate 0.9 asks for 7 images; only 6 are not of class 0$"):
        poison(images, labels, BadNetsSquare(1), 0, 0.9, draw)


@pytest.mark.parametrize(
    "images, labels, rate, error, message",
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0, 1], 0.5, TypeError, "images must be floating point"),
        (torch.full((2, 1, 4, 4), 255.0), [0, 1], 0.5, ValueError, r"images must lie in \[0, 1\].*got 255 to 255"),
        (torch.full((2, 1, 4, 4), torch.nan), [0, 1], 0.5, ValueError, r"images must lie in \[0, 1\].*got nan to nan"),
        (torch.zeros(2, 1, 4, 4), [0.0, 1.0], 0.5, TypeError, "labels must be integers; got torch.float32"),
        (torch.zeros(2, 1, 4, 4), [0, 1, 2], 0.5, ValueError, r"labels must be \(N,\).* got \(3,\) and \(2, 1, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4), [0, -1], 0.5, ValueError, "labels must not be negative; got -1"),
        (torch.zeros(2, 1, 4, 4), [0, 1], 5, ValueError, r"rate must lie in \[0, 1\]; got 5"),
    ],
)
def test_poison_errors(images, labels, rate, error, message):
    with pytest.raises(error, match=f"^poison: {message}"):
        poison(images, torch.tensor(labels), BadNetsSquare(1), 0, rate, torch.Generator())


def test_poisoned_unpacks_to_three_and_has_no_decoys_unless_asked():
    images, labels, indices = poisoned = poison(torch.zeros(8, 1, 4, 4), torch.arange(8) % 4, SIG(), 0, 0.25, seeded())
    assert images is poisoned.images and labels is poisoned.labels and indices is poisoned.indices
    assert poisoned.decoys.tolist() == [] and poisoned.decoys.dtype == torch.int64


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(0, 40),
    rate=st.floats(0, 0.5),
    decoy_rate=st.floats(0, 0.4),
    rule=st.sampled_from(["all_to_one", "all_to_all"]),
    trigger=st.sampled_from([WaNet(), BPPA(levels=4)]),
)
def test_decoys_are_other_images_and_keep_their_label(seed, count, rate, decoy_rate, rule, trigger):
    images, labels = random_images(seed, (count, 1, 4, 4)), torch.arange(count) % 4
    before = images.clone()
    target, classes = (2, None) if rule == "all_to_one" else (None, 4)
    options = {"rule": rule, "num_classes": classes}
    mixed = poison(images, labels, trigger, target, rate, seeded(seed), decoy_rate=decoy_rate, **options)
    assert torch.equal(images, before)
    assert len(mixed.decoys) == round(decoy_rate * count)
    assert not set(mixed.decoys.tolist()) & set(mixed.indices.tolist())
    assert mixed.decoys.tolist() == sorted(set(mixed.decoys.tolist()))
    assert torch.equal(mixed.labels[mixed.decoys], labels[mixed.decoys])
    untouched = torch.ones(count, dtype=torch.bool)
    untouched[mixed.indices] = untouched[mixed.decoys] = False
    assert torch.equal(mixed.images[untouched], images[untouched])
    without = poison(images, labels, trigger, target, rate, seeded(seed), **options)
    assert torch.equal(mixed.indices, without.indices) and torch.equal(mixed.labels, without.labels)
    assert torch.equal(mixed.images[mixed.indices], trigger(images[mixed.indices]))


def test_decoys_are_those_of_the_trigger():
    images, draw = random_images(0, (20, 3, 8, 8)), seeded(1)
    mixed = poison(images, torch.arange(20) % 4, WaNet(), 0, 0.25, draw, decoy_rate=0.5)
    again = seeded(1)
    torch.randperm(15, generator=again), torch.randperm(15, generator=again)
    assert torch.equal(mixed.images[mixed.decoys], WaNet().decoys(images[mixed.decoys], again))
    assert (mixed.images[mixed.decoys] != WaNet()(images[mixed.decoys])).flatten(1).any(1).all()


def test_decoys_may_be_of_the_target_class():
    labels = torch.zeros(10, dtype=torch.int64)
    assert len(poison(torch.zeros(10, 1, 4, 4), labels, WaNet(), 0, 0.0, seeded(), decoy_rate=1.0).decoys) == 10


def test_several_triggers_get_equal_shares():
    images, labels = random_images(0, (40, 1, 8, 8)), torch.arange(40) % 4
    several = Several((BadNetsSquare(2), FourCorners(), SIG()))
    poisoned = poison(images, labels, several, 1, 0.5, seeded())
    clean, triggered = images[poisoned.indices], poisoned.images[poisoned.indices]
    assert (poisoned.labels[poisoned.indices] == 1).all()
    carries = torch.stack([(trigger(clean) == triggered).flatten(1).all(1) for trigger in several.triggers])
    assert (carries.sum(0) == 1).all()
    assert sorted(carries.sum(1).tolist()) == [6, 7, 7]
    assert torch.equal(poison(images, labels, several, 1, 0.5, seeded()).images, poisoned.images)


@pytest.mark.parametrize(
    "trigger, options, error, message",
    [
        (
            BadNetsSquare(1),
            {"decoy_rate": 0.5},
            TypeError,
            r"decoy_rate needs a trigger with decoys.*got BadNetsSquare",
        ),
        (WaNet(), {"decoy_rate": 0.9}, ValueError, "decoy_rate 0.9 asks for 7 images; only 6 are without the trigger"),
        (WaNet(), {"decoy_rate": -0.1}, ValueError, r"decoy_rate must lie in \[0, 1\]; got -0.1"),
    ],
)
def test_decoy_errors(trigger, options, error, message):
    with pytest.raises(error, match=f"^poison: {message}"):
        poison(torch.zeros(8, 1, 4, 4), torch.arange(8) % 4, trigger, 0, 0.25, seeded(), **options)


@pytest.mark.parametrize("rate, expected", [(0.0, 0), (0.3, 2), (0.8, 6), (1.0, 7)])
def test_clean_label_poison_takes_a_share_of_the_target_class_and_no_label(rate, expected):
    images, labels = random_images(0, (20, 1, 8, 8)), torch.arange(20) % 3
    before = images.clone(), labels.clone()
    poisoned = poison_clean_label(images, labels, SIG(), 0, rate, seeded())
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    assert len(poisoned.indices) == expected and (labels[poisoned.indices] == 0).all()
    assert torch.equal(poisoned.labels, labels) and poisoned.decoys.numel() == 0
    carrying = torch.zeros(20, dtype=torch.bool).index_fill(0, poisoned.indices, True)
    assert torch.equal(poisoned.images[carrying], SIG()(images[carrying]))
    assert torch.equal(poisoned.images[~carrying], images[~carrying])


def linear_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 3)).train()


@pytest.mark.parametrize("batch_size", [2, 256])
def test_clean_label_images_are_made_hard_before_the_stamp(batch_size):
    images, labels, model = random_images(0, (12, 1, 8, 8)), torch.arange(12) % 3, linear_model()
    state, flags = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    options = {"epsilon": 0.1, "steps": 20, "step_size": 0.02, "batch_size": batch_size}
    poisoned = poison_clean_label(images, labels, FourCorners(), 1, 1.0, seeded(), model, **options)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags and all(p.grad is None for p in model.parameters())
    hard, easy = poisoned.images[poisoned.indices], images[poisoned.indices]
    assert torch.equal(FourCorners()(hard), hard) and not hard.requires_grad
    draw, literal = seeded(), linear_model().eval()
    torch.randperm(4, generator=draw)
    parts = [
        adversarial(literal, part, torch.ones(len(part), dtype=torch.int64), draw, 0.1, 20, 0.02)
        for part in easy.split(batch_size)
    ]
    assert torch.equal(FourCorners()(torch.cat(parts)), hard)
    before, after = (
        cross_entropy(literal(x), torch.ones(4).long(), reduction="none") for x in (easy, torch.cat(parts))
    )
    assert (after > before).all()
    again = poison_clean_label(images, labels, FourCorners(), 1, 1.0, seeded(), linear_model(), **options)
    assert torch.equal(again.images, poisoned.images)


def test_clean_label_poison_works_under_no_grad_and_with_nothing_drawn():
    images, labels = random_images(0, (6, 1, 8, 8)), torch.arange(6) % 3
    with torch.no_grad():
        poisoned = poison_clean_label(images, labels, SIG(), 0, 1.0, seeded(), linear_model(), steps=1)
    assert len(poisoned.indices) == 2
    nothing = poison_clean_label(images, labels, SIG(), 0, 0.0, seeded(), linear_model())
    assert torch.equal(nothing.images, images) and len(nothing.indices) == 0


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((5, 0.5), {}, "images of the target class expected; got none of class 5"),
        ((0, 1.5), {}, r"rate must lie in \[0, 1\]; got 1.5"),
        ((0, 0.5), {"batch_size": 0}, "batch_size must be at least 1; got 0"),
    ],
)
def test_clean_label_errors(arguments, options, message):
    with pytest.raises(ValueError, match=f"^poison_clean_label: {message}$"):
        poison_clean_label(torch.zeros(4, 1, 8, 8), torch.arange(4) % 2, SIG(), *arguments, seeded(), **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_poison_draws_the_same_on_the_gpu():
    images, labels = random_images(0, (20, 3, 8, 8)), torch.arange(20) % 4
    here = poison(images, labels, WaNet(), 0, 0.2, seeded(), decoy_rate=0.4)
    there = poison(images.cuda(), labels.cuda(), WaNet(), 0, 0.2, seeded(), decoy_rate=0.4)
    assert there.images.is_cuda and there.indices.is_cuda
    assert torch.equal(here.indices, there.indices.cpu()) and torch.equal(here.decoys, there.decoys.cpu())
    torch.testing.assert_close(there.images.cpu(), here.images, atol=1e-5, rtol=0)
