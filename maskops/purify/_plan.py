"""What memory a purification will need, found out by running its steps on tensors without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from maskops._memory import host_memory
from maskops.purify._algorithm import Algorithm
from maskops.purify._distributed import imagine
from maskops.purify._fake import fake_copy
from maskops.purify._meter import Meter, garbage_of_its_own
from maskops.purify._options import settle
from maskops.purify._phase import Phase
from maskops.purify._savings import savings_of
from maskops.purify._sweep import ALGORITHMS
from maskops.purify.anp import ANPOptions
from maskops.purify.awm import AWMOptions


@dataclass(frozen=True)
class Plan:
    """The memory of a purification on its device, in bytes; of several processes, of the one that needs most.

    model:      the user's own, parameters and buffers; with ``offload`` what of it isn't masked
    kept:       what the run holds throughout, by name: ``"weights"`` θ in the order of the arena, ``"masks"``,
                ``"effective weights"``, ``"gradients"``, ``"optimiser"``, ``"images"``, ``"other"``
    phases:     for each kind of step the most that it needs beside all this: activations, for the most part
    preparation: the most that is needed before the first step, all in all
    options:    what was given, and what was chosen to fit the memory
    parameters: masked ones
    fits:       whether the peak is within the memory; True without one
    host:       with ``offload``, by name as in ``kept``, what the run holds in the host's memory instead
    processes:  that compute it together, each with this memory
    """

    model: int
    kept: dict[str, int]
    phases: dict[str, int]
    preparation: int
    options: dict[str, Any]
    parameters: int
    fits: bool = True
    host: dict[str, int] = field(default_factory=dict)
    processes: int = 1

    @property
    def peak(self) -> int:
        """The most bytes of tensors at one time; what libraries take as workspace comes on top."""
        return max(self.preparation, self.model + sum(self.kept.values()) + max(self.phases.values()))

    @property
    def bytes_per_parameter(self) -> float:
        """What a process holds throughout for each masked parameter of the model, the user's own not counted."""
        kept = sum(size for name, size in self.kept.items() if name not in ("images", "other"))
        return kept / max(self.parameters, 1)

    def __str__(self) -> str:
        rows = [("the model itself", self.model), *self.kept.items()]
        rows += [(f"{name}, beside that", size) for name, size in self.phases.items()]
        each = "" if self.processes == 1 else f", in each of {self.processes} processes"
        rows += [(f"most at one time{each}", self.peak)]
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
    processes: int = 1,
    preset: str = "paper",
    **options: Any,
) -> Plan:
    """What memory a purification of this model will need, without allocating any of it.

    The steps themselves run, on tensors that have shapes and no data; the model may be on the meta device. With a
    limit on it, options that save memory are added, from those that only cost time to those that round (``dtype``,
    ``weight_dtype``, ``mask_bits``) and at last, of several processes, ``shard``, and ``offload``, until the peak fits;
    then, where a step's batch must stay in one piece, a ``batch_size`` that is given is halved, down to a quarter. What
    the method refuses for this model is left out.

    method:  ``"awm"``, ``"swm"``, ``"anp"`` or ``"nft"``
    shape:   (C, H, W) of an image
    classes: how many the model tells apart
    images:  how many clean images there will be
    memory:  the limit in bytes, such as ``24e9``; None for none
    processes: as many as torchrun will start, each with a device of its own; the plan is of one with the most rows
    options: as for the method; those given here are never changed, but for ``batch_size`` as said. ``branches`` and
             ``gate`` are a GPU's by default
    returns: a :class:`Plan`, whose ``options`` can be given to the method; without ``fits`` it is the smallest found
    errors:  ValueError for an unknown method and for no images, classes or processes, and as the method itself

    >>> from maskops.models import small_vgg
    >>> found = plan(small_vgg(), shape=(3, 32, 32), classes=10, batch_size=16, layers=("conv", "linear"))
    >>> found.kept["masks"] == found.kept["weights"], found.fits
    (True, True)
    """
    about = {"shape": shape, "classes": classes, "images": images, "processes": processes, "preset": preset}
    return plans(model, method, [memory], **about, **options)[0]


def plans(
    model: nn.Module,
    method: str,
    memories: Iterable[float | None],
    *,
    shape: Sequence[int],
    classes: int,
    images: int = 500,
    processes: int = 1,
    preset: str = "paper",
    **options: Any,
) -> list[Plan]:
    """As :func:`plan`, for each of several limits: options that several of them try are tried once."""
    if method not in tuple(ALGORITHMS):
        raise ValueError(f"plan: method must be one of {', '.join(ALGORITHMS)}; got {method!r}")
    for name, count in (("classes", classes), ("images", images), ("processes", processes)):
        if count < 1:
            raise ValueError(f"plan: {name} must be at least 1; got {count}")
    chosen = settle(method, ALGORITHMS[method].presets, preset, options)
    about = {"shape": tuple(shape), "classes": classes, "images": images, "preset": preset}
    search = _Search(partial(_measured, model, method, processes=processes, **about), options, processes)
    batch = _batch_size(chosen[0], images, tuple(shape))
    known = {field.name for of in chosen for field in fields(of)} - options.keys()
    wide = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    savings = [saving for saving in savings_of(processes) if saving[0] in known and (wide or "dtype" not in saving[0])]
    with garbage_of_its_own():
        return [search.fitted(memory, batch, savings) for memory in memories]


