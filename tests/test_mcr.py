"""MCR against a literal transcription in plain torch."""

import copy

import torch
import torch.nn.functional as F
from helpers import tiny_network
from helpers_baselines import QUIET, gradients_of, momentum_sgd, passes

from maskops.purify.baselines import ft, mcr


def channel_mean(x):
    return x.mean((0, 2, 3))


def channel_variance(x):
    return x.var((0, 2, 3))


def test_mcr_returns_a_point_of_the_curve_with_its_own_statistics(clean_data):
    images, labels = clean_data[0].double(), clean_data[1]
    model = tiny_network()
    result = mcr(model, clean_data, epochs=3, end_epochs=2, batch_size=8, t=0.3, lr=0.02, **QUIET)

    generator = torch.Generator().manual_seed(3)
    end = copy.deepcopy(model).train()
    parameters = list(end.parameters())
    step = momentum_sgd(parameters, 0.01, 0.9, 5e-4)
    for batches in passes(2, generator=generator):
        for batch in batches:
            step(gradients_of(F.cross_entropy(end(images[batch]), labels[batch]), parameters))

    names = [name for name, _ in model.named_parameters()]
    first, last = ([p.detach() for p in each.parameters()] for each in (model, end))
    inner = [((a + b) / 2).requires_grad_() for a, b in zip(first, last, strict=True)]
    at = copy.deepcopy(model).train()
    step = momentum_sgd(inner, 0.02, 0.9, 0)

    def curve(t):
        return [(1 - t) ** 2 * a + 2 * t * (1 - t) * m + t**2 * b for a, m, b in zip(first, inner, last, strict=True)]

    for _ in range(3):
        for batch in torch.randperm(20, generator=generator).split(8):
            weights = curve(torch.rand((), generator=generator).item())
            logits = torch.func.functional_call(at, dict(zip(names, weights, strict=True)), (images[batch],))
            decay = 5e-4 / 2 * sum(weight.square().sum() for weight in weights)
            step(gradients_of(F.cross_entropy(logits, labels[batch]) + decay, inner))
    for parameter, weight in zip(at.parameters(), curve(0.3), strict=True):
        parameter.data.copy_(weight.detach())

    statistics = []
    handle = at[1].register_forward_hook(lambda module, inputs, output: statistics.append(inputs[0]))
    for part in images.split(8):
        at(part)
    handle.remove()
    found = result.model[1]
    means, variances = (sum(len(x) / 20 * of(x) for x in statistics) for of in (channel_mean, channel_variance))
    torch.testing.assert_close(found.running_mean, means)
    torch.testing.assert_close(found.running_var, variances)
    for value, weight in zip(result.model.parameters(), at.parameters(), strict=True):
        torch.testing.assert_close(value, weight, rtol=1e-8, atol=1e-9)
    assert found.momentum == 0.1


def test_mcr_begins_at_the_given_model_and_ends_at_its_fine_tuned_copy(clean_data):
    model = tiny_network()
    tuned = ft(model, clean_data, epochs=2, **QUIET).model
    for t, expected in ((0.0, model), (1.0, tuned)):
        found = mcr(model, clean_data, end_epochs=2, epochs=1, t=t, **QUIET).model
        for value, other in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(value, other)
