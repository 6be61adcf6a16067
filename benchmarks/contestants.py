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

from benchmarks.problem import ALPHA, BETA, GAMMA, INNER_LR, LR, Problem, adam_state, result
from benchmarks.published import Careful, Compiled, Eager, Official
from maskops.purify._phase import Phase
from maskops.purify.awm import AWM


class Maskops:
    """The steps of :func:`maskops.purify.awm`, preset ``"official"``, as they run there: on a GPU as CUDA graphs."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        dtype = None if problem.dtype == torch.float32 else problem.dtype
        options = {"alpha": ALPHA, "beta": BETA, "gamma": GAMMA, "lr": LR, "inner_lr": INNER_LR}
        setting = {"batch_size": problem.indices.shape[1], "device": problem.device, "dtype": dtype, "progress": False}
        data = problem.images, problem.labels
        self.awm = AWM(problem.model, data, "official", None, {**options, **setting})
        lane = self.awm.run.lane
        self.steps = {
            name: Phase(name, step, lambda: {"index": problem.indices.cpu()}, lane)
            for name, step in (("inner", self.awm.inner), ("outer", self.awm.outer))
        }

    @torch.no_grad()
    def reset(self) -> None:
        arena, trigger = self.awm.run.arena, self.awm.trigger
        trigger.copy_(self.problem.trigger)
        for name, mask in arena.masks.items():
            mask.copy_(self.problem.masks[name])
        arena.refresh()
        arena.grad.zero_()
        state, start = self.awm.masks.state[arena.mask], adam_state(arena.mask, step_device=arena.mask.device)
        for name, value in start.items():  # into the tensors that recorded steps know
            state.setdefault(name, value).copy_(value)

    def begin(self) -> None:
        self.awm.predictions.run()

    def inner(self, index: int = 0) -> None:
        with self.awm.run.frozen_masks():
            self._advance("inner", index)

    def outer(self, index: int = 0) -> None:
        self._advance("outer", index)

    def _advance(self, name: str, index: int) -> None:
        steps, lane = self.steps[name], self.awm.run.lane
        if not steps.left:
            steps.start()
        lane.fork()
        with lane.stream():
            steps.counter.fill_(index)
        steps.advance()
        lane.join()

    def result(self) -> dict[str, Tensor]:
        return result(self.awm.trigger, self.awm.run.arena.masks)

    def constants(self) -> Iterable[Tensor]:
        run = self.awm.run
        flat = run.arena.weight, run.arena.mask, run.arena.effective, run.arena.grad
        return [*run.model.parameters(), *run.model.buffers(), *flat]


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


FOLDABLE = (nn.Conv2d, nn.BatchNorm2d)


CONTESTANTS = {
    "official": Official,
    "eager": Eager,
    "careful": Careful,
    "compile": Compiled,
    "maskops": Maskops,
    "floor": Floor,
}
