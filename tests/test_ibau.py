"""I-BAU against a literal transcription in plain torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers_baselines import QUIET, assert_same_model
from torch import nn

from maskops.purify.baselines import ibau


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_ibau_takes_the_steps_of_the_implicit_hypergradient(clean_data, preset):
    """The fixed-point iteration, here with Jacobians written out: dO/dθ + (dφ/dθ)ᵀ Σ (dφ/dδ)ᵀᵏ dO/dδ."""
    images, labels = clean_data[0].double(), clean_data[1]
    # smooth, so that second derivatives aren't zero
    layers = [nn.Conv2d(2, 3, 3, stride=2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)]
    model = nn.Sequential(*layers).double()
    result = ibau(model, clean_data, preset=preset, epochs=2, batch_size=10, terms=3, radius=0.5, **QUIET)

    official = preset == "official"
    expected = copy.deepcopy(model).eval()
    parameters = list(expected.parameters())
    adam = torch.optim.Adam(parameters, lr=1e-3)
    generator = torch.Generator().manual_seed(3)
    batches = [(images[:10], labels[:10]), (images[10:], labels[10:])]
    for _ in range(2):
        delta = torch.zeros(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
        for x, y in batches:
            y = expected(x).argmax(1) if official else y
            loss = -F.cross_entropy(expected(x + delta), y) + (
                0.001 * delta.norm() ** 2 if official and delta.any() else 0
            )
            delta = delta - 10 * torch.autograd.grad(loss, delta)[0]
            if not official:
                delta = delta * min(1, 0.5 / delta.norm().item())
            delta = delta.detach().requires_grad_()
        for x, y in batches:
            chosen = torch.randperm(10, generator=generator)[: 1 if official else 10]
            patch = torch.zeros(10, 1, 1, 1, dtype=torch.float64)
            patch[chosen] = 1
            inner_x, inner_y = batches[0] if official else (x, y)

            def phi(delta, *_, inner_x=inner_x, inner_y=inner_y):
                loss = -F.cross_entropy(expected(inner_x + delta), inner_y)
                loss = loss + (0.001 * delta.square().sum() if official else 0)
                return delta - 0.1 * torch.autograd.grad(loss, delta, create_graph=True)[0]

            outer = F.cross_entropy(expected(x + patch * delta), y)
            in_delta, *direct = torch.autograd.grad(outer, [delta, *parameters])
            jacobian = torch.autograd.functional.jacobian(phi, delta).view(128, 128)
            v = sum(torch.matrix_power(jacobian.T, k) @ in_delta.flatten() for k in range(3)).view_as(delta)
            through = torch.autograd.grad(phi(delta), parameters, v, materialize_grads=True)
            for parameter, a, b in zip(parameters, direct, through, strict=True):
                parameter.grad = a + b
            adam.step()
    torch.testing.assert_close(result.trigger, delta.detach(), rtol=1e-8, atol=1e-10)
    assert_same_model(result.model, expected)
