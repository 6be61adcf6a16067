"""ANP and NFT as their authors published them, and what plain PyTorch can make of them: masks on batch norms.

Written afresh after ``optimize_mask_cifar.py`` and ``models/anp_batchnorm.py`` of the ANP repository, and after
``Remove_Backdoor.py`` of NFT's, whose loop stops at its first batch and is made to run here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from benchmarks.problem import EPSILON, Draws, Problem, result
from benchmarks.published import fastest_float32
from benchmarks.variants import compiled

ANP_ALPHA, ANP_LR, ANP_MOMENTUM = 0.2, 0.2, 0.9
NFT_LR, NFT_MOMENTUM = 0.05, 0.95
ETA = 1e-3 / 50
"""Weight of NFT's Σ|1 - m|, as published for 50 images of each class."""
FLOOR, FLOOR_DECAY = 0.8, 0.5
"""NFT's masks stay above ``FLOOR * exp(-FLOOR_DECAY * l)``, for the l-th mask."""


class NoisyBatchNorm2d(nn.BatchNorm2d):
    """ANP's published layer: products with masks and noise anew in every forward, in train mode."""

    perturbed = False

    def forward(self, input: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        scale, shift = self.neuron_mask, 1.0
        if self.perturbed:
            scale, shift = scale + self.neuron_noise, 1.0 + self.neuron_noise_bias
        statistics = self.running_mean, self.running_var
        return F.batch_norm(input, *statistics, self.weight * scale, self.bias * shift, True, self.momentum, self.eps)


class LeanNoisyBatchNorm2d(NoisyBatchNorm2d):
    """Without running statistics, which nothing reads."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight * self.neuron_mask, self.bias
        if self.perturbed:
            weight = self.weight * (self.neuron_mask + self.neuron_noise)
            bias = self.bias * (1.0 + self.neuron_noise_bias)
        return F.batch_norm(input, None, None, weight, bias, True, self.momentum, self.eps)


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """NFT's published layer."""

    def forward(self, input: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var
        weight = self.weight * self.neuron_mask
        return F.batch_norm(input, *statistics, weight, self.bias, True, self.momentum, self.eps)


class _Neurons:
    """What both have in common: a network in train mode, masks on its norms, SGD."""

    memory_format = torch.contiguous_format
    layer: type[nn.BatchNorm2d]
    lr: float
    momentum: float
    inject = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.batches = problem.batches(self.memory_format)
        self.model = copy.deepcopy(problem.model).train().to(memory_format=self.memory_format)
        self.norms = {name: self.model.get_submodule(name) for name in self._names(problem)}
        self.masks = {name: self._mask(norm) for name, norm in self.norms.items()}
        self.descent = torch.optim.SGD(self.masks.values(), lr=self.lr, momentum=self.momentum)
        self.total = 0.0

    def _names(self, problem: Problem) -> list[str]:
        return list(problem.masks)

    def _mask(self, norm: nn.BatchNorm2d) -> Parameter:
        norm.__class__ = self.layer
        norm.neuron_mask = Parameter(torch.ones_like(norm.weight))
        return norm.neuron_mask

    @torch.no_grad()
    def reset(self) -> None:
        for name, mask in self.masks.items():
            mask.copy_(self.problem.masks[name])
            self.descent.state[mask]["momentum_buffer"] = torch.zeros_like(mask)

    def logits(self, images: Tensor) -> Tensor:
        return self.model(images)

    def result(self) -> dict[str, Tensor]:
        return result(None, self.masks)

    def constants(self) -> Iterable[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]


def signs(name: str, noise: tuple[Tensor, Tensor], draws: Draws) -> dict[str, Tensor]:
    """Where a norm's noise has moved from what was drawn, by a name that no mask has."""
    return {
        f"{name}, sign of {what}": (after - before).sign()
        for what, after, before in zip(("noise", "noise on biases"), noise, draws.noise[name], strict=True)
    }


class OfficialANP(_Neurons):
    """ANP as its authors published it: float32, eager, three forwards and two backwards, nothing frozen."""

    layer = NoisyBatchNorm2d
    lr, momentum = ANP_LR, ANP_MOMENTUM

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        noise = [noise for norm in self.norms.values() for noise in (norm.neuron_noise, norm.neuron_noise_bias)]
        self.ascent = torch.optim.SGD(noise, lr=EPSILON)
        self.signs: dict[str, Tensor] = {}

    def _mask(self, norm: nn.BatchNorm2d) -> Parameter:
        for name in ("neuron_noise", "neuron_noise_bias"):
            setattr(norm, name, Parameter(torch.zeros_like(norm.weight)))
        return super()._mask(norm)

    @torch.no_grad()
    def _draw(self) -> None:
        for name, norm in self.norms.items():
            for index, noise in enumerate((norm.neuron_noise, norm.neuron_noise_bias)):
                if self.inject:
                    noise.copy_(self.problem.draws.noise[name][index])
                else:
                    noise.uniform_(-EPSILON, EPSILON)

    def result(self) -> dict[str, Tensor]:
        return super().result() | self.signs

    def _perturb(self, perturbed: bool) -> None:
        for norm in self.norms.values():
            norm.perturbed = perturbed

    def step(self, index: int = 0) -> None:
        images, labels = self.batches[index]
        self._draw()
        self._ascend(images, labels)
        self.descent.zero_grad()
        self._perturb(True)
        perturbed_loss = F.cross_entropy(self.logits(images), labels)
        self._perturb(False)
        logits = self.logits(images)
        loss = ANP_ALPHA * F.cross_entropy(logits, labels) + (1 - ANP_ALPHA) * perturbed_loss
        self._look_at(logits, labels, loss)
        loss.backward()
        self.descent.step()
        with torch.no_grad():
            for mask in self.masks.values():
                mask.clamp_(0, 1)

    def _ascend(self, images: Tensor, labels: Tensor) -> None:
        self.ascent.zero_grad()
        self._perturb(True)
        (-F.cross_entropy(self.logits(images), labels)).backward()
        for noise in self.ascent.param_groups[0]["params"]:
            noise.grad = noise.grad.sign()
        self.ascent.step()
        if self.inject:
            self._compare_noise()

    @torch.no_grad()
    def _compare_noise(self) -> None:
        for name, norm in self.norms.items():
            noise = norm.neuron_noise, norm.neuron_noise_bias
            self.signs |= signs(name, noise, self.problem.draws)
            for each, moved in zip(noise, self.problem.draws.moved[name], strict=True):
                each.copy_(moved)

    def _look_at(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        self.correct = logits.detach().argmax(1).eq(labels).sum()
        self.total += loss.item()


class LeanANP(OfficialANP):
    """Without what nothing reads: no gradient of a weight, no running statistics, no waiting for numbers."""

    layer = LeanNoisyBatchNorm2d

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.model.requires_grad_(False)

    def _learn(self, masks: bool) -> None:
        for norm in self.norms.values():
            norm.neuron_mask.requires_grad_(masks)
            norm.neuron_noise.requires_grad_(not masks)
            norm.neuron_noise_bias.requires_grad_(not masks)

    def _ascend(self, images: Tensor, labels: Tensor) -> None:
        self._learn(masks=False)
        super()._ascend(images, labels)
        self._learn(masks=True)

    def _look_at(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        pass


class _Low(_Neurons):
    """channels_last, in the problem's dtype by autocast, and with the fastest that cuDNN has."""

    memory_format = torch.channels_last

    def logits(self, images: Tensor) -> Tensor:
        dtype = self.problem.dtype
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.model(images).float()

    @fastest_float32()
    def step(self, index: int = 0) -> None:
        super().step(index)


class CarefulANP(_Low, LeanANP):
    """Lean, channels_last and in the problem's dtype."""


class CompiledANP(CarefulANP):
    """The careful procedure over ``torch.compile``."""

    compiles = "compilation"
    counts_as = "careful"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.logits = compiled(super().logits)


class OfficialNFT(_Neurons):
    """NFT as its authors published it: float32, eager, nothing frozen; the first norm isn't masked."""

    layer = MaskedBatchNorm2d
    lr, momentum = NFT_LR, NFT_MOMENTUM

    def _names(self, problem: Problem) -> list[str]:
        return list(problem.masks)[1:]

    def _mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
        if self.inject:
            weight, order = self.problem.draws.weight, self.problem.draws.order
        else:
            weight, order = float(np.random.beta(1, 1)), torch.randperm(len(images)).to(images.device)
        return weight * images + (1 - weight) * images[order], labels[order], weight

    def step(self, index: int = 0) -> None:
        images, labels = self.batches[index]
        mixed, others, weight = self._mix(images, labels)
        logits = self.logits(mixed)
        loss = weight * F.cross_entropy(logits, labels) + (1 - weight) * F.cross_entropy(logits, others)
        loss = loss + ETA * sum((1 - mask).abs().sum() for mask in self.masks.values())
        self._look_at(logits, labels, others, weight, loss)
        self.descent.zero_grad()
        loss.backward()
        self.descent.step()
        with torch.no_grad():
            for place, mask in enumerate(self.masks.values(), start=1):
                mask.clamp_(FLOOR * math.exp(-FLOOR_DECAY * place), 1)

    def _look_at(self, logits: Tensor, labels: Tensor, others: Tensor, weight: float, loss: Tensor) -> None:
        predicted = logits.detach().argmax(1)
        self.correct = weight * predicted.eq(labels).cpu().sum() + (1 - weight) * predicted.eq(others).cpu().sum()
        self.total += loss.item()


class LeanNFT(OfficialNFT):
    """Without what nothing reads: no gradient of a weight, no waiting for numbers."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.model.requires_grad_(False)
        for mask in self.masks.values():
            mask.requires_grad_(True)

    def _look_at(self, logits: Tensor, labels: Tensor, others: Tensor, weight: float, loss: Tensor) -> None:
        pass


class CarefulNFT(_Low, LeanNFT):
    """Lean, channels_last and in the problem's dtype."""


class CompiledNFT(CarefulNFT):
    """The careful procedure over ``torch.compile``."""

    compiles = "compilation"
    counts_as = "careful"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.logits = compiled(super().logits)
