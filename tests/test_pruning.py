"""Pruning a model from the scores of its neurons."""

import pytest
import torch
from torch import nn

from maskops.purify import prune
from maskops.purify._pruning import apply_masks


def test_pruning_takes_the_smallest_scores_of_all_layers():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    scores = {"0.mask": torch.tensor([[0.5], [0.1], [1.0]]), "1.mask": torch.tensor([[0.1], [0.7]])}
    for how, cut in [
        ({"number": 0}, [0, 0, 0, 0, 0]),
        ({"number": 1}, [0, 1, 0, 0, 0]),
        ({"number": 3}, [1, 1, 0, 1, 0]),
        ({"fraction": 0.4}, [0, 1, 0, 1, 0]),
        ({"fraction": 1.0}, [1, 1, 1, 1, 1]),
        ({"threshold": 0.1}, [0, 1, 0, 1, 0]),
        ({"threshold": 0.09}, [0, 0, 0, 0, 0]),
    ]:
        pruned = prune(model, scores, **how)
        rows = [*pruned[0].weight, *pruned[1].weight]
        assert [int(not row.any()) for row in rows] == cut
        assert torch.equal(pruned[0].bias, model[0].bias)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "prune: exactly one of threshold, number and fraction must be given; got"),
        ({"threshold": 0.1, "number": 2}, "prune: exactly one of threshold, number and fraction must be given; got"),
        ({"number": 6}, "prune: expected a number of neurons from 0 to 2; got 6"),
        ({"fraction": 1.5}, "prune: expected a number of neurons from 0 to 2; got 3"),
    ],
)
def test_pruning_that_says_nothing_clear_is_refused(how, message):
    with pytest.raises(ValueError) as error:
        prune(nn.Sequential(nn.Linear(2, 2)), {"0.mask": torch.rand(2, 1)}, **how)
    assert str(error.value).startswith(message)


def test_tied_weights_are_pruned_together():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    pruned = prune(model, {"0.mask": torch.tensor([[0.0], [1.0]])}, threshold=0.5)
    assert pruned[0].weight is pruned[2].weight and not pruned[0].weight[0].any() and pruned[0].weight[1].any()


def test_scores_of_bytes_are_steps_of_a_255th():
    model = nn.Sequential(nn.Linear(2, 3))
    scores = {"0.mask": torch.tensor([[51], [26], [255]], dtype=torch.uint8)}
    pruned = prune(model, scores, threshold=0.2)
    assert [int(not row.any()) for row in pruned[0].weight] == [1, 1, 0]
    assert torch.equal(pruned[0].weight[2], model[0].weight[2])
    assert torch.equal(apply_masks(model, scores)[0].weight, model[0].weight * (scores["0.mask"].float() / 255))


@pytest.mark.parametrize(
    "scores",
    [
        {"0.mask": torch.rand(2)},
        {"0.mask": torch.tensor(0.0)},
        {"0.bias": torch.rand(3)},
        {"7.mask": torch.rand(3, 1)},
        {"1.mask": torch.rand(3, 1)},
    ],
)
def test_scores_of_another_model_are_refused(scores):
    with pytest.raises(ValueError, match=r"^prune: [^\n]*\Z"):
        prune(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), scores, threshold=0.5)
