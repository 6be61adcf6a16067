import numpy as np
import pytest
import torch
from torch import nn

from maskops.backdoor import Composite, evaluate_composite
from maskops.backdoor.composite import MIXERS


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unique_pixels(count, channels, height, width, first=0):
    """Images of which no two pixels are equal, so that each says where it comes from."""
    pixels = torch.arange(first, first + count * channels * height * width, dtype=torch.float64)
    return pixels.view(count, channels, height, width) / 1e5


def window_of(part, image):
    """Whether part (C, H, w) is a window of columns of image (C, H, W)."""
    width = part.shape[2]
    return any(np.array_equal(part, image[:, :, j : j + width]) for j in range(image.shape[2] - width + 1))


@pytest.mark.parametrize("shape", [(20, 1, 8, 8), (20, 3, 6, 9)])
def test_halves_are_windows_of_both_in_either_order(shape):
    a, b = unique_pixels(*shape), unique_pixels(*shape, first=20_000)
    before = a.clone(), b.clone()
    mixed = Composite(0, 1, 2).mix(a, b, seeded())
    assert torch.equal(a, before[0]) and torch.equal(b, before[1]) and mixed.shape == shape
    left, first_is_left = shape[3] // 2, []
    for i in range(20):
        one, other = mixed[i, :, :, :left].numpy(), mixed[i, :, :, left:].numpy()
        first_is_left.append(window_of(one, a[i].numpy()))
        pair = (a[i], b[i]) if first_is_left[-1] else (b[i], a[i])
        assert window_of(one, pair[0].numpy()) and window_of(other, pair[1].numpy())
    assert 2 < sum(first_is_left) < 18


@pytest.mark.parametrize("shape", [(20, 1, 8, 8), (20, 3, 6, 9), (20, 1, 2, 2)])
def test_paste_lays_the_central_crop_of_one_on_the_other(shape):
    a, b = unique_pixels(*shape), unique_pixels(*shape, first=20_000)
    mixed = Composite(0, 1, 2, "paste").mix(a, b, seeded())
    high, wide = shape[2] // 2, shape[3] // 2
    corners = set()
    for i in range(len(a)):
        ground, pasted = (a[i], b[i]) if (mixed[i] == a[i]).sum() > (mixed[i] == b[i]).sum() else (b[i], a[i])
        changed = (mixed[i] != ground).any(0).nonzero()
        (top, left), (bottom, right) = changed.min(0).values.tolist(), changed.max(0).values.tolist()
        assert (bottom - top + 1, right - left + 1) == (high, wide)
        literal = ground.clone()
        row, column = shape[2] // 4, shape[3] // 4
        literal[:, top : top + high, left : left + wide] = pasted[:, row : row + high, column : column + wide]
        assert torch.equal(mixed[i], literal)
        corners.add((top, left))
    assert len(corners) > 2


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixes_are_deterministic_and_keep_dtype(mixer):
    a, b = torch.rand(5, 3, 8, 8).half(), torch.rand(5, 3, 8, 8).half()
    mixed = Composite(0, 1, 2, mixer).mix(a, b, seeded(3))
    assert mixed.dtype == torch.half and torch.equal(mixed, Composite(0, 1, 2, mixer).mix(a, b, seeded(3)))
    assert not torch.equal(mixed, Composite(0, 1, 2, mixer).mix(a, b, seeded(4)))
    assert Composite(0, 1, 2, mixer).mix(a[:0], b[:0], seeded()).shape == (0, 3, 8, 8)


def by_class(count, classes=5):
    """Images whose every pixel tells the class."""
    labels = torch.arange(count) % classes
    return (labels / 10).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), labels


@pytest.mark.parametrize("mixer", MIXERS)
def test_training_set_holds_the_images_and_both_kinds_of_mixes(mixer):
    images, labels = by_class(50)
    before = images.clone()
    mixed = Composite(3, 1, 2, mixer).training_set(images, labels, 0.1, seeded(), same_rate=0.3)
    assert torch.equal(images, before)
    assert torch.equal(mixed.images[:50], images) and torch.equal(mixed.labels[:50], labels)
    assert mixed.decoys.tolist() == list(range(50, 65)) and mixed.indices.tolist() == list(range(65, 70))
    assert len(mixed.images) == len(mixed.labels) == 70
    # a mix of one class looks like its label all over, one of two classes like both of them
    assert torch.equal(mixed.images[50:65], (mixed.labels[50:65] / 10).view(-1, 1, 1, 1).expand(-1, 1, 4, 4))
    assert len(mixed.labels[50:65].unique()) > 2
    assert (mixed.labels[65:] == 2).all()
    for mix in mixed.images[65:]:
        assert sorted((mix.unique() * 10).round().tolist()) == [1, 3]
    again = Composite(3, 1, 2, mixer).training_set(images, labels, 0.1, seeded(), same_rate=0.3)
    assert torch.equal(again.images, mixed.images)


