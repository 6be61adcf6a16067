"""The two problems of I-BAU, in one trigger for all images. Options are those of :class:`ibau.IBAUOptions`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops.purify._loop import Run
from maskops.purify._working import PixelModel
from maskops.purify.baselines._hypergradient import Objective

Batch = tuple[Tensor, Tensor]


def ascended(run: Run, model: PixelModel, batches: list[Batch], options: Any) -> Tensor:
    """The trigger that gradient ascent finds."""
    trigger = torch.zeros_like(run.images[:1])
    for step in range(options.inner_steps):
        images, labels = batches[step % len(batches)]
        if options.inner_labels == "predicted":
            with torch.no_grad():
                labels = model(images).argmax(1)
        trigger.requires_grad_()
        loss = inner_objective(model, (images, labels), options)(trigger)
        (gradient,) = torch.autograd.grad(loss, trigger)
        trigger = trigger.detach() - options.inner_lr * gradient
        if options.project:
            trigger = trigger * (options.radius / trigger.norm().clamp_min(options.radius or 1))
        run.note("inner loss", -loss)
    return trigger


def inner_objective(model: PixelModel, batch: Batch, options: Any) -> Objective:
    images, labels = batch
    return lambda trigger: options.penalty * trigger.square().sum() - F.cross_entropy(model(images + trigger), labels)


def outer_objective(run: Run, model: PixelModel, batch: Batch, options: Any) -> Objective:
    images, labels = batch
    carriers = torch.zeros(len(images), 1, 1, 1, dtype=images.dtype)
    count = max(1, round(options.share * len(images)))
    carriers[torch.randperm(len(images), generator=run.generator)[:count]] = 1
    carriers = carriers.to(images.device)
    return lambda trigger: F.cross_entropy(model(images + carriers * trigger), labels)
