"""The adversary's noise in a run that learns masks, and what becomes of its layers' biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import Parameter

from maskops.arena import MaskArena


class Biases:
    """The biases of masked layers, which share what happens to them where they share the bias.

    layers: name -> layer, of the working model
    kind:   None leaves them as they are; ``"noise"``: they are perturbed where the weights are; ``"tune"``: they are
            parameters to be learned

    owners: name of each layer with a bias -> that of the layer that stands for it
    shifts: the arena of what is perturbed; None for none
    tuned:  name of an owner -> what is learned
    """

    def __init__(self, layers: Mapping[str, nn.Module], kind: str | None) -> None:
        with_bias = {name: layer for name, layer in layers.items() if layer.bias is not None}
        owner_of = {id(layer.bias): name for name, layer in reversed(with_bias.items())}
        self.owners = {name: owner_of[id(layer.bias)] for name, layer in with_bias.items()}
        originals = {name: with_bias[name].bias for name in dict.fromkeys(self.owners.values())}
        self.shifts: MaskArena | None = None
        self.tuned: dict[str, Parameter] = {}
        taken: Mapping[str, Parameter] = {}
        if kind == "noise" and originals:
            self.shifts = MaskArena(originals, {name: torch.ones_like(bias) for name, bias in originals.items()})
            taken = self.shifts.effective_weights
            for shift in taken.values():
                shift.requires_grad_(False)
        elif kind == "tune":
            taken = self.tuned = {name: Parameter(bias.detach().clone()) for name, bias in originals.items()}
        if taken:
            for name, owner in self.owners.items():
                with_bias[name].bias = taken[owner]


class Noise:
    """Noise δ on the masks of an arena and, where there are such, ξ on biases.

    generator: what it is drawn from
    """

    def __init__(self, masks: MaskArena, shifts: MaskArena | None, generator: torch.Generator) -> None:
        self._shifts, self._generator = shifts, generator
        self.arenas = [masks] if shifts is None else [masks, shifts]
        self._perturbing = False

    def draw(self, bound: float) -> None:
        """Noise uniform in [-bound, bound]."""
        for arena in self.arenas:
            arena.draw_noise(bound, self._generator)

    def ascend(self, step_size: float, bound: float | None) -> None:
        """One step by the sign of the gradient that there is; then into [-bound, bound] unless that is None."""
        for arena in self.arenas:
            arena.ascend_noise(step_size, bound)

    @contextmanager
    def perturbed(self, learn_biases: bool = False) -> Iterator[None]:
        """Within, the layers compute with ``(m + δ) ⊙ θ`` and, in a run with noise on biases, ``(1 + ξ) ⊙ b``.

        learn_biases: compute the gradient of ξ too; who steps it goes on with the next noise, so that the biases keep
                      theirs until then
        """
        for arena in self.arenas:
            arena.perturb()
        self._perturbing = True
        self._learn_shifts(learn_biases)
        try:
            yield
        finally:
            self._learn_shifts(False)
            self._perturbing = False
        if self._shifts is not None and not learn_biases:
            # here, so that replays do it too; the mask step does the weights
            self._shifts.refresh()

    def drop(self) -> None:
        """Have no noise in weights and biases, but within :meth:`perturbed`."""
        if not self._perturbing:
            for arena in self.arenas:
                arena.refresh_if_perturbed()

    def _learn_shifts(self, learning: bool) -> None:
        if self._shifts is not None:
            for shift in self._shifts.effective_weights.values():
                shift.requires_grad_(learning)
