"""The contestants: who computes one inner and one outer step of AWM, and how.

Each is made from a :class:`benchmarks.problem.Problem` and has

    reset()       go back to the problem's masks and trigger
    begin()       what a phase of ``STEPS`` inner steps does once, or None
    inner(index)  one ascent step of the trigger on a batch
    outer(index)  one descent step of the masks on a batch
    result()      the trigger and the masks as they now are, by name
    constants()   the tensors that are there anyway: what autograd saves of them costs nothing
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.problem import ALPHA, BETA, GAMMA, INNER_LR, LR, SECOND_MOMENT, Problem
from maskops.optim import MaskAdam
from maskops.purify._loop import Run, Setting
from maskops.purify.awm import PRESETS, _ascend


class PublishedConv2d(nn.Conv2d):
    """The published masked layer: the product anew in every forward, and noise of full size that nothing reads."""

    def forward(self, input: Tensor) -> Tensor:
        # the published line lacks the bias, which torch has demanded since 1.8
        return self._conv_forward(input, self.mask * self.weight, self.bias)


class Official:
    """AWM as its authors published it: float32, eager, contiguous images, nothing frozen."""

    memory_format = torch.contiguous_format
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

    def _mask(self, layer: nn.Conv2d) -> Parameter:
        layer.__class__ = PublishedConv2d
        layer.mask = Parameter(torch.ones_like(layer.weight))
        layer.noise = Parameter(torch.zeros_like(layer.weight))
        return layer.mask

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.masks.values(), lr=LR)

    @torch.no_grad()
    def reset(self) -> None:
        self.trigger.copy_(self.problem.trigger)
        for name, mask in self.masks.items():
            mask.copy_(self.problem.masks[name])
            self.descent.state[mask] = _adam_state(mask, on_device=bool(self.descent.defaults["fused"]))

    def logits(self, images: Tensor) -> Tensor:
        return self.model(images)

    def inner(self, index: int = 0) -> None:
        images, _ = self.batches[index]
        labels = self.logits(images).argmax(1)
        # kept until the next step overwrites them, and with them the graph
        self.perturbed_logits = self.logits(images + self.trigger)
        self.loss = -F.cross_entropy(self.perturbed_logits, labels)
        self.ascent.zero_grad()
        self.loss.backward(retain_graph=True)
        self.ascent.step()

    def outer(self, index: int = 0) -> None:
        images, labels = self.batches[index]
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
        return _result(self.trigger, self.masks)

    def constants(self) -> Iterable[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]


class Eager(Official):
    """The published procedure, channels_last and in the problem's dtype by autocast."""

    memory_format = torch.channels_last

    def logits(self, images: Tensor) -> Tensor:
        return self._autocast(self.model)(images)

    def _autocast(self, model):
        dtype = self.problem.dtype
        if dtype == torch.float32:
            return model

        def cast(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, dtype=dtype):
                return model(images).float()

        return cast


class Careful(Eager):
    """What plain PyTorch can do: nothing differentiated in vain, labels once per phase, no waiting, a fused Adam."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.model.requires_grad_(False)

    def _mask(self, layer: nn.Conv2d) -> Parameter:
        mask = super()._mask(layer)
        del layer.noise
        return mask

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.masks.values(), lr=LR, fused=True)

    def _train_masks(self, train: bool) -> None:
        for mask in self.masks.values():
            mask.requires_grad_(train)

    @torch.no_grad()
    def begin(self) -> None:
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


class Compiled(Careful):
    """The careful procedure over ``torch.compile``."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.compiled = torch.compile(self._autocast(self.model), dynamic=False)

    def logits(self, images: Tensor) -> Tensor:
        return self.compiled(images)


