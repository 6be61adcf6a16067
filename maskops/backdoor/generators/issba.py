"""ISSBA: a fixed secret, hidden in each image by a steganographic encoder, as in StegaStamp."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskops.backdoor.generators._networks import LearnedTrigger, autoencoder, bit_reader, random_batches, seeded


class ISSBATrigger(LearnedTrigger):
    """``clip(x + r(x, s), 0, 1)``, with a residual r of an encoder and a fixed secret s of 0s and 1s.

    secret: (bits,) float32, a buffer
    """

    def __init__(self, channels: int, image_size: tuple[int, int], bits: int, width: int) -> None:
        super().__init__()
        self.register_buffer("secret", torch.zeros(bits))
        self.planes = nn.Linear(bits, image_size[0] * image_size[1])
        self.encoder = autoencoder(channels + 1, channels, image_size, width)
        self.decoder = bit_reader(channels, bits, width)

    def residual(self, images: Tensor, secrets: Tensor) -> Tensor:
        """(N, C, H, W) within ±1, for images (N, C, H, W) and secrets (N, bits) of 0s and 1s."""
        plane = self.planes(secrets - 0.5).view(-1, 1, *images.shape[2:])
        return self.encoder(torch.cat((images - 0.5, plane), dim=1)).tanh()

    def triggered(self, images: Tensor) -> Tensor:
        return (images + self.residual(images, self.secret.expand(len(images), -1))).clamp(0, 1)

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """The secrets that the decoder reads, (N, bits) bool."""
        return self.decoder(images.float()) > 0


@dataclass(frozen=True)
class ISSBA:
    """Learner of the trigger of ISSBA: encoder and decoder train on clean images with random secrets, then freeze.

    The loss is ``BCE(decoder(x'), s) + w * mean((x' - x)²)``; w is 0 in the first quarter of the steps and rises
    linearly to ``invisibility`` over the next two, so that the secret is learned before it is hidden.

    secret_size:  bits; at most one in eight pixels
    invisibility: weight of the residual's mean square
    steps, batch_size, lr: of Adam
    width:        channels of the networks, which are ours
    source: Li et al. 2021 over StegaStamp (Tancik et al. 2020), without StegaStamp's perceptual loss, critic and
            simulated printing; 20 bits are BackdoorBox's choice for 32 x 32 pixels
    """

    secret_size: int = 20
    invisibility: float = 100.0
    steps: int = 3000
    batch_size: int = 64
    lr: float = 1e-3
    width: int = 16

    def __post_init__(self) -> None:
        if min(self.secret_size, self.steps, self.width) < 1 or self.batch_size < 2 or self.lr <= 0:
            raise ValueError(f"ISSBA: secret_size, steps, width, lr > 0 and batches of 2 expected; got {self}")

    def fit(self, images: Tensor, generator: torch.Generator) -> ISSBATrigger:
        """The frozen trigger, with a secret that the generator draws."""
        channels, *image_size = images.shape[1:]
        if 8 * self.secret_size > image_size[0] * image_size[1]:
            raise ValueError(
                f"ISSBA: {self.secret_size} bits need at least {8 * self.secret_size} pixels; got images "
                f"{tuple(images.shape)}"
            )
        with seeded(generator):
            trigger = ISSBATrigger(channels, tuple(image_size), self.secret_size, self.width).to(images.device)
        optimizer = torch.optim.Adam(trigger.parameters(), self.lr)
        trigger.train()
        hidden = self._secrets(self.steps * self.batch_size, generator).to(images.device).split(self.batch_size)
        for step, batch in enumerate(random_batches(images, self.steps, self.batch_size, generator)):
            secrets = hidden[step].float()
            stamped = (batch + trigger.residual(batch, secrets)).clamp(0, 1)
            weight = self.invisibility * min(1.0, max(0.0, 2 * step / self.steps - 0.5))
            loss = F.binary_cross_entropy_with_logits(trigger.decoder(stamped), secrets)
            loss = loss + weight * F.mse_loss(stamped, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trigger.secret.copy_(self._secrets(1, generator)[0])
        return trigger.freeze()

    def _secrets(self, count: int, generator: torch.Generator) -> Tensor:
        shape = (count, self.secret_size)
        return torch.randint(2, shape, generator=generator, device=generator.device, dtype=torch.uint8)
