"""Several processes that compute one run together: each takes its rows of every batch, and sums go over all."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from maskops._text import one_line
from maskops.checkpoint import CheckpointError
from maskops.purify import _failures
from maskops.purify._whole_norms import WholeBatchNorms

T = TypeVar("T")

# under the names that torch has given them by now
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)

_KINDS = (CheckpointError, ValueError, TypeError, ImportError, OSError)
"""What the error of one process is for the others."""

_GONE = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|socket closed|broken pipe|timed? ?out"
    r"|communicator was aborted|nccl(Remote|System)Error|remote process|unhandled system error",
    re.IGNORECASE,
)
"""How gloo and NCCL say that another process doesn't answer: most of their errors are plain RuntimeErrors."""


_LOOK = 0.5
"""Seconds after which a process that waits for the others looks whether one of them has failed."""

_WAITED = "Operation timed out!"
"""What torch says where the time of a wait is over; of a connection systems say nearly the same, within more words."""


class ProcessError(RuntimeError):
    """Another process of the run has failed, and with it this one."""


@dataclass(frozen=True)
class Part:
    """A process's part of a batch.

    rows:  which; None for all. A process that gets none takes the first, which then counts nothing
    share: of the batch, as a fraction of 1
    count: of the whole batch
    """

    count: int
    rows: slice | None = None
    share: float = 1.0

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor (B, …)."""
        return tensor if self.rows is None else tensor[self.rows]

    def scaled(self, mean: Tensor) -> Tensor:
        """What a mean over these rows adds to the mean over the batch."""
        return mean if self.share == 1 else self.share * mean


class Team:
    """The processes of one run. This class is a team of one, for which there is nothing to do."""

    rank, size = 0, 1
    why_eager: str | None = None
    """Why steps can't be recorded as CUDA graphs; None if they can."""

    def begin(self) -> None:
        """Begin a run, before anything that the processes do together in it."""

    def part(self, count: int) -> Part:
        """This process's part of a batch of so many."""
        return Part(count)

    def check(self, network: nn.Module, device: torch.device, batch_statistics: bool, track_statistics: bool) -> None:
        """Raise a ValueError for a device, or layers, whose work can't be spread over the processes."""

    def whole_batch(self, part: Part) -> AbstractContextManager[object]:
        """Within, batch norms on the statistics of their batch compute with those of the whole batch."""
        return nullcontext()

    def add(self, *tensors: Tensor) -> None:
        """Sum each tensor over the processes, in place."""

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes; the tensor itself stays as it is."""
        return tensor

    def adding(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to sum a contiguous tensor over the processes, in place; what is returned waits for the sum."""
        return lambda: None

    def gather(self, whole: Tensor) -> None:
        """Fill a flat tensor, of which each process has written its own of as many equal parts, from the others."""

    def sum_part(self, whole: Tensor) -> Tensor:
        """This process's own of the equal parts of the sum over the processes of a flat tensor."""
        return whole

    def most(self, tensor: Tensor) -> None:
        """The largest over the processes of each element, in place."""

    def same(self, about: Callable[[], Mapping[str, Any]]) -> None:
        """Raise a ValueError in every process unless what they tell about themselves is the same."""

    def first(self, value: Callable[[], T]) -> T:
        """What the first process computes."""
        return value()

    def all_or_none(self) -> AbstractContextManager[object]:
        """An error that is raised within, where nothing is summed, by one process is raised by all of them."""
        return nullcontext()

    def ending_together(self) -> AbstractContextManager[object]:
        """An error that is raised within by one process ends the others when they next wait for it."""
        return nullcontext()

    def settled(self, device: torch.device) -> None:
        """Wait for what a GPU has been asked to do, unless another process, for which that waits, has failed."""


