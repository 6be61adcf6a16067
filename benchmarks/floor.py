"""The floor of AWM's steps: what nobody can avoid."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.problem import ALPHA, BETA, GAMMA, INNER_LR, LR, Problem, adam_state, result
from benchmarks.published import fastest_float32

FOLDABLE = (nn.Conv2d, nn.BatchNorm2d)


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
        self.trigger = torch.zeros_like(problem.trigger).requires_grad_()
        self.reset()
        self.predicted: list[Tensor] = []

    @torch.no_grad()
    def reset(self) -> None:
        # into the same memory, which a CUDA graph reads
        self.trigger.copy_(self.problem.trigger)
        for name, weight in self.weights.items():
            weight.copy_(self.base[name] * self.problem.masks[name])

    def logits(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.problem.dtype)).float()

    def _train_weights(self, train: bool) -> None:
        for weight in self.weights.values():
            weight.requires_grad_(train)

    @fastest_float32()
    def inner(self, index: int = 0) -> None:
        self._train_weights(False)
        images, _ = self.batches[index]
        if not self.predicted:
            self.predicted = [self.logits(images).argmax(1).detach() for images, _ in self.batches]
        loss = F.cross_entropy(self.logits(images + self.trigger), self.predicted[index])
        (gradient,) = torch.autograd.grad(loss, self.trigger)
        with torch.no_grad():
            self.trigger += INNER_LR * gradient

    @fastest_float32()
    def outer(self, index: int = 0) -> None:
        self._train_weights(True)
        images, labels = self.batches[index]
        perturbed = (images + self.trigger.detach()).clamp(0, 1)
        self.model.zero_grad()
        if not self.problem.as_gpu:
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
            adam.state[mask] = adam_state(mask)
        adam.step()
        return result(self.trigger, {name: mask.clamp(0, 1) for name, mask in masks.items()})

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
