"""AWM as its authors published it, and what eager PyTorch can make of it.

Written afresh after ``main.py`` and ``models/maskedconv.py`` of the AWM repository.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from benchmarks.problem import ALPHA, BETA, GAMMA, INNER_LR, LR, Problem, adam_state, result
from maskops.purify._precision import precision


class PublishedConv2d(nn.Conv2d):
    """The published masked layer: the product anew in every forward, and noise of full size that nothing reads."""

    def forward(self, input: Tensor) -> Tensor:
        # the published line lacks the bias, which torch has demanded since 1.8
        return self._conv_forward(input, self.mask * self.weight, self.bias)


class PublishedLinear(nn.Linear):
    """The same for the linear layers of transformers, which the published code doesn't mask."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.mask * self.weight, self.bias)


PUBLISHED = {nn.Conv2d: PublishedConv2d, nn.Linear: PublishedLinear}


class Official:
    """AWM as its authors published it: float32, eager, contiguous images, nothing frozen."""

    memory_format = torch.contiguous_format
    retain_graph = True
    begin = None

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.batches = problem.batches(self.memory_format)
        self.model = copy.deepcopy(problem.model)
        self.masks = {name: self._mask(self.model.get_submodule(name)) for name in problem.masks}
        self.model.to(memory_format=self.memory_format)
        self.trigger = torch.zeros_like(problem.trigger).requires_grad_()
        self.ascent = torch.optim.SGD([self.trigger], lr=INNER_LR)
        self.descent = self._optimizer()
        self.correct, self.total = 0, 0.0

    def _mask(self, layer: nn.Module) -> Parameter:
        layer.__class__ = PUBLISHED[type(layer)]
        layer.mask = Parameter(torch.ones_like(layer.weight))
        layer.noise = Parameter(torch.zeros_like(layer.weight))
        return layer.mask

    def _optimizer(self) -> torch.optim.Optimizer:
        # over lists of tensors by itself on a GPU alone
        return torch.optim.Adam(self.masks.values(), lr=LR, foreach=self.problem.as_gpu)

    def _state(self, mask: Parameter) -> dict[str, Tensor]:
        return adam_state(mask)

    @torch.no_grad()
    def reset(self) -> None:
        self.trigger.copy_(self.problem.trigger)
        for name, mask in self.masks.items():
            mask.copy_(self.problem.masks[name])
            state = self.descent.state[mask]
            for key, value in self._state(mask).items():
                # into the same memory, which a CUDA graph reads
                state[key] = state[key].copy_(value) if key in state else value

    def logits(self, images: Tensor) -> Tensor:
        return self.model(images)

    def inner(self, index: int = 0) -> None:
        self.ascend(*self.batches[index])

    def outer(self, index: int = 0) -> None:
        self.descend(*self.batches[index])

    def ascend(self, images: Tensor, _: Tensor) -> None:
        labels = self.logits(images).argmax(1)
        # kept until the next step overwrites them, and with them the graph
        self.perturbed_logits = self.logits(images + self.trigger)
        self.loss = torch.mean(-F.cross_entropy(self.perturbed_logits, labels))
        self.ascent.zero_grad()
        self.loss.backward(retain_graph=self.retain_graph)
        self.ascent.step()

    def descend(self, images: Tensor, labels: Tensor) -> None:
        perturbed = (images + self.trigger.detach()[0]).clamp(0, 1)
        self.descent.zero_grad()
        perturbed_logits, clean_logits = self.logits(perturbed), self.logits(images)
        perturbed_loss, clean_loss = F.cross_entropy(perturbed_logits, labels), F.cross_entropy(clean_logits, labels)
        l1 = sum(mask.abs().sum() for mask in self.masks.values())
        sum(mask.norm() for mask in self.masks.values())  # published, and never used
        self.printed = perturbed_loss.item(), clean_loss.item(), l1.item()
        loss = ALPHA * clean_loss + BETA * perturbed_loss + GAMMA * l1
        self.correct += clean_logits.detach().argmax(1).eq(labels).sum()
        self.total += loss.item()
        loss.backward()
        self.descent.step()
        self._clip()

    @torch.no_grad()
    def _clip(self) -> None:
        for mask in self.masks.values():
            mask.clamp_(0, 1)

    def result(self) -> dict[str, Tensor]:
        return result(self.trigger, self.masks)

    def constants(self) -> Iterable[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]


class Eager(Official):
    """The published procedure, channels_last and in the problem's dtype by autocast."""

    memory_format = torch.channels_last

    def logits(self, images: Tensor) -> Tensor:
        dtype = self.problem.dtype
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.model(images).float()


def adam_on_device(masks: Iterable[Parameter], problem: Problem) -> torch.optim.Optimizer:
    """Adam in one launch or few, which counts its steps on the device."""
    return torch.optim.Adam(masks, lr=LR, fused=True, capturable=problem.device.type == "cuda")


class Lean(Official):
    """The published procedure without its obvious waste: nothing differentiated in vain, labels once per phase, no
    waiting for numbers, a fused Adam.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.model.requires_grad_(False)

    def _mask(self, layer: nn.Module) -> Parameter:
        mask = super()._mask(layer)
        del layer.noise
        return mask

    def _optimizer(self) -> torch.optim.Optimizer:
        return adam_on_device(self.masks.values(), self.problem)

    def _state(self, mask: Parameter) -> dict[str, Tensor]:
        return adam_state(mask, step_device=mask.device)

    def _train_masks(self, train: bool) -> None:
        for mask in self.masks.values():
            mask.requires_grad_(train)

    @torch.no_grad()
    def begin(self) -> None:
        self._train_masks(False)
        images = self.problem.images.contiguous(memory_format=self.memory_format)
        # chunks of one size, which a compiler needs to see only once
        self.labels = torch.cat([self.logits(part).argmax(1) for part in images.chunk(4)])

    def inner(self, index: int = 0) -> None:
        self._train_masks(False)
        images, _ = self.batches[index]
        loss = F.cross_entropy(self.logits(images + self.trigger), self.labels[self.problem.indices[index]])
        (gradient,) = torch.autograd.grad(loss, self.trigger)
        with torch.no_grad():
            self.trigger += INNER_LR * gradient

    def outer(self, index: int = 0) -> None:
        self._train_masks(True)
        images, labels = self.batches[index]
        perturbed = (images + self.trigger.detach()).clamp(0, 1)
        self.descent.zero_grad()
        loss = ALPHA * F.cross_entropy(self.logits(images), labels)
        loss = loss + BETA * F.cross_entropy(self.logits(perturbed), labels)
        loss = loss + GAMMA * sum(mask.abs().sum() for mask in self.masks.values())
        loss.backward()
        self.descent.step()
        self._clip()


class TF32(Lean):
    """Lean, with TF32 in matrix products wherever convolutions have it, and cuDNN's choice by measurement."""

    needs_cuda = True

    def begin(self) -> None:
        with fastest_float32():
            super().begin()

    def inner(self, index: int = 0) -> None:
        with fastest_float32():
            super().inner(index)

    def outer(self, index: int = 0) -> None:
        with fastest_float32():
            super().outer(index)


def fastest_float32() -> AbstractContextManager[None]:
    """Inside, cuDNN measures its ways, and matrix products in float32 are as exact as convolutions, no more."""
    return precision(torch.backends.cudnn.allow_tf32)


class Careful(Eager, TF32):
    """All of that, channels_last and in the problem's dtype by autocast: the best of eager PyTorch."""

    needs_cuda = False
