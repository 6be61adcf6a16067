"""LIRA: an autoencoder that learns a small change of each image, against the network that it is to fool."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops.backdoor.generators._campaign import Batch, Campaign, Forward, Shares
from maskops.backdoor.generators._networks import LearnedTrigger, autoencoder, seeded


class LIRATrigger(LearnedTrigger):
    """``clip(x + epsilon * tanh(g(x)), 0, 1)``, with an autoencoder g."""

    def __init__(self, channels: int, image_size: tuple[int, int], epsilon: float, width: int) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.network = autoencoder(channels, channels, image_size, width)

    def triggered(self, images: Tensor) -> Tensor:
        return (images + self.epsilon * self.network(images).tanh()).clamp(0, 1)


@dataclass(frozen=True)
class LIRA:
    """Learner of the trigger of LIRA, in two stages of one training.

    First the autoencoder g and the network f take turns: g steps on CE(f(x'), t), f on clean images beside as many
    attacked ones; those come from a copy of g that is brought up to date after each epoch. Then g is frozen, and f goes
    on alone. As published, f is in training mode in both kinds of step, so that its batch norms see all these images.

    epsilon:     largest change of a pixel, in pixel units (the published code has 0.01 in units of normalised images)
    lr:          of Adam, for g
    first_stage: its share of the epochs; BackdoorBench trains 50 epochs of 150
    width:       channels of the autoencoder, which is ours
    source: Doan et al. 2021, algorithm 1. The gradient of g's step never reaches f; in the published code f's optimiser
            gets it, too.
    """

    epsilon: float = 0.01
    lr: float = 1e-4
    first_stage: float = 1 / 3
    width: int = 16

    def __post_init__(self) -> None:
        if not (0 < self.epsilon <= 1 and 0 < self.first_stage <= 1 and self.lr > 0 and self.width > 0):
            raise ValueError(f"LIRA: epsilon and first_stage in (0, 1], lr and width above 0 expected; got {self}")

    def fit(self, images: Tensor, generator: torch.Generator) -> LIRATrigger:
        """A trigger as it is initialised: all that it learns, it learns from the network."""
        with seeded(generator):
            trigger = LIRATrigger(images.shape[1], tuple(images.shape[2:]), self.epsilon, self.width)
        return trigger.to(images.device)

    def campaign(self, trigger: LIRATrigger, images: Tensor, labels: Tensor, shares: Shares) -> LIRACampaign:
        return LIRACampaign(self, trigger, images, labels, shares)


class LIRACampaign(Campaign):
    """Alternating training of the victim and the autoencoder, then the victim's alone."""

    def __init__(self, settings: LIRA, trigger: LIRATrigger, images: Tensor, labels: Tensor, shares: Shares) -> None:
        super().__init__(images, labels, trigger)
        self._settings, self._shares = settings, shares
        self._learning: LIRATrigger | None = copy.deepcopy(trigger)
        self._optimizer = torch.optim.Adam(self._learning.parameters(), settings.lr)
        trigger.freeze()

    def batch(self, forward: Forward, images: Tensor, labels: Tensor, generator: torch.Generator) -> Batch:
        if self._learning is not None:
            self._step_of_autoencoder(forward, images, self._shares.targets[labels])
        poisoned, _ = self._shares.counts(len(labels))
        attacked = self._trigger(images[:poisoned])
        return Batch(torch.cat((images, attacked)), torch.cat((labels, self._shares.targets[labels[:poisoned]])))

    def _step_of_autoencoder(self, forward: Forward, images: Tensor, targets: Tensor) -> None:
        self._learning.train()
        loss = F.cross_entropy(forward(self._learning.triggered(images)), targets)
        parameters = list(self._learning.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self._optimizer.step()

    def end_epoch(self, done: float) -> None:
        if self._learning is None:
            return
        self._trigger.load_state_dict(self._learning.state_dict())
        # 1e-6: shares of epochs are rounded
        if done + 1e-6 >= self._settings.first_stage:
            self._learning = None