class Maskops:
    """The steps of :func:`maskops.purify.awm`, preset ``"official"``."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        dtype = None if problem.dtype == torch.float32 else problem.dtype
        setting = Setting(device=problem.device, dtype=dtype, progress=False)
        self.run = Run("awm", problem.model, (problem.images, problem.labels), setting)
        self.options = PRESETS["official"]
        self.masks = MaskAdam(self.run.arena, lr=LR, l1=GAMMA)

    @torch.no_grad()
    def reset(self) -> None:
        self.trigger = self.problem.trigger.clone().requires_grad_()
        for name, mask in self.run.arena.masks.items():
            mask.copy_(self.problem.masks[name])
        self.run.arena.refresh()
        self.run.arena.grad.zero_()
        self.masks.state[self.run.arena.mask] = _adam_state(self.run.arena.mask, torch.float64)

    def begin(self) -> None:
        with self.run.frozen_masks():
            self.labels = self.run.predictions(self.problem.indices.shape[1])

    def inner(self, index: int = 0) -> None:
        batch = self.problem.indices[index]
        with self.run.frozen_masks():
            loss = F.cross_entropy(self.run.logits(self.run.images[batch], self.trigger), self.labels[batch])
            self.trigger = _ascend(self.trigger, loss, self.options)

    def outer(self, index: int = 0) -> None:
        batch = self.problem.indices[index]
        clean, labels = self.run.images[batch], self.run.labels[batch]
        perturbed = (clean + self.trigger.detach()).clamp(0, 1)
        self.run.descend((ALPHA, clean, labels), (BETA, perturbed, labels))
        self.masks.step()

    def result(self) -> dict[str, Tensor]:
        return _result(self.trigger, self.run.arena.masks)

    def constants(self) -> Iterable[Tensor]:
        arena = self.run.arena
        flat = arena.weight, arena.mask, arena.effective, arena.grad
        return [*self.run.model.parameters(), *self.run.model.buffers(), *flat]


class Floor:
    """What nobody can avoid: the plain convolutions, forward and backward, without masks and batch norms.

    The inner step is the gradient of the trigger, the outer one that of every weight on two batches. The mask step is
    no part of it: ``result`` makes it, for the gate alone.
    """

    begin = None

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.batches = problem.batches(torch.channels_last)
        self.model = _fold_batch_norms(copy.deepcopy(problem.model)).requires_grad_(False)
        self.base = {name: self.model.get_submodule(name).weight.clone() for name in problem.masks}
        self.model.to(problem.dtype, memory_format=torch.channels_last)
        self.weights = {name: self.model.get_submodule(name).weight for name in problem.masks}
        self.reset()
        self.predicted = [self.logits(images).argmax(1) for images, _ in self.batches]

    @torch.no_grad()
    def reset(self) -> None:
        self.trigger = self.problem.trigger.clone().requires_grad_()
        for name, weight in self.weights.items():
            weight.copy_(self.base[name] * self.problem.masks[name])

    def logits(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.problem.dtype)).float()

    def _train_weights(self, train: bool) -> None:
        for weight in self.weights.values():
            weight.requires_grad_(train)

    def inner(self, index: int = 0) -> None:
        self._train_weights(False)
        images, _ = self.batches[index]
        loss = F.cross_entropy(self.logits(images + self.trigger), self.predicted[index])
        (gradient,) = torch.autograd.grad(loss, self.trigger)
        with torch.no_grad():
            self.trigger += INNER_LR * gradient

    def outer(self, index: int = 0) -> None:
        self._train_weights(True)
        images, labels = self.batches[index]
        perturbed = (images + self.trigger.detach()).clamp(0, 1)
        self.model.zero_grad()
        if images.device.type == "cpu":
            for factor, branch in ((ALPHA, images), (BETA, perturbed)):
                (factor * F.cross_entropy(self.logits(branch), labels)).backward()
            return
        clean_logits, perturbed_logits = self.logits(torch.cat((images, perturbed))).chunk(2)
        loss = ALPHA * F.cross_entropy(clean_logits, labels) + BETA * F.cross_entropy(perturbed_logits, labels)
        loss.backward()

    def result(self) -> dict[str, Tensor]:
        masks = {name: Parameter(mask.clone()) for name, mask in self.problem.masks.items()}
        adam = torch.optim.Adam(masks.values(), lr=LR)
        for name, mask in masks.items():
            mask.grad = self.weights[name].grad.float() * self.base[name] + GAMMA
            adam.state[mask] = _adam_state(mask)
        adam.step()
        return _result(self.trigger, {name: mask.clamp(0, 1) for name, mask in masks.items()})

    def constants(self) -> Iterable[Tensor]:
        return self.model.parameters()


def _fold_batch_norms(model: nn.Module) -> nn.Module:
    """Each batch norm folded into the convolution registered just before it, which in these networks feeds it."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, FOLDABLE)]
    for (before, layer), (name, module) in pairwise(modules):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(before, fuse_conv_bn_eval(layer, module))
            model.set_submodule(name, nn.Identity())
    return model


FOLDABLE = (nn.Conv2d, nn.BatchNorm2d)


def _adam_state(mask: Tensor, step_dtype: torch.dtype = torch.float32, on_device: bool = False) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), dtype=step_dtype, device=mask.device if on_device else "cpu"),
        "exp_avg": torch.zeros_like(mask, requires_grad=False),
        "exp_avg_sq": torch.full_like(mask, SECOND_MOMENT, requires_grad=False),
    }


def _result(trigger: Tensor, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"trigger": trigger.detach().clone(), **{name: mask.detach().clone() for name, mask in masks.items()}}


CONTESTANTS = {
    "official": Official,
    "eager": Eager,
    "careful": Careful,
    "compile": Compiled,
    "maskops": Maskops,
    "floor": Floor,
}
