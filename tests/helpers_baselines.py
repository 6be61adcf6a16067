"""What the transcriptions of the baselines share: settings, batches and SGD, in plain torch."""

from __future__ import annotations

import torch

QUIET = {"progress": False, "crop": 0, "flip": False, "seed": 3}


def passes(epochs, count=20, batch=8, seed=3, generator=None):
    """The batches of each epoch: every image once, in random order."""
    generator = generator or torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield torch.randperm(count, generator=generator).split(batch)


def momentum_sgd(parameters, lr, momentum, decay):
    """SGD as its formula says: v <- momentum v + g + decay θ; θ <- θ - lr v. Step by calling it with gradients."""
    velocities = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(gradients, factor=1.0):
        for parameter, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
            velocity.mul_(momentum).add_(gradient + decay * parameter)
            parameter.sub_(factor * lr * velocity)

    return step


def gradients_of(loss, parameters):
    return torch.autograd.grad(loss, parameters)


def assert_same_model(found, expected):
    for (name, value), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        if value.is_floating_point():
            torch.testing.assert_close(
                value, other, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )
