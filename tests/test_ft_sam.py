"""FT-SAM against a literal transcription in plain torch."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_network
from helpers_baselines import QUIET, assert_same_model, gradients_of, momentum_sgd, passes

from maskops.purify.baselines import ft_sam


@pytest.mark.parametrize(("eta", "cosine_steps"), [(0.01, None), (0.0, 2)])
def test_ft_sam_takes_the_steps_of_adaptive_sam(clean_data, eta, cosine_steps):
    images, labels = clean_data[0].double(), clean_data[1]
    model = tiny_network()
    options = {"rho": 0.3, "eta": eta, "cosine_steps": cosine_steps}
    result = ft_sam(model, clean_data, epochs=2, batch_size=8, **options, **QUIET)

    expected = copy.deepcopy(model).train()
    parameters = list(expected.parameters())
    step = momentum_sgd(parameters, 0.01, 0.9, 5e-4)
    steps = 0
    for epoch, batches in enumerate(passes(2)):
        for batch in batches:
            x, y = images[batch], labels[batch]
            loss = F.cross_entropy(expected(x), y, label_smoothing=0.1)
            gradients = gradients_of(loss, parameters)
            scaled = [(p.detach().abs() + eta) * g for p, g in zip(parameters, gradients, strict=True)]
            norm = torch.cat([each.flatten() for each in scaled]).norm()
            # its running statistics are thrown away
            moved = copy.deepcopy(expected)
            for p, s in zip(moved.parameters(), scaled, strict=True):
                p.data += 0.3 * (p.data.abs() + eta) * s / norm
            worst = F.cross_entropy(moved(x), y, label_smoothing=0.1)
            share = epoch / 2 if cosine_steps is None else steps / cosine_steps
            step(gradients_of(worst, list(moved.parameters())), (1 + math.cos(math.pi * share)) / 2)
            steps += 1
    assert_same_model(result.model, expected)
    assert int(result.model[1].num_batches_tracked) == steps
