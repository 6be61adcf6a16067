"""The engine that the loops share: everything about a purification that isn't its algorithm."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
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
from maskops.nn import GRANULARITIES, NORMS
from maskops.purify._options import choice, number
from maskops.purify._working import WorkingModel, shared_copy


class NonFiniteError(RuntimeError):
    """A loss was NaN or infinite; the message says in which phase. The user's model is as it was."""


@dataclass(frozen=True)
class Purification:
    """What a purification returns.

    model:   the purified model, of the user's class and in the user's mode (train or eval): plain layers with the masks
             folded in, or masked layers if that was asked for. It shares no tensor with the user's
    masks:   name -> mask on the CPU, such as ``"conv1.mask"``
    trigger: the last trigger that the inner maximisation found, (1, C, H, W) in pixel units; None for methods without
    history: name -> one number per epoch
    timings: seconds of each phase and in total; ``peak_bytes`` of memory on the GPU, or else of the whole process
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
    seed:      of everything that a run draws
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

    def __post_init__(self) -> None:
        number("purify", self, "seed", int, 0)
        choice("purify", self, "granularity", GRANULARITIES)
        choice("purify", self, "branches", ("auto", "sequential", "concatenated"))
        for name in ("folded", "progress"):
            choice("purify", self, name, (True, False))
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, _channel_values(name, values))
        if (self.mean is None) != (self.std is None):
            raise ValueError("purify: mean and std must be given together")


def _channel_values(name: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        floats = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        floats = ()
    if not floats or not all(math.isfinite(value) and (name == "mean" or value > 0) for value in floats):
        kind = "finite" if name == "mean" else "positive"
        raise ValueError(f"purify: {name} must be {kind} numbers, one per channel; got {values!r}")
    return floats


class Run:
    """One purification under way: a working model over the user's tensors, its masks, and clean images on the device.

    method:     the name that errors, progress and the result carry
    model:      the user's model; it isn't changed
    clean_data: what :func:`maskops.data.as_tensors` takes
    setting:    a :class:`Setting`
    """

    def __init__(self, method: str, model: nn.Module, clean_data: Any, setting: Setting) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(f"{method}: a purification needs gradients, which torch.inference_mode() forbids")
        self.method, self.setting = method, setting
        self.device = self._find_device(model)
        parameter_dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
        self._low = setting.dtype if setting.dtype != parameter_dtype else None
        if self._low is not None and (self._low, parameter_dtype) != (torch.bfloat16, torch.float32):
            expected = f"the model's {parameter_dtype}, or bfloat16 over float32"
            raise TypeError(f"{method}: dtype must be {expected}; got {setting.dtype}")
        images, self.labels = (tensor.to(self.device) for tensor in as_tensors(clean_data))
        self.images = images.to(parameter_dtype, memory_format=torch.channels_last)
        self.generator = torch.Generator(device="cpu").manual_seed(setting.seed)
        try:
            self._masked = shared_copy(model).to(self.device)
            network = shared_copy(self._masked)
            mask_(self._masked, setting.granularity, setting.include, setting.exclude, setting.layers)
            self._prepare(network)
        except (TypeError, ValueError) as error:
            named = str(error) if str(error).startswith(method) else f"{method}: {error}"
            raise type(error)(named) from error
        self.history: dict[str, list[float]] = {}
        self._noted: dict[str, list[Tensor]] = {}
        self._seconds: dict[str, float] = {}
        self._epoch = 0
        self._start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _find_device(self, model: nn.Module) -> torch.device:
        device = self.setting.device
        if device is None:
            device = next((parameter.device for parameter in model.parameters()), "cpu")
        try:
            # "cuda" is another device than "cuda:0" until a tensor is there
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"{self.method}: device {device!r}: {str(error).splitlines()[0]}") from error

    def _prepare(self, network: nn.Module) -> None:
        """The working model, whose masked layers compute with effective weights that are views of the arena."""
        layers = masked_layers(self._masked)
        if self._low is not None and any(isinstance(layer, NORMS) for layer in layers.values()):
            raise TypeError(f"dtype {self._low} is for masks on convolutions and linear layers, not on norms")
        mean, std = (self._per_channel(value) for value in (self.setting.mean, self.setting.std))
        self.model = WorkingModel(network, self.images[:2], mean, std, masked=layers, dtype=self._low)
        if self.model.unused:
            raise ValueError(f"the model's forward doesn't use {', '.join(self.model.unused)}; use exclude=")
        # layers that share a weight share a mask: the first stands for all of them
        owner_of = {id(layer.weight): name for name, layer in reversed(layers.items())}
        self._owners = {name: owner_of[id(layer.weight)] for name, layer in layers.items()}
        working = {name: self.model.network.get_submodule(name) for name in layers}
        weights = {owner: working[owner].weight for owner in owner_of.values()}
        learned = {owner: getattr(layers[owner], layers[owner].mask_name) for owner in weights}
        self.arena = MaskArena(weights, learned, self._low)
        self._set_masks(self.arena.masks)
        for name, owner in self._owners.items():
            working[name].weight = self.arena.effective_weights[owner]
        self._learn(True)
        self._check_labels()

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        parameters = {owner: Parameter(mask) for owner, mask in masks.items()}
        for name, layer in masked_layers(self._masked).items():
            setattr(layer, layer.mask_name, parameters[self._owners[name]])

    def _per_channel(self, value: Sequence[float] | None) -> Tensor | None:
        if value is None:
            return None
        channels = self.images.shape[1]
        if len(value) != channels:
            raise ValueError(f"mean and std must have {channels} values, one per channel; got {value}")
        return torch.tensor(value, dtype=self.images.dtype, device=self.device)

    def _check_labels(self) -> None:
        with torch.no_grad():
            classes = self.logits(self.images[:1].clone()).shape[1]
        if int(self.labels.max()) >= classes:
            raise ValueError(f"labels must be below the model's {classes} classes; got {int(self.labels.max())}")

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

    def batches(self, steps: int, batch_size: int) -> Iterator[Tensor]:
        """Indices of ``steps`` batches, drawn with replacement, all at once."""
        drawn = torch.randint(len(self.images), (steps, batch_size), generator=self.generator, device="cpu")
        return iter(drawn.to(self.device, non_blocking=True))

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

    def descend(self, *branches: tuple[float, Tensor, Tensor]) -> list[Tensor]:
        """Add the gradient of ``sum(factor * cross_entropy(f(images), labels))`` over the branches to the arena's.

        branches: (factor, images, labels) each
        returns:  the cross entropies, detached
        """
        auto = "sequential" if self.device.type == "cpu" else "concatenated"
        if {"auto": auto}.get(self.setting.branches, self.setting.branches) == "concatenated":
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
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError(
                f"{self.method}: the progress bar needs tqdm; install it or give progress=False"
            ) from error
        return tqdm(epochs, desc=self.method, unit="epoch")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; at its end put the means of what was noted into the history, and stop if one is no number.

        This is the one place where a phase waits for the device.
        """
        start = time.perf_counter()
        # a backward inside somebody's autocast would be cast
        with torch.autocast(self.device.type, enabled=False):
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
        if not bool(torch.isfinite(self.arena.mask).all()):
            raise NonFiniteError(f"{self.method}: a mask became nan or infinite; the model is left as it was")
        layers = masked_layers(self._masked)
        self._set_masks({name: _laid_out_as(layers[name].weight, mask) for name, mask in self.arena.masks.items()})
        learned = {name: mask.detach().to("cpu", copy=True).contiguous() for name, mask in masks(self._masked).items()}
        # folding replaces the masked weights: no need to copy them first
        replaced = {id(layer.weight): layer.weight for layer in layers.values()} if self.setting.folded else {}
        model = copy.deepcopy(self._masked, replaced)
        model = fold_(model) if self.setting.folded else model
        timings = {**self._seconds, "total": time.perf_counter() - self._start, "peak_bytes": self._peak_bytes()}
        trigger = None if trigger is None else trigger.detach().to("cpu", copy=True).contiguous()
        setting = {**asdict(self.setting), "device": str(self.device)}
        plain = {name: _plain(value) for name, value in (asdict(options) | setting).items()}
        return Purification(model, learned, trigger, self.history, timings, {"method": self.method, **plain})

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # Windows
            return 0
        kilobytes = sys.platform != "darwin"
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if kilobytes else 1)


def _laid_out_as(weight: Tensor, mask: Tensor) -> Tensor:
    """The mask in memory of its own, in the weight's layout where it has the weight's shape."""
    mask = mask.detach()
    if mask.shape != weight.shape:
        return mask.clone(memory_format=torch.contiguous_format)
    return torch.empty_like(weight, dtype=mask.dtype, requires_grad=False).copy_(mask)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value
