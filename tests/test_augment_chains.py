"""RandAugment and AugMix: which operations, how strong, how many, how mixed."""

import functools

import pytest
import torch
from helpers import seeded
from helpers_augment import random_images

from maskops.augment import augmix, randaugment
from maskops.augment import operations as op
from maskops.augment.chains import AUGMIX, RANDAUGMENT


def test_chains_draw_from_the_papers_operations():
    assert len(RANDAUGMENT) == 14 and len(AUGMIX) == 10
    assert set(AUGMIX) == set(RANDAUGMENT) - {"color", "contrast", "brightness", "sharpness"}
    assert next(iter(RANDAUGMENT)) == next(iter(AUGMIX)) == "identity"


@pytest.mark.parametrize("table", [RANDAUGMENT, AUGMIX], ids=["randaugment", "augmix"])
def test_level_zero_moves_and_inverts_nothing(table):
    images = random_images()
    zero, sign = torch.zeros(6), torch.ones(6)
    kept = ["identity", "rotate", "shear-x", "shear-y", "translate-x", "translate-y"]
    kept += ["solarize"] if table is AUGMIX else []
    for name in kept:
        torch.testing.assert_close(table[name](images, zero, sign), images, rtol=0, atol=2e-6)


def test_randaugment_magnitudes_are_those_of_its_docstring():
    images = random_images((1, 3, 30, 20))
    level, minus = torch.tensor([1 / 3]), torch.tensor([-1.0])
    value = functools.partial(torch.full, (1,))
    expected = {
        "rotate": op.rotate(images, value(-10.0)),
        "solarize": op.solarize(images, value(85.33)),
        "posterize": op.posterize(images, value(1.0)),
        "color": op.color(images, value(0.7)),
        "shear-x": op.shear_x(images, value(-0.1)),
        "translate-x": op.translate_x(images, value(-2.2)),
        "translate-y": op.translate_y(images, value(-3.3)),
    }
    for name, result in expected.items():
        torch.testing.assert_close(RANDAUGMENT[name](images, level, minus), result, rtol=0, atol=1e-6)


def test_randaugment_of_one_operation_is_one_of_the_fourteen():
    image = random_images((1, 3, 12, 12))
    results = randaugment(image.expand(300, -1, -1, -1), seeded(), count=1, magnitude=12)
    level = torch.tensor([12 / 30])
    candidates = [f(image, level, torch.tensor([s])) for f in RANDAUGMENT.values() for s in (-1.0, 1.0)]
    taken = (results[:, None] - torch.stack(candidates, dim=1)).abs().amax((2, 3, 4)) < 1e-5
    assert taken.any(1).all()
    assert taken.any(0).all()


def test_randaugment_of_no_operation_is_the_identity():
    images = random_images()
    assert torch.equal(randaugment(images, seeded(), count=0), images)


def test_augmix_stays_between_the_image_and_its_chains():
    # white images in which every operation leaves white or brings in zeros or inverts: the mean falls, never rises
    images = torch.ones(50, 1, 8, 8)
    mixed = augmix(images, seeded())
    assert (mixed <= 1).all() and (mixed.mean((1, 2, 3)) < 1).float().mean() > 0.5


def test_augmix_is_the_mixture_of_its_chains(monkeypatch):
    def add(amount):
        return lambda images, level, sign: images + amount

    # nine operations that add 1/8, so that a chain adds its depth in eighths
    names = list(AUGMIX)
    for name in names[1:]:
        monkeypatch.setitem(AUGMIX, name, add(1 / 8))
    images = torch.zeros(400, 1, 4, 4)
    fixed = augmix(images, seeded(), depth=2)[:, 0, 0, 0] / (2 / 8)
    assert fixed.mean() == pytest.approx(0.5, abs=0.05)  # E[m]; weights sum to 1
    assert fixed.var() == pytest.approx(1 / 12, rel=0.2)
    stochastic = augmix(images, seeded(), depth=-1, width=1)[:, 0, 0, 0] * 8
    assert stochastic.max() > 2 and stochastic.mean() == pytest.approx(1, abs=0.1)
    assert augmix(images, seeded(), depth=-1, width=4).max() <= 3 / 8


def test_augmix_magnitudes_are_those_of_its_docstring():
    images = random_images((1, 3, 30, 20))
    level, minus = torch.tensor([0.55]), torch.tensor([-1.0])
    value = functools.partial(torch.full, (1,))
    expected = {
        "rotate": op.rotate(images, value(-16.0), "bilinear"),
        "solarize": op.solarize(images, value(256 - 140.0)),
        "posterize": op.posterize(images, value(2.0)),
        "shear-x": op.shear_x(images, value(-0.165), "bilinear"),
        "shear-y": op.shear_y(images, value(-0.165), "bilinear"),
        "translate-x": op.translate_x(images, value(-3.0), "bilinear"),
        "translate-y": op.translate_y(images, value(-5.0), "bilinear"),
    }
    for name, result in expected.items():
        torch.testing.assert_close(AUGMIX[name](images, level, minus), result, rtol=0, atol=1e-5)


def test_augmix_levels_are_uniform_up_to_severity(monkeypatch):
    levels = []

    def record(images, level, sign):
        levels.append(level * sign)
        return images

    for name in list(AUGMIX)[1:]:
        monkeypatch.setitem(AUGMIX, name, record)
    augmix(random_images((500, 1, 4, 4)), seeded(), severity=4, depth=1)
    signed = torch.cat(levels)
    assert len(signed) == 1500 and signed.abs().min() >= 0.01 and signed.abs().max() <= 0.4
    assert signed.abs().mean() == pytest.approx(0.205, abs=0.01) and (signed < 0).float().mean() == pytest.approx(
        0.5, abs=0.05
    )


@pytest.mark.parametrize("chain", [randaugment, augmix])
def test_chains_refuse_other_channels_and_tiny_images(chain):
    for shape in ((2, 4, 8, 8), (2, 3, 3, 8)):
        with pytest.raises(ValueError, match=rf"{chain.__name__}: images must be \(N, 1 or 3, H >= 4, W >= 4\); got"):
            chain(torch.rand(shape), seeded())
