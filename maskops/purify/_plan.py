"""What memory a purification will need, found out by running its steps on tensors without data."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from maskops._memory import host_memory, on_host_now
from maskops.purify._algorithm import Algorithm
from maskops.purify._fake import fake_copy
from maskops.purify._options import settle
from maskops.purify._phase import Phase
from maskops.purify._sweep import ALGORITHMS
from maskops.purify.awm import AWMOptions

_EXACT = {"gate": "bits"}, {"gate": "bits", "recompute": True}
_REMADE = {"remake_weights": True}
_ROUNDED = {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "weight_dtype": torch.bfloat16}
_LADDERS: dict[str, tuple[dict[str, Any], ...]] = {
    "awm": (
        {},
        {"branches": "sequential"},
        *({"branches": "sequential", **exact} for exact in _EXACT),
        {**_EXACT[-1], "step_in_backward": True},
        {**_EXACT[-1], "step_in_backward": True, **_REMADE},
        {**_EXACT[-1], "step_in_backward": True, **_REMADE, "state_bits": 8},
        *({**_EXACT[-1], "step_in_backward": True, **_REMADE, "state_bits": 8, **rounded} for rounded in _ROUNDED),
        {**_EXACT[-1], "step_in_backward": True, **_REMADE, "state_bits": 8, **_ROUNDED[-1], "offload": True},
    ),
    "swm": (
        {},
        *_EXACT,
        {**_EXACT[-1], **_REMADE},
        {**_EXACT[-1], **_REMADE, "state_bits": 8},
        *({**_EXACT[-1], **_REMADE, "state_bits": 8, **rounded} for rounded in _ROUNDED),
    ),
    "anp": ({}, {"gate": "bits"}, {"gate": "bits", **_ROUNDED[0]}),
    "nft": ({}, {"gate": "bits"}, {"gate": "bits", **_ROUNDED[0]}),
}
"""Options that save memory, from those that cost nothing to those that change the result."""


@dataclass(frozen=True)
class Plan:
    """The memory of a purification on its device, in bytes.

    model:      the user's own, parameters and buffers; with ``offload`` what of it isn't masked
    kept:       what the run holds throughout, by name: ``"weights"`` θ in the order of the arena, ``"masks"``,
                ``"effective weights"``, ``"gradients"``, ``"optimiser"``, ``"images"``, ``"other"``
    phases:     for each kind of step the most that it needs beside all this: activations, for the most part
    preparation: the most that is needed before the first step, all in all
    options:    what was given, and what was chosen to fit the memory
    parameters: masked ones
    fits:       whether the peak is within the memory; True without one
    host:       with ``offload``, by name as in ``kept``, what the run holds in the host's memory instead
    """

    model: int
    kept: dict[str, int]
    phases: dict[str, int]
    preparation: int
    options: dict[str, Any]
    parameters: int
    fits: bool = True
    host: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """The most bytes of tensors at one time; what libraries take as workspace comes on top."""
        return max(self.preparation, self.model + sum(self.kept.values()) + max(self.phases.values()))

    @property
    def bytes_per_parameter(self) -> float:
        """What the run holds throughout for each masked parameter, the user's model not counted."""
        kept = sum(size for name, size in self.kept.items() if name not in ("images", "other"))
        return kept / max(self.parameters, 1)

    def __str__(self) -> str:
        rows = [("the model itself", self.model), *self.kept.items()]
        rows += [(f"{name}, beside that", size) for name, size in self.phases.items()]
        rows += [("most at one time", self.peak)]
        rows += [(f"{name}, in the host's memory", size) for name, size in self.host.items()]
        width = max(len(name) for name, _ in rows)
        chosen = ", ".join(f"{name}={_shown(value)}" for name, value in self.options.items())
        lines = [f"{name:<{width}}  {size / 1e9:9.3f} GB" for name, size in rows]
        return "\n".join([*lines, f"options: {chosen or 'the defaults'}"])


def plan(
    model: nn.Module,
    method: str = "awm",
    *,
    shape: Sequence[int],
    classes: int,
    images: int = 500,
    memory: float | None = None,
    preset: str = "paper",
    **options: Any,
) -> Plan:
    """What memory a purification of this model will need, without allocating any of it.

    The steps themselves run, on tensors that have shapes and no data; the model may be on the meta device. With a
    limit on it, options that save memory are added, from those that only cost time to those that round (``dtype``,
    ``weight_dtype``) and at last ``offload``, until the peak fits; then a ``batch_size`` that is given is halved, down
    to a quarter. What the method refuses for this model is left out.

    method:  ``"awm"``, ``"swm"``, ``"anp"`` or ``"nft"``
    shape:   (C, H, W) of an image
    classes: how many the model tells apart
    images:  how many clean images there will be
    memory:  the limit in bytes, such as ``24e9``; None for none
    options: as for the method; those given here are never changed, but for ``batch_size`` as said. ``branches`` and
             ``gate`` are a GPU's by default
    returns: a :class:`Plan`, whose ``options`` can be given to the method; without ``fits`` it is the smallest found
    errors:  ValueError for an unknown method and for no images or classes, and as the method itself

    >>> from maskops.models import small_vgg
    >>> found = plan(small_vgg(), shape=(3, 32, 32), classes=10, batch_size=16, layers=("conv", "linear"))
    >>> found.kept["masks"] == found.kept["weights"], found.fits
    (True, True)
    """
    if method not in tuple(ALGORITHMS):
        raise ValueError(f"plan: method must be one of {', '.join(ALGORITHMS)}; got {method!r}")
    for name, count in (("classes", classes), ("images", images)):
        if count < 1:
            raise ValueError(f"plan: {name} must be at least 1; got {count}")
    about = {"shape": tuple(shape), "classes": classes, "images": images, "preset": preset}
    smallest = None
    wide = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    for candidate in _candidates(method, options, memory is not None, wide):
        try:
            found = _measured(model, method, candidate, **about)
        except ValueError:
            if candidate == options:
                raise
            continue  # such as recompute=True without a tape
        if memory is None or found.peak <= memory:
            return found
        smallest = min(smallest or found, found, key=lambda each: each.peak)
    return replace(smallest, fits=False)


