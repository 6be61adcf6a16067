"""The engine that the loops share: everything about a purification that isn't its algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from maskops.arena import MaskArena
from maskops.convert import fold_, mask_, masked_layers, masks
from maskops.data import as_tensors
from maskops.lean import lean_autograd
from maskops.purify._working import WorkingModel, own_parameters_, shared_copy


class NonFiniteError(RuntimeError):
    """A loss was NaN or infinite; the message says in which phase. The user's model is as it was."""


@dataclass(frozen=True)
class Purification:
    """What a purification returns.

    model:   the purified model: plain layers with the masks folded in, or masked layers if that was asked for
    masks:   name -> mask on the CPU, such as ``"conv1.mask"``
    trigger: the last trigger that the inner maximisation found, (1, C, H, W) in pixel units; None for methods without
    history: name -> one number per epoch
    timings: seconds of each phase and in total, and ``peak_bytes`` of memory
    options: all settings of the run, as values that JSON knows
    """

    model: nn.Module
    masks: dict[str, Tensor]
    trigger: Tensor | None
    history: dict[str, list[float]]
    timings: dict[str, float]
    options: dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where and on what a run works; the same for every method.

    device:    None for the model's
    dtype:     None for the model's own; torch.bfloat16 for 16-bit activations and effective weights under wider masks
    mean, std: per channel, what the model expects its images to be normalised by; None for models on pixels in [0, 1]
    layers, include, exclude, granularity: what is masked, as in :func:`maskops.mask_`
    branches:  ``"sequential"`` (half the activations) or ``"concatenated"`` (fewer, larger launches) for losses with
               two branches; ``"auto"`` is sequential on the CPU and concatenated on a GPU
    folded:    return plain layers with the masks folded in; otherwise masked layers
    seed:      of everything that is drawn
    progress:  show a progress bar
    """

    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    layers: str | Sequence[str] = "conv"
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    granularity: str = "weight"
    branches: str = "auto"
    folded: bool = True
    seed: int = 0
    progress: bool = True


class Run:
    """One purification under way: a working model over the user's tensors, its masks, and clean images on the device.

    method:     the name that errors, progress and the result carry
    model:      the user's model; it isn't changed
    clean_data: what :func:`maskops.data.as_tensors` takes
    setting:    a :class:`Setting`
    """

    def __init__(self, method: str, model: nn.Module, clean_data: Any, setting: Setting) -> None:
        self.method, self.setting = method, setting
        self.device = torch.device(setting.device or _device_of(model))
        if setting.dtype not in (None, _dtype_of(model), torch.bfloat16):
            raise TypeError(f"{method}: dtype must be the model's {_dtype_of(model)} or bfloat16; got {setting.dtype}")
        images, self.labels = (tensor.to(self.device) for tensor in as_tensors(clean_data))
        self.images = images.to(_dtype_of(model), memory_format=torch.channels_last)
        self.generator = torch.Generator().manual_seed(setting.seed)
        self._user_model = model
        self._masked = mask_(
            shared_copy(model, self.device), setting.granularity, setting.include, setting.exclude, setting.layers
        )
        self._prepare(shared_copy(model, self.device))
        self.history: dict[str, list[float]] = {}
        self._noted: dict[str, list[Tensor]] = {}
        self._seconds: dict[str, float] = {}
        self._epoch = 0
        self._start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _prepare(self, network: nn.Module) -> None:
        """The working model, whose masked layers compute with effective weights that are views of the arena."""
        layers = masked_layers(self._masked)
        mean, std = (self._per_channel(value) for value in (self.setting.mean, self.setting.std))
        self.model = WorkingModel(network, self.images[:2], mean, std, keep=layers)
        working = {name: self.model.network.get_submodule(name) for name in layers}
        # layers that share a weight share a mask: the first stands for all of them
        owner_of = {id(layer.weight): name for name, layer in reversed(layers.items())}
        owners = {name: owner_of[id(layer.weight)] for name, layer in layers.items()}
        learned = {owner: getattr(layers[owner], layers[owner].mask_name) for owner in owner_of.values()}
        weights = {owner: working[owner].weight for owner in learned}
        self.arena = MaskArena(weights, learned, self.setting.dtype)
        for name, owner in owners.items():
            working[name].weight = self.arena.effective_weights[owner]
            setattr(layers[name], layers[name].mask_name, Parameter(self.arena.masks[owner]))
        self._check_labels()

    def _per_channel(self, value: Sequence[float] | None) -> Tensor | None:
        if value is None:
            return None
        channels = self.images.shape[1]
        if len(value) != channels:
            raise ValueError(f"{self.method}: mean and std must have {channels} values, one per channel; got {value}")
        return torch.tensor(value, dtype=torch.float32, device=self.device)

    def _check_labels(self) -> None:
        with torch.no_grad():
            classes = self.logits(self.images[:1]).shape[1]
        if int(self.labels.max()) >= classes:
            raise ValueError(
                f"{self.method}: labels must be below the model's {classes} classes; got {int(self.labels.max())}"
            )

    def logits(self, images: Tensor, trigger: Tensor | None = None) -> Tensor:
        """The working model's logits of images in pixel space, computed in the run's precision."""
        dtype = self.setting.dtype
        if dtype in (None, images.dtype):
            with lean_autograd():
                return self.model(images, trigger)
        with lean_autograd(), torch.autocast(self.device.type, dtype=dtype):
            return self.model(images, trigger).float()

    @torch.no_grad()
    def predictions(self, batch_size: int) -> Tensor:
        """The class that the working model gives each clean image."""
        return torch.cat([self.logits(images).argmax(1) for images in self.images.split(batch_size)])

    def batches(self, steps: int, batch_size: int) -> Iterator[Tensor]:
        """Indices of ``steps`` batches, drawn with replacement, all at once."""
        drawn = torch.randint(len(self.images), (steps, batch_size), generator=self.generator)
        return iter(drawn.to(self.device, non_blocking=True))

    def new_trigger(self) -> Tensor:
        return torch.zeros_like(self.images[:1]).requires_grad_()

    @contextmanager
    def frozen_masks(self) -> Iterator[None]:
        """Within, no gradient of a mask is computed."""
        for weight in self.arena.effective_weights.values():
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in self.arena.effective_weights.values():
                weight.requires_grad_(True)

    def descend(self, *branches: tuple[float, Tensor, Tensor]) -> list[Tensor]:
        """Add the gradient of ``sum(factor * cross_entropy(f(images), labels))`` over the branches to the arena's.

        branches: (factor, images, labels) each
        returns:  the cross entropies, detached
        """
        if self._concatenates():
            factors, images, labels = zip(*branches, strict=True)
            parts = self.logits(torch.cat(images)).split([len(part) for part in images])
            losses = [F.cross_entropy(part, label) for part, label in zip(parts, labels, strict=True)]
            sum(factor * loss for factor, loss in zip(factors, losses, strict=True)).backward()
            return [loss.detach() for loss in losses]
        losses = []
        for factor, images, labels in branches:
            loss = F.cross_entropy(self.logits(images), labels)
            (factor * loss).backward()
            losses.append(loss.detach())
        return losses

    def _concatenates(self) -> bool:
        branches = self.setting.branches
        if branches not in ("auto", "sequential", "concatenated"):
            raise ValueError(
                f"{self.method}: branches must be 'auto', 'sequential' or 'concatenated'; got {branches!r}"
            )
        return branches == "concatenated" or (branches == "auto" and self.device.type != "cpu")

    def epochs(self, count: int) -> Iterator[int]:
        """0, 1, …, count - 1, behind a progress bar."""
        bar = self._progress_bar(range(count))
        for epoch in bar:
            self._epoch = epoch
            yield epoch
            if self.setting.progress:
                bar.set_postfix({name: f"{values[-1]:.3g}" for name, values in self.history.items()})

    def _progress_bar(self, epochs: range) -> Any:
        if not self.setting.progress:
            return epochs
        from tqdm import tqdm

        return tqdm(epochs, desc=self.method, unit="epoch")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; at its end put the means of what was noted into the history, and stop if one is no number.

        This is the one place where a phase waits for the device.
        """
        start = time.perf_counter()
        yield
        for what, values in self._noted.items():
            mean = float(torch.stack(values).mean())
            if not math.isfinite(mean):
                where = f"in the {name} phase of epoch {self._epoch + 1}"
                raise NonFiniteError(f"{self.method}: the {what} became {mean} {where}; the model is left as it was")
            self.history.setdefault(what, []).append(mean)
        self._noted.clear()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def note(self, what: str, value: Tensor) -> None:
        """Keep a number of this step, without waiting for it."""
        self._noted.setdefault(what, []).append(value.detach())

    def finish(self, options: Any, trigger: Tensor | None = None) -> Purification:
        """The result: masks, and the user's structure with the masks on, or folded into, its weights."""
        learned = {name: mask.detach().to("cpu", copy=True) for name, mask in masks(self._masked).items()}
        for layer in masked_layers(self._masked).values():
            mask = getattr(layer, layer.mask_name)
            setattr(layer, layer.mask_name, Parameter(mask.detach().clone()))
        model = own_parameters_(fold_(self._masked) if self.setting.folded else self._masked, self._user_model)
        timings = {**self._seconds, "total": time.perf_counter() - self._start, "peak_bytes": self._peak_bytes()}
        trigger = None if trigger is None else trigger.detach().to("cpu", copy=True).contiguous()
        setting = {**asdict(self.setting), "device": str(self.device)}
        plain = {name: _plain(value) for name, value in (asdict(options) | setting).items()}
        return Purification(model, learned, trigger, self.history, timings, {"method": self.method, **plain})

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource  # not everywhere: only where there is no GPU to ask

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _dtype_of(model: nn.Module) -> torch.dtype:
    parameter = next(model.parameters(), None)
    return torch.float32 if parameter is None else parameter.dtype
