"""A step recorded as a CUDA graph: launched as a whole, without Python and without the host's time per kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Graph(Protocol):
    """A recorded step; replaying it does what the step did, on the same tensors as they then are."""

    def replay(self) -> None: ...


def why_not(device: torch.device) -> str | None:
    """Why steps on this device aren't recorded, or None."""
    return None if device.type == "cuda" else "CUDA graphs need a GPU"


def record(
    step: Callable[[], object], stream: torch.cuda.Stream, pool: object, generators: Sequence[torch.Generator]
) -> Graph:
    """The step's kernels, which don't run now.

    stream:     the one that the step ran on before
    pool:       of memory, shared with graphs that are never replayed at the same time
    generators: those on the device that the step draws from, beside torch's own
    errors:     RuntimeError and others, for a step that waits for the device or depends on the host
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    try:
        # only this thread's mistakes, not what other threads allocate meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            step()
    except BaseException:
        # some versions of torch leave them as within a recording, where nothing else can draw from them
        for generator in (torch.cuda.default_generators[stream.device_index], *generators):
            generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph


def waits(step: Callable[[], object], device: torch.device) -> bool:
    """Run a step; returns whether it waited for the device, so that it can't be recorded."""
    if device.type != "cuda":
        step()
        return False
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found = [warning for warning in caught if "synchroniz" in str(warning.message)]
    for warning in caught:
        if warning not in found:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return bool(found)
