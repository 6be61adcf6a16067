"""Crops, flips, holes, mixtures and the adversary against their formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import seeded
from helpers_augment import LABELS, Mean, random_images
from torch import nn

from maskops.augment import adversarial, cutmix, cutout, mixup, random_crop, random_flip


def test_random_crop_takes_each_window_of_the_padded_image():
    image = torch.arange(1, 17.0).view(1, 1, 4, 4) / 16
    windows = F.pad(image, (1, 1, 1, 1)).unfold(2, 4, 1).unfold(3, 4, 1).reshape(9, 1, 4, 4)
    crops = random_crop(image.expand(200, -1, -1, -1), 1, seeded())
    taken = [[torch.equal(crop, window) for window in windows] for crop in crops]
    assert all(sum(row) == 1 for row in taken)
    assert all(map(any, zip(*taken, strict=True)))


def test_random_crop_without_padding_is_the_identity():
    images = random_images()
    assert torch.equal(random_crop(images, 0, seeded()), images)


def test_random_flip_mirrors_about_half():
    images = torch.rand(400, 1, 4, 4, generator=seeded())
    flipped = random_flip(images, seeded())
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    same = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 150 < mirrored.sum() < 250


@pytest.mark.parametrize("length", [1, 3, 4])
def test_cutout_is_one_square_cut_off_at_the_border(length):
    hole = cutout(torch.ones(300, 1, 8, 6), seeded(), length)[:, 0] == 0
    rows, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, rows[:, :, None] & columns[:, None, :])
    for side in (rows, columns):
        assert (side.int().diff(dim=1).abs().sum(1) <= 2).all()  # one run
        assert side.sum(1).max() == length and side.sum(1).min() == (length + 1) // 2
        assert side.any(0).all()


def test_cutout_takes_half_the_height_and_nothing_for_no_length():
    images = random_images((20, 3, 8, 16)).clamp(min=0.1)
    assert (cutout(images, seeded()) == 0).all(1).sum((1, 2)).max() == 16
    assert torch.equal(cutout(images, seeded(), 0), images)


def test_mixup_is_the_blend_that_its_labels_say():
    images = random_images()
    mixed = mixup(images, LABELS, seeded())
    expected = mixed.weight * images + (1 - mixed.weight) * images[mixed.other_labels]
    assert 0 < mixed.weight < 1
    assert torch.equal(mixed.labels, LABELS) and sorted(mixed.other_labels.tolist()) == LABELS.tolist()
    torch.testing.assert_close(mixed.images, expected)


def test_mixup_weight_follows_beta():
    images, generator = random_images((2, 1, 4, 4)), seeded()
    weights = {a: np.array([mixup(images, LABELS[:2], generator, a).weight for _ in range(400)]) for a in (0.2, 1, 5)}
    for alpha, drawn in weights.items():
        assert drawn.mean() == pytest.approx(0.5, abs=0.06)
        assert drawn.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.2)


@pytest.mark.parametrize("seed", range(10))
def test_cutmix_is_one_box_whose_share_is_the_weight(seed):
    images = LABELS.view(6, 1, 1, 1).expand(6, 3, 8, 12) / 5.0
    mixed = cutmix(images, LABELS, seeded(seed))
    moved = mixed.other_labels != LABELS
    foreign = (mixed.images != images)[moved]
    assert foreign.float().mean().item() == pytest.approx(1 - mixed.weight) or not moved.any()
    for image in range(6):
        box = mixed.images[image] != images[image]
        assert torch.equal(box, box.any(2, keepdim=True) & box.any(1, keepdim=True))
        assert torch.equal(mixed.images[image][box], images[mixed.other_labels[image]][box])


def test_cutmix_box_follows_lambda():
    generator, images = seeded(), random_images((2, 1, 32, 32))
    weights = [cutmix(images, LABELS[:2], generator).weight for _ in range(400)]
    # a box with its centre uniform over the image loses a good part of its area: E[λ] = 1/2 becomes about 0.7
    assert 0.65 < np.mean(weights) < 0.78


@pytest.mark.parametrize("kind", [mixup, cutmix])
def test_alpha_zero_leaves_the_images(kind):
    images = random_images()
    mixed = kind(images, LABELS, seeded(), alpha=0)
    assert mixed.weight == 1 and torch.equal(mixed.images, images)


def test_cutmix_probability_leaves_whole_batches():
    images, generator = random_images(), seeded()
    untouched = cutmix(images, LABELS, generator, probability=0)
    assert untouched.weight == 1 and torch.equal(untouched.images, images)
    assert torch.equal(untouched.other_labels, LABELS)
    mixed = [not torch.equal(cutmix(images, LABELS, generator, 1, 0.5).images, images) for _ in range(100)]
    assert 30 < sum(mixed) < 65


def test_adversarial_raises_the_loss_and_stays_in_the_ball():
    model, images = Mean(), random_images()
    perturbed = adversarial(model, images, LABELS, seeded(), epsilon=16 / 255, steps=4)
    assert ((perturbed - images).abs() <= 16 / 255 + 1e-6).all()
    clean, attacked = (F.cross_entropy(model(x), LABELS, reduction="none") for x in (images, perturbed))
    assert (attacked > clean).all()


def test_adversarial_of_a_linear_model_is_the_corner_of_the_ball():
    model, images = Mean(1), torch.full((2, 1, 4, 4), 0.5)
    with torch.no_grad():
        model.linear.weight.copy_(torch.tensor([[1.0], [-1.0], [0.0], [0.0], [0.0], [0.0]]))
        model.linear.bias.zero_()
    perturbed = adversarial(model, images, torch.tensor([0, 1]), seeded(), epsilon=0.25, steps=2)
    torch.testing.assert_close(perturbed, torch.tensor([0.25, 0.75]).view(2, 1, 1, 1).expand(2, 1, 4, 4))


def test_adversarial_step_is_the_formula():
    model, images = Mean(), random_images().clamp(0.2, 0.8)
    start = adversarial(model, images, LABELS, seeded(), epsilon=0.1, steps=0)
    point = start.clone().requires_grad_()
    F.cross_entropy(model(point), LABELS).backward()
    expected = torch.minimum(torch.maximum(start + 0.03 * point.grad.sign(), images - 0.1), images + 0.1)
    stepped = adversarial(model, images, LABELS, seeded(), epsilon=0.1, steps=1, step_size=0.03)
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-6)
    assert (start - images).abs().max() > 0.09 and abs((start - images).mean()) < 0.01


@pytest.mark.parametrize("training", [True, False])
def test_adversarial_leaves_the_model_and_works_without_gradients(training):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Mean(4)).train(training)
    with torch.no_grad():
        perturbed = adversarial(model, random_images(), LABELS, seeded(), epsilon=0.1)
        assert not torch.is_grad_enabled()
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not torch.equal(perturbed, random_images())


def test_adversarial_of_radius_zero_is_the_identity():
    assert torch.equal(adversarial(Mean(), random_images(), LABELS, seeded(), epsilon=0), random_images())
