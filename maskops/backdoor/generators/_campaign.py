"""The hooks by which an attack takes part in a training: all that the training loop knows of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from maskops.backdoor.triggers import Several, Trigger

Forward = Callable[[Tensor], Tensor]
"""Images to float32 logits: the network in training, in the precision of the run."""


class Batch(NamedTuple):
    """What the network trains on in one step: the loss is cross-entropy, plus the penalty where there is one."""

    images: Tensor
    labels: Tensor
    penalty: Tensor | None = None


class Campaign:
    """An attack during one training; this one has poisoned its training set beforehand and does nothing later.

    images, labels: (N, C, H, W), (N,): the training set
    indices:        which of them are poisoned; None where the attack draws anew for each batch
    """

    def __init__(self, images: Tensor, labels: Tensor, trigger: Trigger, indices: Tensor | None = None) -> None:
        self.images, self.labels, self.indices = images, labels, indices
        self._trigger = trigger

    def batch(self, forward: Forward, images: Tensor, labels: Tensor, generator: torch.Generator) -> Batch:
        """What to train on instead of this batch, which comes augmented and in random order."""
        return Batch(images, labels)

    def step(self) -> None:
        """Called when the loss of the batch has been differentiated, and the network has made its step."""

    def end_epoch(self, done: float) -> None:
        """Called after each epoch; done is the share of the training that is over, in (0, 1]."""

    def finish(self) -> Trigger:
        """The trigger to measure with; called once, after the training."""
        return self._trigger


class Shares(NamedTuple):
    """How a training-controlled attack divides each batch.

    targets:          (num_classes,) int64: the label that the attacker wants for each class
    rate, decoy_rate: shares of each batch that carry the trigger, and that are decoys
    """

    targets: Tensor
    rate: float
    decoy_rate: float

    def counts(self, batch_size: int) -> tuple[int, int]:
        """Images with the trigger, and decoys, of one batch: rounded, and together at most the batch."""
        poisoned = round(self.rate * batch_size)
        return poisoned, min(round(self.decoy_rate * batch_size), batch_size - poisoned)


class PerBatch(Campaign):
    """Fixed trigger, victims drawn per batch: its first ``rate`` are poisoned, the next ``decoy_rate`` are decoys.

    As in the code of WaNet: the victims are of any class, so that in all_to_one about 1/C of them keep their label.
    """

    def __init__(self, images: Tensor, labels: Tensor, trigger: Trigger, shares: Shares) -> None:
        super().__init__(images, labels, trigger)
        self._shares = shares

    def batch(self, forward: Forward, images: Tensor, labels: Tensor, generator: torch.Generator) -> Batch:
        poisoned, decoys = self._shares.counts(len(labels))
        victims, others, rest = images.split((poisoned, decoys, len(labels) - poisoned - decoys))
        stamp = self._trigger
        stamped = stamp.divide(victims, generator) if isinstance(stamp, Several) else stamp(victims)
        parts = [stamped, self._trigger.decoys(others, generator) if decoys else others, rest]
        return Batch(torch.cat(parts), torch.cat((self._shares.targets[labels[:poisoned]], labels[poisoned:])))


@runtime_checkable
class Learner(Protocol):
    """Settings of a trigger that has to be learned."""

    def fit(self, images: Tensor, generator: torch.Generator) -> Trigger:
        """What can be learned from the clean images (N, C, H, W) alone, before the network is trained."""
        ...


@runtime_checkable
class JointLearner(Learner, Protocol):
    """Settings of a trigger that is learned together with the network."""

    def campaign(self, trigger: Trigger, images: Tensor, labels: Tensor, shares: Shares) -> Campaign:
        """The campaign that goes on with the trigger that ``fit`` made."""
        ...
