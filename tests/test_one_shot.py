"""One image per class and its copies: crops of the documented areas, flips, padding."""

import pytest
import torch
from helpers import seeded

from maskops.data import as_tensors, one_shot, take_per_class


def one_shot_input(size=16, classes=3):
    labels = torch.arange(4 * classes) % classes
    return torch.rand(4 * classes, 3, size, size), labels


def test_one_shot_has_one_image_per_class_and_its_copies():
    images, labels = one_shot_input()
    found, found_labels = one_shot(images, labels, 16, seeded())
    assert found.shape == (30, 3, 16, 16) and found.min() >= 0 and found.max() <= 1
    assert found_labels.tolist() == [0, 1, 2] + [0] * 9 + [1] * 9 + [2] * 9
    for image, label in zip(found[:3], found_labels[:3], strict=True):
        assert any(torch.equal(image, other) for other in images[labels == label])
    assert len(found.flatten(1).unique(dim=0)) > 25  # a crop can be the whole image
    as_tensors((found, found_labels))


def test_one_shot_is_seeded():
    images, labels = one_shot_input()
    assert torch.equal(one_shot(images, labels, 16, seeded(1))[0], one_shot(images, labels, 16, seeded(1))[0])
    assert not torch.equal(one_shot(images, labels, 16, seeded(1))[0], one_shot(images, labels, 16, seeded(2))[0])


def test_one_shot_without_copies_is_one_image_per_class():
    images, labels = one_shot_input()
    found, found_labels = one_shot(images, labels, 16, seeded(), copies=0)
    assert torch.equal(found, take_per_class(images, labels, 1, seeded())[0]) and found_labels.tolist() == [0, 1, 2]


def test_one_shot_copies_come_from_the_image_of_their_class():
    images = torch.tensor([0.2, 0.7]).view(2, 1, 1, 1).expand(2, 3, 12, 12)
    found, labels = one_shot(images, torch.tensor([4, 9]), 12, seeded())
    torch.testing.assert_close(found, torch.where(labels == 4, 0.2, 0.7).view(-1, 1, 1, 1).expand_as(found))


def test_one_shot_flips_half_of_the_copies_and_none_on_request():
    ramp = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)
    for flip, expected in ((True, 0.5), (False, 0.0)):
        found, _ = one_shot(ramp, torch.zeros(1, dtype=int), 16, seeded(), copies=400, flip=flip)
        falling = (found[1:, 0, 0, 0] > found[1:, 0, 0, -1]).float().mean().item()
        assert falling == pytest.approx(expected, abs=0.08)


def test_one_shot_crops_have_the_documented_areas_and_ratios():
    # a linear image keeps its slope under bilinear resizing: the slope of the middle is the crop's extent
    size, step = 32, 1 / 31
    row = torch.arange(size) * step
    images = torch.stack((row.expand(size, size), row.expand(size, size).T))[None]
    found, _ = one_shot(images, torch.zeros(1, dtype=int), size, seeded(), copies=300, flip=False)
    width = (found[1:, 0, 16, 17] - found[1:, 0, 16, 16]) / step * size
    height = (found[1:, 1, 17, 16] - found[1:, 1, 16, 16]) / step * size
    area, ratio = width * height / size**2, width / height
    assert 0.06 < area.min() < 0.2 and 0.85 < area.max() <= 1.001
    assert 0.6 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.6


@pytest.mark.parametrize(("size", "image_size"), [(16, 12), (12, 16), (16, 11), (11, 16)])
def test_one_shot_crops_or_pads_other_sizes_in_the_middle(size, image_size):
    images, labels = torch.rand(1, 3, size, size) * 0.5 + 0.5, torch.zeros(1, dtype=int)
    found, _ = one_shot(images, labels, image_size, seeded(), copies=1)
    assert found.shape == (2, 3, image_size, image_size)
    offset = abs(size - image_size) // 2 + (size > image_size and (size - image_size) % 2)
    small, large = sorted((size, image_size))
    inside = (..., slice(offset, offset + small), slice(offset, offset + small))
    if size > image_size:
        assert torch.equal(found[0], images[0][inside])
    else:
        assert torch.equal(found[0][inside], images[0])
        assert found[0].count_nonzero() == 3 * small**2 < 3 * large**2


def test_one_shot_refuses_what_does_not_fit():
    images, labels = one_shot_input()
    with pytest.raises(ValueError, match=r"^one_shot: expected image_size >= 1 and copies >= 0; got 16 and -1$"):
        one_shot(images, labels, 16, seeded(), copies=-1)
    with pytest.raises(ValueError, match=r"^one_shot: images must be in pixel space \[0, 1\], "):
        one_shot(images - 1, labels, 16, seeded())
