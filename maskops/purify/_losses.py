"""The losses of a run on batches of images, and what their gradients add."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops.augment import Mixed
from maskops.purify._distributed import Part, Team
from maskops.purify._parts import Parts

Branch = tuple[float, Tensor, Tensor]
"""A factor, images and labels: a summand of a loss."""


class Losses:
    """Cross entropies of a model on batches, and their gradients: what this process's rows add to those of a batch.

    A batch goes through the model in parts, whose gradients add up; a call in which memory runs out begins anew.

    team:      the processes of the run
    parts:     of batches
    logits:    of images, plus a trigger unless that is None
    perturbed: within this context they are those of the perturbed model
    last:      within this context is the last backward of a call that adds gradients, with its forward
    clear:     makes the gradients of what is learned zero, as they are before each call
    mixes:     whether the model computes with the statistics of its batch
    """

    def __init__(
        self,
        team: Team,
        parts: Parts,
        logits: Callable[[Tensor, Tensor | None], Tensor],
        perturbed: Callable[[], AbstractContextManager[object]],
        last: Callable[[], AbstractContextManager[object]],
        clear: Callable[[], None],
        mixes: bool,
    ) -> None:
        self._team, self._parts, self._logits = team, parts, logits
        self._perturbed, self._last, self._clear, self._mixes = perturbed, last, clear, mixes
        self._weights_of: dict[tuple[tuple[float, ...], tuple[int, ...]], Tensor] = {}

    def descend(
        self, *branches: Branch, together: Callable[[], bool] = lambda: False, perturbed: Branch | None = None
    ) -> list[Tensor]:
        """Add the gradient of ``sum(factor * cross_entropy(f(images), labels))`` over the branches to what is learned.

        together:  whether to run them as one batch, which takes fewer, larger launches and twice the activations; not
                   done where the model computes with the statistics of its batch
        perturbed: one more branch, at the perturbed weights
        returns:   the cross entropies, detached
        """

        def compute() -> list[Tensor]:
            groups = [branches] if together() and not self._mixes else [(branch,) for branch in branches]
            *others, end = groups if perturbed is None else [*groups, (perturbed,)]
            losses = [loss for group in others for loss in self._descend(*group)]
            with nullcontext() if perturbed is None else self._perturbed():
                return losses + self._descend(*end, last=self._last)

        return self._parts.attempt(compute, self._clear)

    def _descend(
        self, *branches: Branch, last: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> list[Tensor]:
        parts = [self._team.part(len(images)) for _, images, _ in branches]
        own = [
            (factor * part.share, part.of(images), part.of(labels))
            for part, (factor, images, labels) in zip(parts, branches, strict=True)
        ]
        factors, images, labels = zip(*own, strict=True)
        sizes = tuple(map(len, images))
        images, labels = _joined(images), _joined(labels)

        def loss(logits: Tensor, rows: slice) -> Tensor:
            return F.cross_entropy(logits, labels[rows], reduction="none")

        of_branches = self._add(images, loss, self._weights(images, factors, sizes), parts[0], last).split(sizes)
        return [part.scaled(each.mean()) for part, each in zip(parts, of_branches, strict=True)]

    def descend_mixed(self, mixed: Mixed) -> Tensor:
        """Add the gradient of the loss of mixed images to what is learned; returns the loss, detached."""
        part = self._team.part(len(mixed.images))
        images, *targets = (part.of(each) for each in (mixed.images, mixed.labels, mixed.other_labels))

        def loss(logits: Tensor, rows: slice) -> Tensor:
            own, other = (F.cross_entropy(logits, labels[rows], reduction="none") for labels in targets)
            return mixed.weight * own + (1 - mixed.weight) * other

        weights = self._weights(images, (part.share,), (len(images),))
        of_each_image = self._parts.attempt(lambda: self._add(images, loss, weights, part, self._last), self._clear)
        return part.scaled(of_each_image.mean())

    def trigger_gradient(self, images: Tensor, labels: Tensor, trigger: Tensor) -> tuple[Tensor, Tensor]:
        """The cross entropy of images with the trigger, detached, and its gradient by the trigger."""
        part = self._team.part(len(images))
        images, labels = part.of(images), part.of(labels)
        weights = self._weights(images, (part.share,), (len(images),))

        def compute() -> tuple[Tensor, Tensor]:
            losses, gradients = torch.empty_like(weights), []
            for rows in self._parts.of(len(images)):
                with self._team.whole_batch(part):
                    logits = self._logits(images[rows], trigger)
                of_each_image = F.cross_entropy(logits, labels[rows], reduction="none")
                gradients += torch.autograd.grad(of_each_image, trigger, weights[rows])
                losses[rows] = of_each_image.detach()
            return part.scaled(losses.mean()), reduce(torch.add, gradients)

        return self._parts.attempt(compute, lambda: None)

    def _add(
        self,
        images: Tensor,
        loss: Callable[[Tensor, slice], Tensor],
        weights: Tensor,
        part: Part,
        last: Callable[[], AbstractContextManager[object]],
    ) -> Tensor:
        """Add the gradient of a weighted sum of the images' losses to what is learned; returns these losses.

        last: a context for the last part
        """
        losses = torch.empty_like(weights)
        *others, end = self._parts.of(len(images))
        for rows in (*others, end):
            with last() if rows is end else nullcontext():
                with self._team.whole_batch(part):
                    logits = self._logits(images[rows], None)
                of_each_image = loss(logits, rows)
                of_each_image.backward(weights[rows])
            losses[rows] = of_each_image.detach()
        return losses

    def _weights(self, images: Tensor, factors: tuple[float, ...], sizes: tuple[int, ...]) -> Tensor:
        """What each image's loss counts in ``sum(factor * mean over the branch)``."""
        key = factors, sizes
        if key not in self._weights_of:
            weights = [factor / size for factor, size in zip(*key, strict=True) for _ in range(size)]
            self._weights_of[key] = torch.tensor(weights, dtype=images.dtype, device=images.device)
        return self._weights_of[key]


def _joined(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
