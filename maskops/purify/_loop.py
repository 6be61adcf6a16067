"""The engine that the loops share: everything about a purification that isn't its algorithm."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from maskops._state import eval_mode, seeded_layers
from maskops._text import one_line
from maskops.augment.basic import crop_at, draw_corners, draw_mirrored, flip_where
from maskops.data import as_tensors
from maskops.purify import _finite
from maskops.purify._distributed import ALONE, Team
from maskops.purify._draws import Batch, Drawn, Mix, stacked
from maskops.purify._fake import has_data, on_host
from maskops.purify._images import CleanImages, count_held_out
from maskops.purify._phase import Lane, Phase
from maskops.purify._precision import precision
from maskops.purify._result import NonFiniteError, Purification
from maskops.purify._setting import LAYERS, NOISE, Setting
from maskops.purify._working import PixelModel

OnEpoch = Callable[[int, nn.Module], None]


class Run:
    """One purification under way: clean images on the device, and what is drawn, timed and noted.

    method:     the name that errors, progress and the result carry
    model:      the user's model; it isn't changed
    clean_data: what :func:`maskops.data.as_tensors` takes
    setting:    a :class:`Setting`
    within:     whether it is a part of a run that measures its memory
    """

    team: Team = ALONE
    """The processes that compute it; to be set before all else."""

    def __init__(
        self, method: str, model: nn.Module, clean_data: Any, setting: Setting, *, within: bool = False
    ) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(f"{method}: a purification needs gradients, which torch.inference_mode() forbids")
        self.method, self.setting, self.original = method, setting, model
        _finite.check_model(method, model)
        self.device = self._find_device(model)
        parameter_dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
        self.low_dtype = setting.dtype if setting.dtype != parameter_dtype else None
        if self.low_dtype is not None and (self.low_dtype, parameter_dtype) != (torch.bfloat16, torch.float32):
            expected = f"the model's {parameter_dtype}, or bfloat16 over float32"
            raise TypeError(f"{method}: dtype must be {expected}; got {setting.dtype}")
        with on_host():
            images, labels = as_tensors(clean_data)
        self.images, self.labels = CleanImages(images, parameter_dtype, self.device), labels.to(self.device)
        with self.named_errors():
            self.mean, self.std = (self._per_channel(value) for value in (setting.mean, setting.std))
        self.generator = torch.Generator(device="cpu").manual_seed(setting.seed)
        self.noise_generator = torch.Generator(device=self.device).manual_seed(setting.seed + NOISE)
        self._layers_generator = torch.Generator(device="cpu").manual_seed(setting.seed + LAYERS)
        self.lane = Lane(self.device, [self.noise_generator], self.team)
        self.execution: dict[str, str] = {}
        self.history: dict[str, list[float]] = {}
        self._noted: dict[str, list[Tensor]] = {}
        self._seconds: dict[str, float] = {}
        self._epoch = 0
        self._start = time.perf_counter()
        self.beside: Callable[[], dict[str, Tensor]] = dict
        """What the algorithm changes in place, beside the run's own tensors, by names for people."""
        self.saved = ""
        """Where the last good state is, for errors."""
        self.replaying = False
        """Whether epochs go by that another process has run: nothing is reported of these."""
        if self.device.type == "cuda" and not within:
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

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Within, TypeErrors and ValueErrors begin with the method's name, and torch's complaints become such."""
        try:
            yield
        except (TypeError, ValueError) as error:
            named = str(error) if str(error).startswith(self.method) else f"{self.method}: {error}"
            raise type(error)(named) from error
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # no memory is left, or a device failed
                raise
            images = tuple(self.images.shape[1:])
            reason = f"{self.method}: the model can't compute on images {images}: {one_line(str(error))}"
            raise ValueError(reason) from error

    def _per_channel(self, value: Sequence[float] | None) -> Tensor | None:
        if value is None:
            return None
        channels = self.images.shape[1]
        if len(value) != channels:
            raise ValueError(f"mean and std must have {channels} values, one per channel; got {value}")
        return torch.tensor(value, dtype=self.images.dtype, device=self.device)

    def check_labels(self, model: nn.Module) -> None:
        """Raise when a label isn't among the classes of a model on pixels."""
        with torch.no_grad():
            classes = model(self.images[:2]).shape[1]
        if has_data() and int(self.labels.max()) >= classes:
            raise ValueError(f"labels must be below the model's {classes} classes; got {int(self.labels.max())}")

    def trainable_copy(self) -> PixelModel:
        """The user's model on pixels, with parameters of its own that require gradients, in train mode."""
        with self.named_errors():
            try:
                network = copy.deepcopy(self.original).to(self.device).requires_grad_(True)
            except (TypeError, RuntimeError) as error:
                raise TypeError(f"the model can't be copied: {str(error).splitlines()[0]}") from error
            model = PixelModel(network, self.mean, self.std, self.low_dtype)
            with self.seeded_layers():
                self.check_labels(model.eval())
        return model.train()

    def hold_out(self, share: float) -> tuple[Tensor, Tensor]:
        """Take ``round(share * n)`` random clean images, at least one, out of what is learned from.

        errors: ValueError for a single image
        """
        n = len(self.labels)
        if n < 2:
            raise ValueError(f"{self.method}: holding out clean images needs at least 2 of them; got {n}")
        count = count_held_out(n, share)
        order = torch.randperm(n, generator=self.generator, device="cpu").to(self.device)
        held_out = self.images.at(order[:count]), self.labels[order[:count]]
        self.images.keep(order[count:])
        self.labels = self.labels[order[count:]]
        return held_out

    def draw(self, steps: int, batch_size: int, mix: Mix | None = None) -> Drawn:
        """The draws of so many steps, on the host: images with replacement, and what the setting's augmentation draws.

        mix: further draws for each batch
        """
        index = torch.randint(len(self.images), (steps, batch_size), generator=self.generator, device="cpu")
        return stacked([self._draw_augmentation(batch, mix) for batch in index])

    def _draw_augmentation(self, index: Tensor, mix: Mix | None = None) -> Drawn:
        drawn = {"index": index}
        if self._padding:
            drawn["corners"] = draw_corners(len(index), self._padding, self.generator)
        if self.setting.flip:
            drawn["mirrored"] = draw_mirrored(len(index), self.generator)
        if mix is not None:
            drawn |= mix((len(index), *self.images.shape[1:]), self.generator)
        return drawn

    @property
    def _padding(self) -> int:
        return round(self.images.shape[2] / 8) if self.setting.crop == "auto" else self.setting.crop

    def steps(
        self,
        name: str,
        step: Callable[[Batch], dict[str, Tensor]],
        count: int,
        batch_size: int,
        *,
        mix: Mix | None = None,
        why_eager: str | None = None,
        **how: Any,
    ) -> Phase:
        """A phase of so many steps, each on a batch of clean images drawn with replacement.

        mix: further draws for each batch
        how: ``before``, ``after``, ``around``, ``shrink`` and ``note`` of :class:`Phase`
        """
        draw = partial(self.draw, count, batch_size, mix)
        return Phase(name, step, draw, self.lane, why_eager=self._why_eager or why_eager, **how)

    @property
    def _why_eager(self) -> str | None:
        return self.team.why_eager if self.setting.graphs else "graphs=False"

    def varying(self, value: float) -> Tensor:
        """A number that changes between phases, where a recorded step finds it."""
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def batches(self, steps: int, batch_size: int) -> Iterator[Batch]:
        """So many batches, drawn with replacement, for steps that aren't a :class:`Phase`."""
        drawn = torch.randint(len(self.images), (steps, batch_size), generator=self.generator, device="cpu")
        return (self.batch_of(index) for index in drawn)

    def one_pass(self, batch_size: int, least: int = 1) -> Iterator[Batch]:
        """Batches that together hold every clean image once, in random order.

        least: the last, which may be smaller, is left out if it is smaller than that
        """
        order = torch.randperm(len(self.images), generator=self.generator, device="cpu")
        return (self.batch_of(index) for index in order.split(batch_size) if len(index) >= least)

    def batch_of(self, index: Tensor) -> Batch:
        """These images as a batch on the device, with draws for their augmentation."""
        with on_host():
            drawn = self._draw_augmentation(index.cpu())
        return Batch(**{name: tensor.to(self.device, non_blocking=True) for name, tensor in drawn.items()})

    def sample(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images of a batch, augmented as the setting says, and their labels."""
        return self.sample_images(batch), self.labels.index_select(0, batch.index)

    def sample_images(self, batch: Batch) -> Tensor:
        """The images alone."""
        images = self.images.at(batch.index)
        if batch.corners is not None:
            images = crop_at(images, self._padding, batch.corners)
        if batch.mirrored is not None:
            images = flip_where(images, batch.mirrored)
        return images

    def epochs(self, count: int) -> Iterator[int]:
        """0, 1, …, count - 1, behind a progress bar."""
        epochs = range(count)
        bar = self._progress_bar(epochs)
        for epoch in bar:
            self._epoch = epoch
            yield epoch
            if bar is not epochs:
                bar.set_postfix({name: f"{values[-1]:.3g}" for name, values in self.history.items()})

    def _progress_bar(self, epochs: range) -> Any:
        if not self.setting.progress or self.team.rank > 0:
            return epochs
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError(
                f"{self.method}: the progress bar needs tqdm; install it or give progress=False"
            ) from error
        return tqdm(epochs, desc=self.method, unit="epoch")

    def seeded_layers(self) -> AbstractContextManager[None]:
        """:func:`maskops._state.seeded_layers` with the next of the seeds that follow from the run's."""
        with on_host():
            seed = int(torch.randint(2**31, (), generator=self._layers_generator, device="cpu"))
        return seeded_layers(seed + self.team.rank, self.device)  # each process draws for rows of its own

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time steps that aren't a :class:`Phase`; at the end keep what was noted.

        This is the one place where they ask the device for a number.
        """
        start = time.perf_counter()
        with self.quiet():
            yield
        self.keep(name, {what: torch.stack(values).cpu() for what, values in self._noted.items()}, start)
        self._noted.clear()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Within, torch draws, rounds and chooses algorithms as the run's setting says, whatever is set around it."""
        # a backward inside somebody's autocast would be cast
        with self.seeded_layers(), torch.autocast(self.device.type, enabled=False), precision(self.setting.tf32):
            yield

    def keep(self, name: str, numbers: dict[str, Tensor], start: float) -> None:
        """Put the means of a phase's numbers into the history, and its time to the others; stop if one is no number."""
        for what, values in numbers.items():
            mean = float(values.mean())
            if not math.isfinite(mean):
                where = f"in the {name} phase of epoch {self._epoch + 1}{_finite.origin(self, name)}"
                raise self.failed(f"the {what} became {mean} {where}")
            self.history.setdefault(what, []).append(mean)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def failed(self, what: str) -> NonFiniteError:
        return NonFiniteError(f"{self.method}: {what}; the model is left as it was{self.saved}")

    def note(self, what: str, value: Tensor) -> None:
        """Keep a number of a step that isn't a :class:`Phase`'s, without waiting for it."""
        self._noted.setdefault(what, []).append(value.detach())

    def report(self, on_epoch: OnEpoch | None, epoch: int, model: nn.Module) -> None:
        """Hand the model, in eval mode, to the user's ``on_epoch``."""
        if on_epoch is not None and not self.replaying:
            with eval_mode(model):
                on_epoch(epoch, model)

    shards = 1
    """Over how many processes what is learned is spread."""

    def tensors(self) -> dict[str, Tensor]:
        """What steps change in place, by names of its own."""
        return {}

    def whole_tensors(self) -> dict[str, Tensor]:
        """The same, with what is spread over processes put together: all must ask for it."""
        return self.tensors()

    @torch.no_grad()
    def take_up(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with these, as :meth:`whole_tensors` gives them."""
        for name, value in self.tensors().items():
            value.copy_(tensors[name])

    def generators(self) -> dict[str, torch.Generator]:
        """Where the run draws from."""
        return {"draws": self.generator, "noise": self.noise_generator, "layers": self._layers_generator}

    def seconds(self) -> dict[str, float]:
        """Of each phase so far, and in total."""
        return {**self._seconds, "total": time.perf_counter() - self._start}

    def go_on_from(self, history: dict[str, list[float]], seconds: dict[str, float]) -> None:
        """Take up numbers and times of a run that another process began."""
        self.history, seconds = {name: list(values) for name, values in history.items()}, dict(seconds)
        self._start -= seconds.pop("total")
        self._seconds = seconds

    def finish(self, options: Any, model: nn.Module, **results: Any) -> Purification:
        """The result, whose model has its layers in the modes, and its parameters as trainable, as the user's are.

        results: ``masks``, ``trigger`` and ``scores`` where the method has them
        """
        for name, module in self.original.named_modules():
            model.get_submodule(name).training = module.training
        for name, parameter in self.original.named_parameters():
            model.get_parameter(name).requires_grad_(parameter.requires_grad)
        timings = {**self.seconds(), "peak_bytes": self._peak_bytes()}
        results = {"masks": {}, "trigger": None, **results}
        if results["trigger"] is not None:
            results["trigger"] = results["trigger"].detach().to("cpu", copy=True).contiguous()
        settings = {**plain_options(self.setting), "device": str(self.device)}
        options = {"method": self.method, **plain_options(options), **settings}
        how = {"timings": timings, "execution": self.execution}
        return Purification(model=model, history=self.history, options=options, **how, **results)

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # Windows
            return 0
        kilobytes = sys.platform != "darwin"
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if kilobytes else 1)


def cosine(step: int, steps: int) -> float:
    """The factor on a learning rate that falls from 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def plain_options(options: Any) -> dict[str, Any]:
    """The fields of a dataclass of options, as values that JSON knows."""
    return {name: _plain(value) for name, value in asdict(options).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value