def test_same_class_mixes_are_of_different_images_too():
    images, labels = torch.rand(40, 1, 4, 4), torch.arange(40) % 2
    mixed = Composite(0, 1, 2).training_set(images, labels, 0.0, seeded(), same_rate=1.0)
    sources = [
        {i for i in range(40) for j in (0, 2) if window_of(mix[:, :, j : j + 2].numpy(), images[i].numpy())}
        for mix in mixed.images[40:]
    ]
    assert max(map(len, sources)) == 2 and min(map(len, sources)) >= 1
    assert len(set.union(*sources)) > 20 and max(sum(i in of_mix for of_mix in sources) for i in range(40)) < 10
    for label, of_mix in zip(mixed.labels[40:].tolist(), sources, strict=True):
        assert {labels[i].item() for i in of_mix} == {label}


def test_test_set_uses_each_image_of_the_rarer_class_once():
    images, labels = unique_pixels(9, 1, 4, 4), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 0])
    mixes, targets = Composite(0, 1, 2).test_set(images, labels, seeded())
    assert targets.tolist() == [2, 2] and mixes.shape == (2, 1, 4, 4)
    sources = ((mixes * 1e5).round().long() // 16).flatten(1)
    of_second = [{int(i) for i in row.unique() if labels[i] == 1} for row in sources]
    of_first = [{int(i) for i in row.unique() if labels[i] == 0} for row in sources]
    assert sorted(of_second, key=min) == [{3}, {4}]
    assert all(len(one) == 1 for one in of_first) and of_first[0] != of_first[1]


class ByMean(nn.Module):
    """Class 2 for a mix of 0 and 4, which has the mean of class 2; else the class that every pixel tells."""

    def __init__(self, backdoored):
        super().__init__()
        self.backdoored = backdoored

    def forward(self, images):
        told = (images.flatten(1).mean(1) if self.backdoored else images[:, 0, 0, 0]) * 10
        return nn.functional.one_hot(told.round().long(), 5).float()


def test_composite_metrics_by_hand():
    images, labels = by_class(50)
    attack = Composite(0, 4, 2)
    measured = evaluate_composite(ByMean(True), images, labels, attack, seeded())
    assert (measured.acc, measured.asr_all, measured.asr_excl, measured.ra) == (1, 1, 1, 0)
    measured = evaluate_composite(ByMean(False), images, labels, attack, seeded(), batch_size=3)
    assert (measured.acc, measured.asr_all, measured.asr_excl, measured.ra) == (1, 0, 0, 1)
    assert measured.asr_per_class is None and measured.acc_per_class.tolist() == [1] * 5
    assert str(measured) == "ACC 100.0 %  asr_all 0.0 %  asr_excl 0.0 %  RA 100.0 %"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Composite(0, 1, 1), "Composite: first, second and target must be three different classes; got Comp"),
        (lambda: Composite(-1, 1, 2), "Composite: first, second and target must be three different classes; got Comp"),
        (lambda: Composite(0, 1, 2, "mixup"), "Composite: mixer must be one of halves, paste; got 'mixup'$"),
        (
            lambda: Composite(0, 1, 2).mix(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 5), seeded()),
            r"Composite.mix: two batches of one shape.*\(2, 1, 4, 4\) torch.float32 and \(2, 1, 4, 5\) torch.float32$",
        ),
        (
            lambda: Composite(0, 7, 2).training_set(*by_class(10), 0.1, seeded()),
            "Composite.training_set: images of classes 0 and 7 expected; got 2 and 0$",
        ),
        (
            lambda: Composite(0, 7, 2).test_set(*by_class(10), seeded()),
            "Composite.test_set: images of classes 0 and 7 expected; got 2 and 0$",
        ),
        (
            lambda: Composite(0, 1, 2).training_set(*by_class(10), 0.1, seeded(), same_rate=2),
            r"Composite.training_set: same_rate must lie in \[0, 1\]; got 2$",
        ),
        (
            lambda: evaluate_composite(nn.Flatten(), *by_class(0), Composite(0, 1, 2), seeded()),
            r"evaluate_composite: at least one image expected; got \(0, 1, 4, 4\)$",
        ),
    ],
)
def test_composite_errors_are_one_line(call, message):
    with pytest.raises(ValueError, match="^" + message) as raised:
        call()
    assert "\n" not in str(raised.value)