class _Processes(Team):
    why_eager = "sums over several processes aren't recorded"

    def __init__(self, method: str, rank: int, size: int) -> None:
        self._method, self.rank, self.size = method, rank, size
        self._agreed: int | None = None

    def begin(self) -> None:
        _failures.begin()

    def part(self, count: int) -> Part:
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        own = each + (self.rank < more)
        return Part(count, slice(start, start + own), own / count) if own else Part(count, slice(0, 1), 0.0)

    def check(self, network: nn.Module, device: torch.device, batch_statistics: bool, track_statistics: bool) -> None:
        self._check_device(device)
        for name, module in network.named_modules():
            if batch_statistics and isinstance(module, nn.SyncBatchNorm):
                raise ValueError(f"{name} is a SyncBatchNorm: give a plain batch norm, which becomes one by itself")
            if track_statistics and isinstance(module, _InstanceNorm) and module.running_mean is not None:
                raise ValueError(f"several processes can't follow the running statistics of the instance norm {name}")

    def whole_batch(self, part: Part) -> AbstractContextManager[object]:
        return WholeBatchNorms(self, part.count, part.share > 0)

    def add(self, *tensors: Tensor) -> None:
        if len(tensors) == 1:
            self._reduce(tensors[0], dist.ReduceOp.SUM)
        elif tensors:
            together = torch.cat([tensor.reshape(-1) for tensor in tensors])
            self._reduce(together, dist.ReduceOp.SUM)
            for tensor, total in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def total(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        self.add(total)
        return total

    def adding(self, tensor: Tensor) -> Callable[[], None]:
        return self._begin(dist.all_reduce, tensor)

    @torch.no_grad()
    def gather(self, whole: Tensor) -> None:
        data = whole.view(torch.uint8)  # which every backend takes
        self._begin(_all_gather, data, data.chunk(self.size)[self.rank].clone())()

    @torch.no_grad()
    def sum_part(self, whole: Tensor) -> Tensor:
        part = whole.new_empty(len(whole) // self.size)
        self._begin(_reduce_scatter, part, whole)()
        return part

    def most(self, tensor: Tensor) -> None:
        self._reduce(tensor, dist.ReduceOp.MAX)

    @torch.no_grad()
    def _reduce(self, tensor: Tensor, op: Any) -> None:
        if tensor.is_contiguous():
            self._begin(dist.all_reduce, tensor, op)()
        else:
            dense = tensor.contiguous()
            self._begin(dist.all_reduce, dense, op)()
            tensor.copy_(dense)

    def same(self, about: Callable[[], Mapping[str, Any]]) -> None:
        with self.all_or_none():
            own = dict(about())
        first, *others = self._gathered(own)
        for rank, other in enumerate(others, start=1):
            for what, value in first.items():
                if other[what] != value:
                    raise ValueError(f"{self._method}: {_difference(what, value, other[what], rank)}")

    def first(self, value: Callable[[], T]) -> T:
        with self.all_or_none():
            own = value() if self.rank == 0 else None
        return self._gathered(own)[0]

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        own = None
        try:
            yield
        except Exception as error:
            own = error
        kind = next((kind for kind in _KINDS if isinstance(own, kind)), RuntimeError)
        found = self._gathered(None if own is None else (kind, str(own)))
        failed = next((rank for rank, error in enumerate(found) if error is not None), None)
        if failed is None:
            return
        if failed != self.rank:
            kind, message = found[failed]
            own = kind(f"{message} (in process {failed})")
            own.__cause__ = ProcessError(f"process {failed} has failed")
        self._agreed = id(own)  # the error itself would keep the frames of what failed, and their tensors
        raise own

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        try:
            yield
        except ProcessError:
            _failures.leave(self.size)
            raise
        except Exception as error:
            if id(error) != self._agreed:
                ours, text = f"{self._method}: ", str(error)
                reason = one_line(text.removeprefix(ours)) if text.startswith(ours) else one_line(error)
                _failures.leave(self.size, f"process {self.rank} has failed: {reason}")
            raise

    def _gathered(self, value: T) -> list[T]:
        """A value of each process, by rank."""
        values: list[Any] = [None] * self.size
        here = torch.device("cpu" if "cpu" in _backends() else "cuda")
        # once all have come to this, what follows waits for nobody who has failed
        self._begin(dist.all_reduce, torch.zeros(1, device=here))()
        self.settled(here)
        with self._others_there():
            dist.all_gather_object(values, value)
        return values

    def _check_device(self, device: torch.device) -> None:
        if device.type not in _backends():
            backends = dist.get_backend_config()
            raise ValueError(f"the process group can't sum on {device.type}: its backend is {backends}")

    def _begin(self, call: Callable[..., Any], tensor: Tensor, *more: Any) -> Callable[[], None]:
        """Begin what all processes take part in; what is returned waits for it."""
        with self._others_there():
            work = call(tensor, *more, async_op=True)
        # another backend's has only been queued when it returns: the GPU waits
        looks = _backends().get(tensor.device.type) == "gloo"
        return partial(self._wait, work, looks)

    def _wait(self, work: dist.Work, looks: bool) -> None:
        with self._others_there():
            while looks:
                try:
                    work.wait(timedelta(seconds=_LOOK))
                    return
                except RuntimeError as error:
                    if not str(error).startswith(_WAITED):
                        raise
                self._raise_if_one_failed()
            work.wait()

    def settled(self, device: torch.device) -> None:
        if device.type != "cuda":
            return
        event, looked = torch.cuda.Event(), time.monotonic()
        event.record()
        with self._others_there():
            while not event.query():
                time.sleep(0.0005)
                if time.monotonic() - looked > _LOOK:
                    self._raise_if_one_failed()
                    looked = time.monotonic()

    def _raise_if_one_failed(self) -> None:
        reason = _failures.heard()
        if reason is not None:
            raise ProcessError(f"{self._method}: {reason}; a checkpoint goes on from its last phase")

    @contextmanager
    def _others_there(self) -> Iterator[None]:
        try:
            yield
        except ProcessError:
            raise
        except RuntimeError as error:
            if not (isinstance(error, dist.DistNetworkError) or _GONE.search(str(error))):
                raise
            self._raise_if_one_failed()
            reason = re.sub(r"^(\[[^\]]*\]\s*)+", "", (str(error).splitlines() or [type(error).__name__])[0])
            gone = f"{self._method}: another process of the run is gone ({reason})"
            raise ProcessError(f"{gone}; a checkpoint goes on from its last phase") from error


class _Imagined(_Processes):
    """The first of several processes of which the others aren't there, for steps on tensors without data.

    It makes all tensors that a process makes; what the others would put into them is nothing.
    """

    def begin(self) -> None:
        pass

    def _check_device(self, device: torch.device) -> None:
        pass

    def _begin(self, call: Callable[..., Any], tensor: Tensor, *more: Any) -> Callable[[], None]:
        return lambda: None

    def _gathered(self, value: T) -> list[T]:
        return [value] * self.size

    def ending_together(self) -> AbstractContextManager[object]:
        return nullcontext()


ALONE = Team()
_imagined: ContextVar[int | None] = ContextVar("imagined", default=None)


@contextmanager
def imagine(size: int) -> Iterator[None]:
    """Within, a run is that of the first of so many processes, whatever there is; one is a run alone."""
    token = _imagined.set(size)
    try:
        yield
    finally:
        _imagined.reset(token)


def team_of(method: str) -> Team:
    """The processes of torch's default group, if it is there and has more than one."""
    imagined = _imagined.get()
    if imagined is not None:
        return _Imagined(method, 0, imagined) if imagined > 1 else ALONE
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _Processes(method, dist.get_rank(), dist.get_world_size())
    return ALONE


def _backends() -> dict[str, str]:
    """Who sums for the group on each type of device."""
    return dict(backend.split(":") for backend in dist.get_backend_config().split(","))


def _difference(what: str, value: Any, other: Any, rank: int) -> str:
    if isinstance(value, dict) and isinstance(other, dict):
        names = [name for name in {**value, **other} if value.get(name) != other.get(name)]
        values = ", ".join(f"{name} {value.get(name)!r} and {other.get(name)!r}" for name in names)
        return f"processes 0 and {rank} have other {what}: {values}"
    return f"processes 0 and {rank} have other {what}"
