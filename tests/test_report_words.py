"""What the report calls the values of masks, and which of them belong to one channel."""

import pytest
import torch
from helpers_report import Page, made_up, metrics
from torch import nn

from maskops import convert, report
from maskops.report import _write
from maskops.report._masks import lost


@pytest.fixture(autouse=True)
def _without_the_picture(monkeypatch):
    monkeypatch.setattr(_write, "picture", lambda *arguments: None)


def words(folder, masks, cut=False, model=None, **options):
    """What the page says of a result with masks, or with some of their values cut."""
    options = {"method": "anp", "device": "cpu", **options}
    scores = masks if cut else None
    masks = {name: (mask > 0.5).float() for name, mask in masks.items()} if cut else masks
    result = made_up(masks=masks, scores=scores, trigger=None, options=options, model=model or nn.Linear(2, 2))
    report.write(folder, result, metrics(0.9), metrics(0.9), torch.rand(3, 3, 8, 8))
    return Page((folder / "report.html").read_text(encoding="utf-8"))


LINEAR = {"a.mask": torch.rand(10, 784)}


@pytest.mark.parametrize(
    ("masks", "options", "expected"),
    [
        (LINEAR, {}, "7,840 weights in 1 layer"),
        (LINEAR, {"granularity": "weight"}, "7,840 weights in 1 layer"),
        (LINEAR, {"granularity": "kernel"}, "7,840 weights in 1 layer"),
        ({"a.mask": torch.rand(10, 1)}, {}, "10 neurons in 1 layer"),
        ({"a.mask": torch.rand(8, 4, 1, 1)}, {}, "32 kernels in 1 layer"),
        ({"a.mask": torch.rand(8, 4, 1, 1)}, {"granularity": "weight"}, "32 weights in 1 layer"),
        ({"a.mask": torch.rand(8, 1, 1, 1)}, {"granularity": "kernel"}, "8 kernels in 1 layer"),
        ({"a.mask": torch.rand(8, 4, 3, 3), "b.neuron_mask": torch.rand(8)}, {}, "296 weights and neurons in 2 layers"),
    ],
)
def test_values_of_masks_have_their_name(tmp_path, masks, options, expected):
    assert f"how much to keep of each of {expected}" in words(tmp_path, masks, **options).words


def test_what_is_pruned_has_its_name(tmp_path):
    masks = {"a.mask": torch.tensor([[[[1.0, 0.2]]], [[[1.0, 1.0]]]])}
    seen = words(tmp_path, masks, cut=True, granularity="weight").words
    assert "cut 1 of 4 weights in 1 layer" in seen and "Pruned weights" in seen and "single weights" in seen
    masks = {"a.mask": torch.tensor([[0.2, 1.0], [1.0, 1.0]]).view(2, 2, 1, 1)}
    seen = words(tmp_path, masks, cut=True, granularity="kernel").words
    assert "cut 1 of 4 kernels in 1 layer" in seen and "Pruned kernels" in seen and "single kernels" in seen


@pytest.mark.parametrize(("granularity", "groups"), [("neuron", 1), ("weight", 1), ("kernel", 2), ("weight", 2)])
def test_channels_of_a_transposed_convolution_are_those_that_come_out(tmp_path, granularity, groups):
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=groups))
    masked = convert.mask_(nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=groups)), granularity, layers="conv")
    (mask,) = convert.masks(masked).values()
    mask = mask.detach()
    if groups == 1:
        mask[:, 5] = 0.25
    else:  # channel 5 is the second of the second group, which has the last two that come in
        mask[2:, 1] = 0.25
    assert lost(mask, 64, groups).tolist() == [0, 0, 0, 0, 0, 0.75, 0, 0]
    seen = words(tmp_path, {"0.mask": mask}, model=model, cut=True, granularity=granularity).words
    assert f"of {mask.numel()} {granularity}s in 1 layer" in seen
    assert ("no. 5" in seen) == (granularity == "neuron")
