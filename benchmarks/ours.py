"""Our contestants: the steps of a purification as they run in one, on a GPU as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.networks import masked_kinds
from benchmarks.neurons import ETA, signs
from benchmarks.problem import ALPHA, BETA, GAMMA, INNER_LR, LR, Problem, adam_state, result
from maskops.arena import _views
from maskops.purify._draws import Batch
from maskops.purify._phase import Phase
from maskops.purify.anp import ANP
from maskops.purify.awm import AWM
from maskops.purify.nft import NFT


class _Ours:
    """An algorithm whose steps are timed one by one."""

    saves_itself = True
    """What is kept for the backward is kept beside autograd, where nobody counts it."""
    needs_memory = True

    def __init__(self, problem: Problem, algorithm: Callable[..., Any], **options: Any) -> None:
        self.problem = problem
        options |= {"device": problem.device, "batch_size": problem.indices.shape[1], "progress": False}
        options |= {} if problem.dtype == torch.float32 else {"dtype": problem.dtype}
        options |= {"gate": "output"} if problem.as_gpu else {}
        self.algorithm = algorithm(problem.model, (problem.images, problem.labels), "official", None, options)
        self.run = self.algorithm.run
        self.phases: dict[str, Phase] = {}
        self._next: dict[str, int] = {}

    def constants(self) -> Iterable[Tensor]:
        arena = self.run.arena
        flat = arena.weight, arena.mask, arena.effective, arena.grad
        return [*self.run.model.parameters(), *self.run.model.buffers(), *flat]

    def phase(self, name: str, step: Callable[[Batch], Any], **more: Tensor) -> None:
        """Steps on the problem's batches; ``more`` are further draws, the same for every step."""
        drawn = {"index": self.problem.indices.cpu()}
        drawn |= {key: torch.stack([value] * len(drawn["index"])) for key, value in more.items()}
        self.phases[name] = Phase(name, step, lambda: drawn, self.run.lane)

    def advance(self, name: str, index: int) -> None:
        """The step of this batch."""
        phase, lane = self.phases[name], self.run.lane
        if not phase.left:
            phase.start()
            self._next[name] = 0
        lane.fork()
        if index != self._next[name]:
            with lane.stream():
                phase.counter.fill_(index)
        phase.advance()
        self._next[name] = index + 1
        lane.join()

    @torch.no_grad()
    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Masks of the problem, and an optimiser in this state; in place, where recorded steps look for them."""
        arena = self.run.arena
        for name, mask in arena.masks.items():
            mask.copy_(self.problem.masks[name])
        arena.refresh()
        arena.grad.zero_()
        kept = self.algorithm.masks.state[arena.mask]
        for name, value in state.items():
            kept.setdefault(name, value).copy_(value)


class Maskops(_Ours):
    """The steps of :func:`maskops.purify.awm`, preset ``"official"``."""

    def __init__(self, problem: Problem) -> None:
        options = {"alpha": ALPHA, "beta": BETA, "gamma": GAMMA, "lr": LR, "inner_lr": INNER_LR}
        options |= {"layers": masked_kinds(problem.net)}
        options |= {"branches": "concatenated"} if problem.as_gpu else {}
        super().__init__(problem, AWM, **options)
        self.phase("inner", self.algorithm.inner)
        self.phase("outer", self.algorithm.outer)

    def reset(self) -> None:
        with torch.no_grad():
            self.algorithm.trigger.copy_(self.problem.trigger)
        mask = self.run.arena.mask
        self.start_from(adam_state(mask, step_device=mask.device))

    def begin(self) -> None:
        self.algorithm.predictions.run()

    def inner(self, index: int = 0) -> None:
        with self.run.frozen_masks():
            self.advance("inner", index)

    def outer(self, index: int = 0) -> None:
        self.advance("outer", index)

    def result(self) -> dict[str, Tensor]:
        return result(self.algorithm.trigger, self.run.arena.masks)


class _Neurons(_Ours):
    """On images that are augmented already."""

    inject = False

    def __init__(self, problem: Problem, algorithm: Callable[..., Any], **options: Any) -> None:
        super().__init__(problem, algorithm, crop=0, flip=False, **options)

    def reset(self) -> None:
        self.start_from({"momentum_buffer": torch.zeros_like(self.run.arena.mask, requires_grad=False)})


class MaskopsANP(_Neurons):
    """The steps of :func:`maskops.purify.anp`, preset ``"official"``."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, ANP, threshold=0.2)
        self.phase("step", self.algorithm.step)
        self.signs: dict[str, Tensor] = {}

    def step(self, index: int = 0) -> None:
        if self.inject:
            self._step_of_injected_draws(self.problem.indices[index])
        else:
            self.advance("step", index)

    def _step_of_injected_draws(self, index: Tensor) -> None:
        run, draws, options = self.run, self.problem.draws, self.algorithm.options
        images, labels = run.sample(Batch(index))
        run.noise.draw(options.epsilon)
        self._set_noise(draws.noise)
        run.ascend_noise(images, labels, options.epsilon, None)
        of_masks, of_biases = (_views(arena.noise, arena.masks) for arena in run.noise.arenas)
        for name in of_masks:
            self.signs |= signs(name, (of_masks[name], of_biases[name]), draws)
        self._set_noise(draws.moved)
        run.descend((options.alpha, images, labels), perturbed=(1 - options.alpha, images, labels))
        self.algorithm.masks.step()

    def _set_noise(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for place, arena in enumerate(self.run.noise.arenas):
            for name, noise in _views(arena.noise, arena.masks).items():
                noise.copy_(values[name][place])

    def result(self) -> dict[str, Tensor]:
        return result(None, self.run.arena.masks) | self.signs


class MaskopsNFT(_Neurons):
    """The steps of :func:`maskops.purify.nft`, preset ``"official"``, all with the MixUp of the problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, NFT, eta=ETA)
        draws = problem.draws
        self.phase("step", self.algorithm.step, partners=draws.order.cpu(), weight=torch.tensor(draws.weight))

    def step(self, index: int = 0) -> None:
        self.advance("step", index)

    def result(self) -> dict[str, Tensor]:
        _, *others = self.run.arena.masks.items()
        return result(None, dict(others))