def _candidates(method: str, given: Mapping[str, Any], search: bool, wide: bool) -> Iterator[dict[str, Any]]:
    ladder = [rung for rung in _LADDERS[method] if wide or "dtype" not in rung] if search else [{}]
    rungs = [{**rung, **given} for rung in ladder]
    seen: list[dict[str, Any]] = []
    for rung in rungs:
        if rung not in seen and (rung == given or _allowed(rung)):
            seen.append(rung)
            yield rung
    if search and isinstance(given.get("batch_size"), int):
        for parts in (2, 4):
            yield {**seen[-1], "batch_size": max(given["batch_size"] // parts, 1)}


def _allowed(options: Mapping[str, Any]) -> bool:
    alone = options.get("granularity", "weight") != "weight" or options.get("branches") == "sequential"
    return not (options.get("step_in_backward") and alone)


def _measured(
    model: nn.Module,
    method: str,
    options: dict[str, Any],
    shape: tuple[int, ...],
    classes: int,
    images: int,
    preset: str,
) -> Plan:
    as_on_gpu = {"gate": "output", **({"branches": "concatenated"} if method == "awm" else {})}
    count = _batch_size(settle(method, ALGORITHMS[method].presets, preset, options)[0], images, shape)
    data = torch.zeros(count, *shape), torch.arange(count) % classes
    settings = {**as_on_gpu, **options, "device": "cpu", "progress": False, "batch_size": count}
    with _only_new_garbage(), FakeTensorMode(allow_non_fake_inputs=True), _Meter() as meter:
        with host_memory() if options.get("offload") else nullcontext():
            copied = fake_copy(model)
        own = meter.now()
        algorithm = ALGORITHMS[method](copied, data, preset, None, settings)
        for phase in _first_epoch(algorithm):
            _one_step(algorithm, phase)
        preparation = meter.peak
        held = meter.now()
        phases = {}
        for phase in _first_epoch(algorithm):
            meter.begin()
            _one_step(algorithm, phase)
            phases[phase.name] = meter.peak - held
        kept = _kept(algorithm)
    arena, host = algorithm.run.arena, {}
    if arena.memory.elsewhere:
        host = {name: kept.pop(name) for name in ("weights", "masks", "optimiser")}
        # which the meter took for the host's, as is all that was made from the model alone
        copied = (*algorithm.run.model.parameters(), *algorithm.run.model.buffers())
        moved = sum(tensor.nbytes for tensor in copied if not arena.is_effective(tensor))
        own, held, preparation = own + moved, held + moved, preparation + moved
    kept["images"] = images * algorithm.run.images.stored[0].nbytes
    kept["other"] = max(held - own - sum(kept.values()) + kept["images"], 0)
    parameters = sum(weight.numel() for weight in arena.weights.values())
    return Plan(own, kept, phases, preparation, options, parameters, host=host)


def _batch_size(options: Any, images: int, shape: tuple[int, ...]) -> int:
    """What the method's steps will take of so many images."""
    if isinstance(options, AWMOptions):
        options = options.for_images(torch.empty(images, *shape, device="meta"))
    return min(options.batch_size, images)


def _first_epoch(algorithm: Algorithm) -> Iterator[Phase]:
    names: set[str] = set()
    for phase in algorithm.phases():
        if phase.name in names:
            return
        names.add(phase.name)
        yield phase


def _one_step(algorithm: Algorithm, phase: Phase) -> None:
    with algorithm.run.quiet(), phase.around():
        phase.start()
        phase.left = 1
        phase.advance()
        phase.finish()


def _kept(algorithm: Algorithm) -> dict[str, int]:
    arena = algorithm.run.arena
    state = [value for optimizer in algorithm.optimizers for of in optimizer.state.values() for value in of.values()]
    tensors: dict[str, Iterable[Tensor | None]] = {
        "weights": [arena.weight],
        "masks": [arena.mask, arena.noise],
        "effective weights": [arena.effective],
        "gradients": [arena.grad],
        "optimiser": [value for value in state if isinstance(value, Tensor)],
    }
    return {name: sum(value.nbytes for value in values if value is not None) for name, values in tensors.items()}


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Within, a collection of garbage looks only at what was made since: else each goes through all of the process."""
    mine = gc.get_freeze_count() == 0
    if mine:
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


class _Meter(TorchDispatchMode):
    """Bytes of tensors without data, as they come and go."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._total = self.peak = 0

    def begin(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now()

    def now(self) -> int:
        gc.collect()
        self._forget_dead()
        return self._total

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, FakeTensor):
                self._note(tensor)
        if self._total > self.peak:  # who is dead is looked for only where it may matter
            self._forget_dead()
            self.peak = max(self.peak, self._total)
        return result

    def _note(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        known, size = self._alive.get(storage._cdata, (None, 0))
        if known is None or known.expired():
            length = 0 if on_host_now() else storage.nbytes()
            self._alive[storage._cdata] = StorageWeakRef(storage), length
            self._total += length - size

    def _forget_dead(self) -> None:
        for key in [key for key, (storage, _) in self._alive.items() if storage.expired()]:
            self._total -= self._alive.pop(key)[1]


def _shown(value: Any) -> str:
    return str(value).removeprefix("torch.")
