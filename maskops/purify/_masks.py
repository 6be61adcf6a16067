"""Runs that learn masks: a working model over the user's tensors, and the masks, noise and biases of its layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import Parameter

from maskops.arena import MaskArena
from maskops.convert import fold_, mask_, masked_layers, masks
from maskops.lean import lean_autograd
from maskops.nn import NORMS
from maskops.purify._depth import depths
from maskops.purify._loop import NonFiniteError, Purification, Run
from maskops.purify._setting import MaskSetting
from maskops.purify._working import WorkingModel, shared_copy

Branch = tuple[float, Tensor, Tensor]


class MaskRun(Run):
    """One purification by masks under way.

    method, model, clean_data: as for :class:`Run`
    setting:          a :class:`MaskSetting`
    batch_statistics: the model runs in train mode: batch norms use the statistics of their batches, dropout is on; the
                      user's running statistics stay as they are. Otherwise in eval mode
    biases:           None; ``"noise"``: the masked layers' biases are perturbed where the weights are; or ``"tune"``:
                      they are parameters to be learned, in :attr:`biases`
    """

    def __init__(
        self,
        method: str,
        model: nn.Module,
        clean_data: Any,
        setting: MaskSetting,
        *,
        batch_statistics: bool = False,
        biases: str | None = None,
    ) -> None:
        super().__init__(method, model, clean_data, setting)
        self._noise_generator = torch.Generator(device=self.device).manual_seed(setting.seed)
        with self.named_errors():
            self._masked = shared_copy(model).to(self.device)
            network = shared_copy(self._masked)
            layers, exclude = _chosen(network, setting)
            mask_(self._masked, setting.granularity, setting.include, exclude, layers)
            self._prepare(network, fold=not batch_statistics and biases is None)
            self._prepare_biases(biases)
            self.check_labels(self.model)
        self.model.train(batch_statistics)

    def _prepare(self, network: nn.Module, fold: bool) -> None:
        """The working model, whose masked layers compute with effective weights that are views of the arena."""
        layers = masked_layers(self._masked)
        example = self.images[:2]
        self.model = WorkingModel(network, example, self.mean, self.std, layers, self.low_dtype, fold)
        if self.model.unused:
            raise ValueError(f"the model's forward doesn't use {', '.join(self.model.unused)}; use exclude=")
        # layers that share a weight share a mask: the first stands for all of them
        owner_of = {id(layer.weight): name for name, layer in reversed(layers.items())}
        self._owners = {name: owner_of[id(layer.weight)] for name, layer in layers.items()}
        self._working = {name: self.model.network.get_submodule(name) for name in layers}
        weights = {name: self._working[name].weight for name in reversed(owner_of.values())}
        learned = {name: getattr(layers[name], layers[name].mask_name) for name in weights}
        # norms compute in their parameters' dtype; autocast casts the other layers' weights
        low = self.low_dtype if not any(isinstance(layer, NORMS) for layer in layers.values()) else None
        self.arena = MaskArena(weights, learned, low)
        _set_masks(self._masked, self._owners, self.arena.masks)
        for name, owner in self._owners.items():
            self._working[name].weight = self.arena.effective_weights[owner]
        self._learn(True)

    def _prepare_biases(self, biases: str | None) -> None:
        with_bias = {name: layer for name, layer in self._working.items() if layer.bias is not None}
        self._shifts: MaskArena | None = None
        self.biases: dict[str, Parameter] = {}
        if biases == "noise" and with_bias:
            shifts = {name: layer.bias for name, layer in with_bias.items()}
            ones = {name: torch.ones_like(bias) for name, bias in shifts.items()}
            self._shifts = MaskArena(shifts, ones)
            for name, layer in with_bias.items():
                layer.bias = self._shifts.effective_weights[name].requires_grad_(False)
        elif biases == "tune":
            for name, layer in with_bias.items():
                layer.bias = self.biases[name] = Parameter(layer.bias.detach().clone())

    def logits(self, images: Tensor, trigger: Tensor | None = None) -> Tensor:
        """The working model's logits of images in pixel space, plus a trigger."""
        # layers whose masks are learned save their inputs, which are outputs of ReLUs: bits would come on top
        with lean_autograd(relu_bits=not self._learning):
            return self.model(images, trigger)

    @torch.no_grad()
    def predictions(self, batch_size: int) -> Tensor:
        """The class that the working model gives each clean image."""
        # a model may write to its input: it gets copies
        return torch.cat([self.logits(images.clone()).argmax(1) for images in self.images.split(batch_size)])

    def new_trigger(self) -> Tensor:
        return torch.zeros_like(self.images[:1]).requires_grad_()

    @contextmanager
    def frozen_masks(self) -> Iterator[None]:
        """Within, no gradient of a mask is computed."""
        self._learn(False)
        try:
            yield
        finally:
            self._learn(True)

    def _learn(self, learning: bool) -> None:
        self._learning = learning
        for weight in self.arena.effective_weights.values():
            weight.requires_grad_(learning)

    def draw_noise(self, bound: float) -> None:
        """Noise on the masks, and on the biases of a run with noise on them, uniform in [-bound, bound]."""
        for arena in self._noisy():
            arena.draw_noise(bound, self._noise_generator)

    def ascend_noise(self, images: Tensor, labels: Tensor, step_size: float, bound: float | None) -> None:
        """One step up the loss by the sign of the noise's gradient; then into [-bound, bound] unless that is None."""
        with self.perturbed(learn_biases=True):
            F.cross_entropy(self.logits(images), labels).backward()
        for arena in self._noisy():
            arena.ascend_noise(step_size, bound)

    @contextmanager
    def perturbed(self, learn_biases: bool = False) -> Iterator[None]:
        """Within, the layers compute with ``(m + δ) ⊙ θ`` and, in a run with noise on biases, ``(1 + ξ) ⊙ b``."""
        for arena in self._noisy():
            arena.perturb()
        self._learn_shifts(learn_biases)
        try:
            yield
        finally:
            self._learn_shifts(False)
            for arena in self._noisy():
                arena.refresh()

    def _noisy(self) -> list[MaskArena]:
        return [self.arena] if self._shifts is None else [self.arena, self._shifts]

    def _learn_shifts(self, learning: bool) -> None:
        if self._shifts is not None:
            for shift in self._shifts.effective_weights.values():
                shift.requires_grad_(learning)

    def descend(self, *branches: Branch, together: bool = False, perturbed: Branch | None = None) -> list[Tensor]:
        """Add the gradient of ``sum(factor * cross_entropy(f(images), labels))`` over the branches to the arena's.

        branches:  (factor, images, labels) each
        together:  run them as one batch, which takes fewer, larger launches and twice the activations
        perturbed: one more branch, at the perturbed weights
        returns:   the cross entropies, detached
        """
        if together:
            factors, images, labels = zip(*branches, strict=True)
            parts = self.logits(torch.cat(images)).split([len(part) for part in images])
            losses = [F.cross_entropy(part, label) for part, label in zip(parts, labels, strict=True)]
            sum(factor * loss for factor, loss in zip(factors, losses, strict=True)).backward()
            return [loss.detach() for loss in losses]
        losses = [self._descend(*branch) for branch in branches]
        if perturbed is not None:
            with self.perturbed():
                losses.append(self._descend(*perturbed))
        return losses

    def _descend(self, factor: float, images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(self.logits(images), labels)
        (factor * loss).backward()
        return loss.detach()

    def depths(self) -> dict[str, int]:
        """The depth of each mask's layer among the masked ones, from 1: see :func:`maskops.purify._depth.depths`."""
        training = self.model.training
        found = depths(self.model.eval(), self.images[:2].clone(), self.arena.effective_weights)
        self.model.train(training)
        return found

    def indices(self) -> dict[str, int]:
        """The place of each mask among all, from 1, in the order of the model's parameters."""
        owners = dict.fromkeys(self._owners.values())
        return {name: index for index, name in enumerate(owners, start=1)}

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor, masks: Mapping[str, Tensor], batch_size: int = 256) -> float:
        """Of the model in eval mode with these masks in place of the learned ones."""
        learned, training = self.arena.mask.clone(), self.model.training
        self._fill(masks)
        self.model.eval()
        parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        hits = sum((self.logits(part.clone()).argmax(1) == label).sum() for part, label in parts)
        self.model.train(training)
        self.arena.mask.copy_(learned)
        self.arena.refresh()
        return int(hits) / len(labels)

    def _fill(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in self.arena.masks.items():
            mask.copy_(masks[name])
        self.arena.refresh()

    def finish(self, options: Any, *, pruned: Mapping[str, Tensor] | None = None, **results: Any) -> Purification:
        """The result: masks, and the user's structure with the masks on, or folded into, its weights.

        pruned: masks of zeros and ones that take the place of the learned ones, which become the scores
        """
        if not bool(torch.isfinite(self.arena.mask).all()):
            raise NonFiniteError(f"{self.method}: a mask became nan or infinite; the model is left as it was")
        learned = self._apply(self.arena.masks)
        if pruned is not None:
            results["scores"] = learned
            learned = self._apply(pruned)
        for name, bias in self.biases.items():
            layer = self._masked.get_submodule(name)
            layer.bias = Parameter(bias.detach(), layer.bias.requires_grad)
        layers = masked_layers(self._masked)
        # folding replaces the masked weights: no need to copy them first
        replaced = {id(layer.weight): layer.weight for layer in layers.values()} if self.setting.folded else {}
        model = copy.deepcopy(self._masked, replaced)
        model = fold_(model) if self.setting.folded else model
        return super().finish(options, model, masks=learned, **results)

    def _apply(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the user's structure these masks; returns copies of them on the CPU, by the parameters' names."""
        layers = masked_layers(self._masked)
        laid_out = {name: _laid_out_as(layers[name].weight, mask) for name, mask in values.items()}
        _set_masks(self._masked, self._owners, laid_out)
        return {name: mask.detach().to("cpu", copy=True).contiguous() for name, mask in masks(self._masked).items()}


def _chosen(network: nn.Module, setting: MaskSetting) -> tuple[Any, tuple[str, ...]]:
    """``layers`` and ``exclude`` for mask_, with what ``"auto"`` stands for in this network."""
    exclude = (setting.exclude,) if isinstance(setting.exclude, str) else tuple(setting.exclude)
    if setting.layers != "auto":
        return setting.layers, exclude
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        scaleless = [name for name, module in network.named_modules() if _has_no_scale(module)]
        return "norm", (*exclude, *scaleless)
    kinds = {"conv": nn.modules.conv._ConvNd, "linear": nn.Linear, "norm": nn.LayerNorm}
    found = [kind for kind, layer in kinds.items() if any(isinstance(module, layer) for module in network.modules())]
    return found or "linear", exclude


def _has_no_scale(module: nn.Module) -> bool:
    return isinstance(module, tuple(masked.plain for masked in NORMS)) and module.weight is None


def _set_masks(masked: nn.Module, owners: Mapping[str, str], values: Mapping[str, Tensor]) -> None:
    parameters = {owner: Parameter(mask) for owner, mask in values.items()}
    for name, layer in masked_layers(masked).items():
        setattr(layer, layer.mask_name, parameters[owners[name]])


def _laid_out_as(weight: Tensor, mask: Tensor) -> Tensor:
    """The mask in memory of its own, in the weight's layout where it has the weight's shape."""
    mask = mask.detach()
    if mask.shape != weight.shape:
        return mask.clone(memory_format=torch.contiguous_format)
    return torch.empty_like(weight, dtype=mask.dtype, requires_grad=False).copy_(mask)
