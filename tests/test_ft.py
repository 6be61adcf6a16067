"""Fine-tuning against a literal transcription in plain torch."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_network
from helpers_baselines import QUIET, assert_same_model, gradients_of, momentum_sgd, passes
from torch import nn

from maskops.purify.baselines import ft


@pytest.mark.parametrize("cosine", [False, True])
def test_ft_is_sgd_on_all_weights(clean_data, cosine):
    images, labels = clean_data[0].double(), clean_data[1]
    model = tiny_network()
    result = ft(model, clean_data, epochs=3, batch_size=8, cosine=cosine, **QUIET)

    expected = copy.deepcopy(model).train()
    parameters = list(expected.parameters())
    step = momentum_sgd(parameters, 0.01, 0.9, 5e-4)
    for epoch, batches in enumerate(passes(3)):
        for batch in batches:
            loss = F.cross_entropy(expected(images[batch]), labels[batch])
            step(gradients_of(loss, parameters), (1 + math.cos(math.pi * epoch / 3)) / 2 if cosine else 1)
    assert_same_model(result.model, expected)


def test_ft_draws_a_number_of_steps_with_replacement(clean_data):
    images, labels = clean_data[0].double(), clean_data[1]
    model = tiny_network()
    result = ft(model, clean_data, epochs=1, steps=4, batch_size=8, **QUIET)
    expected = copy.deepcopy(model).train()
    parameters = list(expected.parameters())
    step = momentum_sgd(parameters, 0.01, 0.9, 5e-4)
    for batch in torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(3)):
        step(gradients_of(F.cross_entropy(expected(images[batch]), labels[batch]), parameters))
    assert_same_model(result.model, expected)


def test_a_last_batch_of_one_image_is_left_out(clean_data):
    images, labels = clean_data
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    result = ft(model, (images[:17], labels[:17]), epochs=1, batch_size=16, **QUIET)
    assert int(result.model[2].num_batches_tracked) == 1