class _Search:
    """The search for options that fit, which remembers what it has measured.

    measure: of options the plan; ValueError for those that the method refuses
    given:   options that are not to be changed, but for a batch_size
    processes: among which batches are divided
    """

    def __init__(self, measure: Callable[[dict[str, Any]], Plan], given: dict[str, Any], processes: int) -> None:
        self._compute, self._given, self._processes = measure, given, processes
        self._measured: dict[str, Plan | ValueError] = {}

    def fitted(self, memory: float | None, batch: int, savings: Sequence[tuple[str, Any]]) -> Plan:
        """The first plan that fits, by one saving after the other, or else the smallest."""
        found = self._measure(self._given)
        if memory is None:
            return found
        own = -(-batch // self._processes)
        for option, value in savings:
            if found.peak <= memory:
                break
            options = {**found.options, option: value}
            candidates = [options]
            if option == "micro_batch_size":
                sizes = _halves(found.options.get(option, own), value * own)
                candidates = [{**options, option: size} for size in sizes]
            elif option == "step_in_backward":
                candidates = [self._in_one_backward(options)]
            elif option in ("shard", "offload"):
                taken = {"step_in_backward": True, "remake_weights": True}
                candidates = [{**taken, **self._in_one_backward(options)}]
                if option == "offload":
                    candidates = [self._without({"shard"}, candidates[0])]
            found = self._smaller(found, memory, candidates)
            if found.peak <= memory and option != "micro_batch_size":
                found = self._in_larger_parts(found, memory, own)
        if found.peak > memory and "batch_size" in self._given and "micro_batch_size" not in found.options:
            halves = [{**found.options, "batch_size": max(batch // parts, 1)} for parts in (2, 4)]
            found = self._smaller(found, memory, halves)
        return replace(found, fits=found.peak <= memory)

    def _in_one_backward(self, options: dict[str, Any]) -> dict[str, Any]:
        return self._without({"micro_batch_size", "branches"}, options)

    def _without(self, names: set[str], options: dict[str, Any]) -> dict[str, Any]:
        """The options but for those of these names that were chosen."""
        return {name: value for name, value in options.items() if name not in names - self._given.keys()}

    def _smaller(self, found: Plan, memory: float, candidates: Iterable[dict[str, Any]]) -> Plan:
        """The first of the candidates that fits, or the last before one that is refused or needs more."""
        for options in candidates:
            try:
                other = self._measure(options)
            except ValueError:
                break  # such as recompute=True without a tape
            if other.peak > found.peak:
                break
            found = other
            if found.peak <= memory:
                break
        return found

    def _in_larger_parts(self, found: Plan, memory: float, batch: int) -> Plan:
        """The plan with parts of batches as large as they may be with the savings that came after them."""
        size = batch if "micro_batch_size" in self._given else found.options.get("micro_batch_size", batch)
        while size < batch:
            size = min(2 * size, batch)
            other = self._measure({**found.options, "micro_batch_size": size})
            if other.peak > memory:
                break
            found = other
        return found

    def _measure(self, options: dict[str, Any]) -> Plan:
        key = repr(sorted(options.items()))
        if key not in self._measured:
            try:
                self._measured[key] = self._compute(options)
            except ValueError as error:
                self._measured[key] = error.with_traceback(None)
        found = self._measured[key]
        if isinstance(found, ValueError):
            raise found
        return found


def _halves(size: int, least: float) -> Iterator[int]:
    """Half of a size, a quarter and so on, down to the least or 1."""
    while size > 1 and size > least:
        size = -(-size // 2)
        yield size


def _measured(
    model: nn.Module,
    method: str,
    options: dict[str, Any],
    shape: tuple[int, ...],
    classes: int,
    images: int,
    processes: int,
    preset: str,
) -> Plan:
    as_on_gpu = {"gate": "output", **({"branches": "concatenated"} if method == "awm" else {})}
    settled, _ = settle(method, ALGORITHMS[method].presets, preset, options)
    batch = _batch_size(settled, images, shape)
    least = min(max(batch, 2), images)  # one image can't be held out
    count = next(count for count in range(least, 2 * images + 1) if _learned_from(settled, count) >= batch)
    data = torch.zeros(count, *shape), torch.arange(count) % classes
    settings = {**as_on_gpu, **options, "device": "cpu", "progress": False, "batch_size": batch}
    with imagine(processes), FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
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
    stored, here = algorithm.run.images.stored, getattr(algorithm, "held_out", None) or ()
    counted = sum(tensor.nbytes for tensor in (stored, *here) if isinstance(tensor, FakeTensor))
    learned_from = _learned_from(settled, images)
    apart = (images - learned_from) * math.prod(shape) * algorithm.run.images.dtype.itemsize
    kept["other"] = max(held - own - sum(kept.values()) - counted, 0)
    kept["images"] = learned_from * stored[0].nbytes + apart
    parameters = sum(map(arena.entries, arena.weights))
    return Plan(own, kept, phases, preparation, options, parameters, host=host, processes=processes)


def _batch_size(options: Any, images: int, shape: tuple[int, ...]) -> int:
    """What the method's steps will take of so many images."""
    if isinstance(options, AWMOptions):
        options = options.for_images(torch.empty(images, *shape, device="meta"))
    return min(options.batch_size, _learned_from(options, images))


def _learned_from(options: Any, images: int) -> int:
    return options.learned_from(images) if isinstance(options, ANPOptions) else images


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


def _shown(value: Any) -> str:
    return str(value).removeprefix("torch.")
