"""Time, saved bytes and peak memory of a step."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[], Any]


@dataclass(frozen=True)
class Samples:
    """Times of one step in ms, in the order in which they were taken."""

    ms: list[float]

    def __add__(self, other: Samples) -> Samples:
        return Samples([one + another for one, another in zip(self.ms, other.ms, strict=True)])

    def __truediv__(self, divisor: float) -> Samples:
        return Samples([ms / divisor for ms in self.ms])

    def percentiles(self) -> tuple[float, float, float]:
        """The 20th, 50th and 80th."""
        ordered = sorted(self.ms)
        last = len(ordered) - 1
        return ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)]


@dataclass(frozen=True)
class Timed:
    """A step to be timed, and what goes before it untimed; both are given the number of the repetition."""

    step: Callable[[int], Any]
    prepare: Callable[[int], Any] = lambda repetition: None


def interleaved(
    timed: dict[Any, Timed],
    repeats: int,
    warmup: int,
    device: torch.device,
    flush: Tensor | None = None,
    failed: dict[Any, str] | None = None,
) -> dict[Any, Samples]:
    """Each step once, in turn, and all over again: what disturbs the machine disturbs everybody.

    flush:  written to before every step, to empty a GPU's cache; the GPU is then busy while a short step is launched
    failed: gets the reason of each step that raised, which then has no samples; None to let it raise
    """
    samples = {key: Samples([]) for key in timed}

    def each(repetition: int, take: Callable[[Any, Step], Any]) -> None:
        for key, entry in timed.items():
            if key not in samples:
                continue
            try:
                entry.prepare(repetition)
                take(key, partial(entry.step, repetition))
            except Exception as error:
                if failed is None:
                    raise
                failed[key] = first_line(error)
                del samples[key]

    for repetition in range(warmup):
        each(repetition, lambda key, step: step())
    for repetition in range(repeats):
        each(repetition, lambda key, step: samples[key].ms.append(milliseconds(step, device, flush)))
    return samples


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def milliseconds(step: Step, device: torch.device, flush: Tensor | None = None) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        flush.zero_()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class _Held:
    """What autograd keeps in a tensor's place; it dies with the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def peak_saved_bytes(step: Step, constants: Iterable[Tensor] = ()) -> int:
    """The most bytes that autograd holds for a backward at one time during the step, each storage counted once.

    constants: tensors whose storages don't count: a model's parameters and buffers, masks
    """
    ignored = {tensor.untyped_storage().data_ptr() for tensor in constants}
    holders: dict[int, int] = {}
    now = peak = 0

    def release(address: int, size: int) -> None:
        nonlocal now
        holders[address] -= 1
        if not holders[address]:
            now -= size

    def pack(tensor: Tensor) -> _Held:
        nonlocal now, peak
        held = _Held(tensor)
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in ignored:
            if not holders.get(address):
                now += size
                peak = max(peak, now)
            holders[address] = holders.get(address, 0) + 1
            weakref.finalize(held, release, address, size)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        step()
    return peak


class Peak(NamedTuple):
    """Bytes of tensors, and bytes that torch's allocator had taken from a GPU for them."""

    allocated: int
    reserved: int | None = None


def peak_bytes(work: Callable[..., Any], *arguments: Any, device: torch.device) -> Peak:
    """The most memory that ``work(*arguments)()`` needs at one time, beyond what ``work(*arguments)`` left behind.

    On the CPU both run in a process of their own, so ``work`` is a function of a module. Memory there is what the
    operating system counts as resident, and what is freed is given back to it, so that nothing is reused unseen.
    """
    if device.type == "cuda":
        return growth(work(*arguments), device)
    with environment("MALLOC_MMAP_THRESHOLD_", "65536"), multiprocessing.get_context("spawn").Pool(1) as pool:
        return Peak(pool.apply(_peak_resident, (torch.get_num_threads(), work, *arguments)))


def growth(step: Step, device: torch.device) -> Peak:
    """How much more memory a GPU holds at most during the step than before it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    step()
    torch.cuda.synchronize(device)
    after = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return Peak(after[0] - before[0], after[1] - before[1])


def launches(step: Step) -> int:
    """How many kernels, copies and fills a GPU runs in the step, those of CUDA graphs among them."""
    activities = torch.profiler.ProfilerActivity
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    on_gpu = (event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    # ranges that somebody has named are drawn on the GPU's line too
    return sum(not (event.is_user_annotation or event.name.startswith("Optimizer.")) for event in on_gpu)


def _peak_resident(threads: int, work: Callable[..., Any], *arguments: Any) -> int:
    torch.set_num_threads(threads)
    step = work(*arguments)
    _forget_peak()
    before = _resident("VmRSS")
    step()
    return max(_resident("VmHWM") - before, 0)


def _forget_peak() -> None:
    """Start the kernel's high-water mark of this process anew, where it can be."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    """Resident bytes of this process: ``"VmRSS"`` now, ``"VmHWM"`` at most; at most, where there is no /proc."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(field))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Inside, the environment variable has this value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def full_float32() -> AbstractContextManager[None]:
    """Inside, convolutions in float32 are that, and not TF32."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError inside when it takes longer; on the main thread of a Unix process."""

    def stop(signal_number: int, frame: Any) -> None:
        raise TimeoutError(f"it took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again and again: somebody may catch the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
