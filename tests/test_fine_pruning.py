"""Fine-Pruning against a literal transcription in plain torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers_baselines import QUIET, assert_same_model, gradients_of, momentum_sgd, passes
from torch import nn

from maskops.purify.baselines import fine_pruning


@pytest.mark.parametrize("budget", [0.0, 0.4, 1.0])
def test_fine_pruning_prunes_the_least_active_channels_and_keeps_them_pruned(clean_data, budget):
    """Held-out images decide how many; the last convolution's channels are four features each of the last layer."""
    images, labels = clean_data[0].double(), clean_data[1]
    body = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(2)]
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(24, 3)).double().eval()
    result = fine_pruning(model, clean_data, epochs=2, batch_size=8, budget=budget, **QUIET)

    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(20, generator=generator)
    held_out, rest = order[:4], order[4:]
    expected = copy.deepcopy(model)
    features = expected[:7](images[rest])
    activity = features.view(16, 6, 4).mean((0, 2))
    columns = torch.arange(24).view(6, 4)

    def accuracy(channels):
        pruned = copy.deepcopy(expected)
        pruned[7].weight.data[:, columns[channels].flatten()] = 0
        return (pruned(images[held_out]).argmax(1) == labels[held_out]).double().mean().item()

    channels = activity.argsort()
    count = 0
    while count < 5 and accuracy(channels[: count + 1]) >= accuracy(channels[:0]) - budget:
        count += 1
    gone = columns[channels[:count]].flatten()
    expected[7].weight.data[:, gone] = 0
    parameters = list(expected.train().parameters())
    step = momentum_sgd(parameters, 0.01, 0.9, 5e-4)
    for batches in passes(2, count=16, generator=generator):
        for batch in batches:
            chosen = rest[batch]
            step(gradients_of(F.cross_entropy(expected(images[chosen]), labels[chosen]), parameters))
            expected[7].weight.data[:, gone] = 0

    assert result.history["pruned neurons"] == [count]
    assert budget < 1 or count == 5
    assert_same_model(result.model, expected)


def test_fine_pruning_of_a_network_with_a_hidden_linear_layer_prunes_its_single_neurons(clean_data):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))
    result = fine_pruning(model, clean_data, epochs=1, budget=1.0, **QUIET)
    assert (result.model[4].weight == 0).all(0).sum() == result.history["pruned neurons"][0] == 7


def test_fine_pruning_without_a_linear_layer_is_one_line(clean_data):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"^fine_pruning: the model's forward calls no nn.Linear, of whose inputs .*"):
        fine_pruning(model, clean_data, **QUIET)
