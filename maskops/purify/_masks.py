"""Runs that learn masks: a working model over the user's tensors, and the masks, noise and biases of its layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import Parameter

from maskops._memory import OnHost, host_memory
from maskops._state import eval_mode
from maskops.arena import MaskArena
from maskops.convert import LAYERS, fold_, mask_, maskable, masked_layers, masks
from maskops.nn import MASKED, NORMS
from maskops.optim import MaskAdam
from maskops.purify._buckets import BucketSums
from maskops.purify._depth import depths
from maskops.purify._distributed import ALONE, team_of
from maskops.purify._draws import Batch
from maskops.purify._loop import OnEpoch, Run
from maskops.purify._losses import Branch, Losses
from maskops.purify._noise import Biases, Noise
from maskops.purify._parts import Parts, Shrink, Step
from maskops.purify._phase import Phase
from maskops.purify._result import Purification
from maskops.purify._setting import MaskSetting
from maskops.purify._shards import Shards
from maskops.purify._working import WorkingModel, shared_copy

_MIXES = "it computes with the statistics of its batches"


class MaskRun(Run):
    """One purification by masks under way.

    method, model, clean_data, within: as for :class:`Run`
    setting:          a :class:`MaskSetting`
    batch_statistics: the model runs in train mode: batch norms use the statistics of their batches, dropout is on.
                      Otherwise in eval mode
    track_statistics: the result's running statistics follow these batches; otherwise they are the user's. The user's
                      own stay as they are in any case
    biases:           None; ``"noise"``: the masked layers' biases are perturbed where the weights are; or ``"tune"``:
                      they are parameters to be learned, in :attr:`biases`
    mask_bits:        16 for masks in bfloat16; 32 for the weights' dtype, or float32 over weights that are kept in less
    step_in_backward: no gradient of the whole model is kept: :meth:`step_in_backward` is to be called
    offload:          θ and the masks are in the host's memory, and what isn't masked is copied to the device; with
                      weights that are made before each use
    shard:            each process has its part of every layer's θ and masks, in the same way
    """

    def __init__(
        self,
        method: str,
        model: nn.Module,
        clean_data: Any,
        setting: MaskSetting,
        *,
        batch_statistics: bool = False,
        track_statistics: bool = False,
        biases: str | None = None,
        mask_bits: int = 32,
        step_in_backward: bool = False,
        offload: bool = False,
        shard: bool = False,
        within: bool = False,
    ) -> None:
        self._adds_up, self._offload = not step_in_backward, offload
        self.team = ALONE if within else team_of(method)
        if shard and self.team.size == 1:
            raise ValueError(f"{method}: shard=True is for several processes, and this is one")
        self._shard = shard
        super().__init__(method, model, clean_data, setting, within=within)
        with self.named_errors(), self.seeded_layers():
            self.team.check(model, self.device, batch_statistics, batch_statistics and track_statistics)
            self._masked = shared_copy(model)
            away = offload or shard
            if not away and any(tensor.device != self.device for tensor in self._masked.state_dict().values()):
                self._masked.to(self.device)
            network = shared_copy(self._masked)
            layers, exclude = _chosen(network, setting)
            with self._at_home():
                mask_(self._masked, setting.granularity, setting.include, exclude, layers)
                _forget_masks(self._masked)
            self._track_statistics = batch_statistics and track_statistics
            self._prepare(network, setting, mask_bits, fold=not batch_statistics and biases is None)
            of_biases = Biases(self._working, biases)
            self.biases, self._bias_owners = of_biases.tuned, of_biases.owners
            self.noise = Noise(self.arena, of_biases.shifts, self.noise_generator)
            self._learn(True)
            self.check_labels(self.model)
        self.model.train(batch_statistics)
        learned = [value for arena in self.noise.arenas for value in arena.effective_weights.values()]
        changing = [*learned, *self.biases.values()]
        self.model.make_tape(self.images[:2], changing, setting.gate, setting.recompute)
        # in eval mode too, such a norm computes with the statistics of its batch
        self._mixes_batches = batch_statistics or any(
            isinstance(module, _BatchNorm) and module.running_mean is None for module in self.model.modules()
        )
        mixes, reason = _MIXES if self._mixes_batches else None, self.model.tape_reason
        self._refuse("remake_weights", setting.remake_weights, reason)
        self._refuse("recompute", setting.recompute, mixes or reason)
        self._refuse("micro_batch_size", setting.micro_batch_size, mixes)
        self.parts = Parts(method, setting.micro_batch_size, self.lane)
        self.parts.whole = self._mixes_batches
        sums = BucketSums(method, self.team, self.arena)
        around = self.noise.perturbed, partial(sums.during_backward, self.model)
        self.losses = Losses(self.team, self.parts, self.logits, *around, self._clear_gradients, self._mixes_batches)

    def _at_home(self) -> AbstractContextManager[object]:
        """Within, things are made where the model is, which isn't on the device if masks and θ aren't."""
        return host_memory() if self._offload else nullcontext()

    def _refuse(self, name: str, value: Any, reason: str | None) -> None:
        """Raise ValueError for an option that is given where there is a reason against it."""
        if value and reason is not None:
            raise ValueError(f"{self.method}: {name}={value} can't be done for this model: {reason}")

    def _prepare(self, network: nn.Module, setting: MaskSetting, mask_bits: int, fold: bool) -> None:
        """The working model, whose masked layers compute with effective weights that are views of the arena."""
        layers = masked_layers(self._masked)
        how = {"fold": fold, "track": self._track_statistics}
        home = next(iter(layers.values())).weight.device
        with self._at_home():
            about = (None if value is None else value.to(home) for value in (self.images[:2], self.mean, self.std))
            self.model = WorkingModel(network, *about, layers, self.low_dtype, **how)
        if self.model.unused:
            raise ValueError(f"the model's forward doesn't use {', '.join(self.model.unused)}; use exclude=")
        # layers that share a weight share a mask: the first stands for all of them
        owner_of = {id(layer.weight): name for name, layer in reversed(layers.items())}
        self._owners = {name: owner_of[id(layer.weight)] for name, layer in layers.items()}
        self._fixed: set[str] = set()
        self._working = {name: self.model.network.get_submodule(name) for name in layers}
        weights = {name: self._working[name].weight for name in reversed(owner_of.values())}
        learned = {name: getattr(layers[name], layers[name].mask_name) for name in weights}
        # norms compute in their parameters' dtype; autocast casts the other layers' weights
        low = self.low_dtype if not any(isinstance(layer, NORMS) for layer in layers.values()) else None
        low = low or next(iter(weights.values())).dtype
        if setting.weight_dtype is not None:
            learned = {name: mask.float() for name, mask in learned.items()}
        if mask_bits == 16:
            learned = {name: mask.bfloat16() for name, mask in learned.items()}
        keep = not setting.remake_weights
        spread = Shards(self.device, self.team) if self._shard else None
        where = {"memory": OnHost(self.device) if self._offload else spread}
        about = {"weight_dtype": setting.weight_dtype, "keep": keep, "learn": self._adds_up}
        self.arena = MaskArena(weights, learned, low, **about, **where)
        self.model.remade = None if keep else self.arena
        if not self._shard:
            _set_masks(self._masked, self._owners, self.arena.masks)
        for name, owner in self._owners.items():
            self._working[name].weight = self.arena.effective_weights[owner]
        if home != self.device:
            self.model.to(self.device)

    def logits(self, images: Tensor, trigger: Tensor | None = None) -> Tensor:
        """The working model's logits of images in pixel space, plus a trigger."""
        self.noise.drop()
        return self.model(images, trigger)

    def add_gradients(self, *arenas: MaskArena) -> None:
        """Sum what isn't summed during the backward: gradients in these arenas, and of tuned biases."""
        for arena in arenas:
            if arena.grad is not None:  # otherwise each layer's was summed when it was stepped by itself
                self.team.add(arena.grad)
        self.team.add(*(bias.grad for bias in self.biases.values() if bias.grad is not None))

    def _clear_gradients(self) -> None:
        for arena in self.noise.arenas:
            arena.zero_grad()
        for bias in self.biases.values():
            if bias.grad is not None:
                bias.grad.zero_()

    def steps(
        self, name: str, step: Step, count: int, batch_size: int, *, shrink: Shrink | None = None, **how: Any
    ) -> Phase:
        """As for :class:`Run`; ``shrink`` is another way to need less memory than smaller parts of batches."""
        how |= self.parts.shrinking(name, step, shrink)
        return super().steps(name, count=count, batch_size=batch_size, **how)

    def predictions(self, into: Tensor, batch_size: int) -> Phase:
        """A phase that writes the class that the working model gives each clean image, (N,)."""
        count = len(self.images)
        size = math.ceil(count / math.ceil(count / batch_size))
        # all batches of one size, which a graph needs; the last image fills up the last of them
        index = torch.arange(math.ceil(count / size) * size).clamp_(max=count - 1).view(-1, size)

        @torch.no_grad()
        def predict(batch: Batch) -> dict[str, Tensor]:
            part = self.team.part(size)
            own = part.of(batch.index)

            def compute() -> None:
                for rows in self.parts.of(len(own)):
                    with self.team.whole_batch(part):
                        into.index_copy_(0, own[rows], self.logits(self.images.at(own[rows])).argmax(1))

            self.parts.attempt(compute, lambda: None)
            return {}

        how = {"before": into.zero_, "after": partial(self.team.most, into)} if self.team.size > 1 else {}
        how |= {"draw": lambda: {"index": index}, "lane": self.lane, "why_eager": self._why_eager}
        return Phase("predictions", **self.parts.shrinking("predictions", predict), **how)

    def new_trigger(self) -> Tensor:
        return torch.zeros_like(self.images[:1]).requires_grad_()

    @contextmanager
    def frozen_masks(self) -> Iterator[None]:
        """Within, no gradient of a mask, or of a tuned bias, is computed."""
        self._learn(False)
        try:
            yield
        finally:
            self._learn(True)

    def fix(self, names: Collection[str]) -> None:
        """From now on compute no gradient of these masks, for which a method leaves no room."""
        self._fixed = set(names)
        self._learn(True)

    def _learn(self, learning: bool) -> None:
        self.model.relu_bits = not learning
        for name, weight in self.arena.effective_weights.items():
            weight.requires_grad_(learning and name not in self._fixed)
        for bias in self.biases.values():
            bias.requires_grad_(learning)

    def step_in_backward(self, masks: MaskAdam) -> None:
        """From now on a backward steps each layer's masks as soon as their gradient is complete, which isn't kept.

        errors: ValueError for masks that aren't of weights, where losses must have a backward each, and without a tape
        """
        reason = self.model.tape_reason
        if self._mixes_batches:
            reason = "it has batch norms with the statistics of their batch"
        elif not self.arena.elementwise:
            reason = "its masks are of another granularity than 'weight'"
        self._refuse("step_in_backward", True, reason)
        if self.setting.micro_batch_size is not None:
            raise ValueError(f"{self.method}: step_in_backward=True takes one backward: micro_batch_size=None")
        self.parts.whole = True
        name_of = {id(weight): name for name, weight in self.arena.effective_weights.items()}

        def step(weight: Parameter, grad: Tensor) -> None:
            # two weights may have one gradient, and what is in parts is summed as such
            masks.step_layer(name_of[id(weight)], grad if self._shard else self.team.total(grad))

        self.model.hand_over_gradients(step)

    def ascend_noise(self, images: Tensor, labels: Tensor, step_size: float, bound: float | None) -> None:
        """One step up the loss by the sign of the noise's gradient; then into [-bound, bound] unless that is None."""
        with self.noise.perturbed(learn_biases=True):
            self.losses.descend((1.0, images, labels))
        self.add_gradients(*self.noise.arenas[1:])
        self.noise.ascend(step_size, bound)

    def report(self, on_epoch: OnEpoch | None, epoch: int, model: nn.Module) -> None:
        self.noise.drop()
        # no backward of a measurement reaches what is learned, and it may look at the weights, if there is room
        looks = on_epoch is not None and not self.replaying and not self._offload
        with self.frozen_masks(), self.arena.whole() if looks else nullcontext():
            super().report(on_epoch, epoch, model)

    def descend(
        self, *branches: Branch, together: Callable[[], bool] = lambda: False, perturbed: Branch | None = None
    ) -> list[Tensor]:
        """:meth:`Losses.descend`, with the gradients of all processes in the arena."""
        losses = self.losses.descend(*branches, together=together, perturbed=perturbed)
        self.add_gradients()
        return losses

    @property
    def shards(self) -> int:
        return self.arena.memory.parts

    def tensors(self) -> dict[str, Tensor]:
        self.arena.memory.settle()
        changed = {"mask": self.arena.mask} | {f"bias {name}": bias for name, bias in self.biases.items()}
        if self._track_statistics:
            changed |= {f"buffer {name}": buffer for name, buffer in self.model.network.named_buffers()}
        return changed

    def whole_tensors(self) -> dict[str, Tensor]:
        return {**self.tensors(), "mask": self.arena.mask_in_one()}

    @torch.no_grad()
    def take_up(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.tensors().items():
            if name != "mask":
                value.copy_(tensors[name])
        self.arena.take_masks(tensors["mask"])

    def depths(self) -> dict[str, int]:
        """The depth of each mask's layer among the masked ones, from 1: see :func:`maskops.purify._depth.depths`."""
        with eval_mode(self.model), self.seeded_layers():
            return depths(self.model.plain, self.images[:2], self.arena.effective_weights)

    def indices(self) -> dict[str, int]:
        """The place of each mask among all, from 1, in the order of the model's parameters."""
        owners = dict.fromkeys(self._owners.values())
        return {name: index for index, name in enumerate(owners, start=1)}

    @torch.no_grad()
    def hits(self, images: Tensor, labels: Tensor, masks: Mapping[str, Tensor], batch_size: int = 256) -> int:
        """How many images the model classifies rightly, in eval mode and with these masks in place of the learned."""
        learned = self.arena.mask.clone()
        self._fill(masks)
        batch_size = min(batch_size, self.setting.micro_batch_size or batch_size)
        parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        with eval_mode(self.model), self.seeded_layers():
            hits = sum((self.logits(part).argmax(1) == label).sum() for part, label in parts)
        self.arena.mask.copy_(learned)
        self.arena.refresh()
        return int(hits)

    def _fill(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in self.arena.masks.items():
            mask.copy_(masks[name])
        self.arena.refresh()

    def finish(self, options: Any, *, pruned: Mapping[str, Tensor] | None = None, **results: Any) -> Purification:
        """The result: masks, and the user's structure with the masks on, or folded into, its weights.

        pruned: masks of zeros and ones that take the place of the learned ones, which become the scores
        """
        self.arena.memory.settle()
        whole = self.arena.whole_masks()
        values = list(whole.values()) if self._shard else [self.arena.mask]
        for what, value in (*(("mask", value) for value in values), *(("bias", bias) for bias in self.biases.values())):
            if not bool(torch.isfinite(value).all()):
                raise self.failed(f"a {what} became nan or infinite")
        learned = self._apply(whole)
        if pruned is not None:
            results["scores"] = learned
            learned = self._apply(pruned)
        if self.biases:
            tuned = {name: Parameter(bias.detach()) for name, bias in self.biases.items()}
            for name, owner in self._bias_owners.items():
                self._masked.get_submodule(name).bias = tuned[owner]
        if self._track_statistics:
            for name, buffer in self.model.network.named_buffers():
                self._masked.get_buffer(name).copy_(buffer)
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
    if setting.layers not in ("auto", ("auto",), ["auto"]):
        return setting.layers, exclude
    candidates = {name: module for name, module in network.named_modules() if isinstance(module, tuple(MASKED))}
    usable = set(maskable(network))
    batch_norms = {name for name in usable if isinstance(candidates[name], _BatchNorm)}
    chosen = batch_norms or usable
    return tuple(LAYERS), (*exclude, *(name for name in candidates if name not in chosen))


def _forget_masks(masked: nn.Module) -> None:
    """Have masks of ones in no memory, until others take their places."""
    for layer in masked_layers(masked).values():
        mask = getattr(layer, layer.mask_name)
        one = torch.ones((), dtype=mask.dtype, device=mask.device)
        setattr(layer, layer.mask_name, Parameter(one.expand(mask.shape)))


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
