"""Input-aware dynamic backdoor: one network draws the trigger of an image, another says where it goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops.backdoor.generators._campaign import Batch, Campaign, Forward, Shares
from maskops.backdoor.generators._networks import LearnedTrigger, autoencoder, random_batches, seeded


class IABTrigger(LearnedTrigger):
    """``x + (p(x) - x) * m(x)``, with p and m in [0, 1] from a pattern and a mask network; m has one channel."""

    def __init__(self, channels: int, image_size: tuple[int, int], width: int) -> None:
        super().__init__()
        self.mask_network = autoencoder(channels, 1, image_size, width)
        self.pattern_network = autoencoder(channels, channels, image_size, width)

    def mask(self, images: Tensor) -> Tensor:
        """Nearly binary: m = tanh(20 s - 10) / 2 + 1/2, of s in [0, 1]."""
        return _to_unit(20 * _to_unit(self.mask_network(images)) - 10)

    def pattern(self, images: Tensor) -> Tensor:
        return _to_unit(self.pattern_network(images))

    def triggered(self, images: Tensor) -> Tensor:
        return images.lerp(self.pattern(images), self.mask(images))


@dataclass(frozen=True)
class IAB:
    """Learner of the trigger of IAB, also known as Dynamic.

    The mask network is trained first, to be sparse and to differ between images. The pattern network is trained
    together with the victim, on the victim's loss and for diversity: images that differ get patterns that differ. The
    decoys are cross triggers: the trigger that belongs to another image, under the true label.

    density:            share of the pixels that the mask may cover for free
    diversity, sparsity: weights of the two losses
    lr:                 of Adam with betas 0.5 and 0.9, for both networks; for patterns it falls linearly to 0
    mask_steps, batch_size: length of the mask's training
    width:              channels of the networks, which are ours
    source: Nguyen & Tran 2020 and its code; there the mask network trains for 25 epochs, the pattern network for 600
    """

    density: float = 0.032
    diversity: float = 1.0
    sparsity: float = 100.0
    lr: float = 0.01
    mask_steps: int = 2000
    batch_size: int = 128
    width: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.density < 1 or self.mask_steps < 1 or self.batch_size < 2 or self.width < 1 or self.lr <= 0:
            raise ValueError(f"IAB: density in (0, 1), lr > 0, steps and width > 0, batches of 2 expected; got {self}")

    def fit(self, images: Tensor, generator: torch.Generator) -> IABTrigger:
        """A trigger with a trained mask network, frozen, and a pattern network as it was initialised."""
        with seeded(generator):
            trigger = IABTrigger(images.shape[1], tuple(images.shape[2:]), self.width).to(images.device)
        optimizer = torch.optim.Adam(trigger.mask_network.parameters(), self.lr, betas=(0.5, 0.9))
        trigger.mask_network.train()
        for batch in random_batches(images, self.mask_steps, self.batch_size, generator):
            masks = trigger.mask(batch)
            excess = (masks - self.density).relu().mean()
            same = _sameness(batch, batch.roll(1, 0), masks, masks.roll(1, 0))
            loss = self.sparsity * excess + self.diversity * same
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trigger.mask_network.eval().requires_grad_(False)
        return trigger

    def campaign(self, trigger: IABTrigger, images: Tensor, labels: Tensor, shares: Shares) -> IABCampaign:
        return IABCampaign(self, trigger, images, labels, shares)


class IABCampaign(Campaign):
    """Joint training of the victim and the pattern network, on the same loss."""

    def __init__(self, settings: IAB, trigger: IABTrigger, images: Tensor, labels: Tensor, shares: Shares) -> None:
        super().__init__(images, labels, trigger)
        self._settings, self._shares = settings, shares
        self._optimizer = torch.optim.Adam(trigger.pattern_network.parameters(), settings.lr, betas=(0.5, 0.9))

    def batch(self, forward: Forward, images: Tensor, labels: Tensor, generator: torch.Generator) -> Batch:
        trigger = self._trigger
        poisoned, decoys = self._shares.counts(len(labels))
        # the batch is in random order: those that come next are any other images
        strangers = images.roll(-decoys, 0)[poisoned : poisoned + decoys]
        sources = torch.cat((images[:poisoned], strangers))
        trigger.pattern_network.train()
        patterns, masks = trigger.pattern(sources), trigger.mask(sources)
        stamped = images[: poisoned + decoys].lerp(patterns, masks)
        pairs = min(poisoned, decoys)
        first, second = slice(0, pairs), slice(poisoned, poisoned + pairs)
        same = _sameness(sources[first], sources[second], patterns[first], patterns[second]) if pairs else None
        return Batch(
            torch.cat((stamped, images[poisoned + decoys :])),
            torch.cat((self._shares.targets[labels[:poisoned]], labels[poisoned:])),
            None if same is None else self._settings.diversity * same,
        )

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    def end_epoch(self, done: float) -> None:
        self._optimizer.param_groups[0]["lr"] = self._settings.lr * (1 - done)

    def finish(self) -> IABTrigger:
        return self._trigger.freeze()


def _to_unit(values: Tensor) -> Tensor:
    return values.tanh() / 2 + 0.5


def _sameness(images: Tensor, others: Tensor, outputs: Tensor, other_outputs: Tensor) -> Tensor:
    """Mean of ``‖x1 - x2‖ / (‖p1 - p2‖ + eps)``, root mean square norms: large where outputs ignore their images."""
    return (_distance(images, others) / (_distance(outputs, other_outputs) + 1e-7)).mean()


def _distance(first: Tensor, second: Tensor) -> Tensor:
    # mse under a square root has no gradient where both are equal
    return F.mse_loss(first, second, reduction="none").flatten(1).mean(1).clamp_min(1e-12).sqrt()
