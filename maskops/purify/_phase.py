"""Steps of one kind in a row: what a purification spends its time on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from maskops.purify import _graphs
from maskops.purify._distributed import ALONE, Team
from maskops.purify._draws import Batch, Drawn, batch_at
from maskops.purify._fake import on_host

WARM_UP = 3
"""Steps before one is recorded: what is set up, tuned and allocated once is then there."""


class Lane:
    """What the phases of one run share: its processes, and on a GPU a stream, so that several runs overlap, and memory
    for graphs.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] = (), team: Team = ALONE) -> None:
        on_gpu = device.type == "cuda"
        self.device, self.team = device, team
        self.generators = [generator for generator in generators if generator.device.type == device.type]
        # weakly: what a phase holds is to be gone with it
        self.graphs: WeakKeyDictionary[Phase, _graphs.Graph] = WeakKeyDictionary()
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self.recording = False
        """Whether a step is being recorded at this moment."""

    def stream(self) -> AbstractContextManager[object]:
        """Within, work is queued on the run's stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def fork(self) -> None:
        """What is queued on the run's stream from now on comes after what the caller has queued."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def join(self) -> None:
        """What the caller queues from now on comes after what is queued on the run's stream."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def record(self, step: Callable[[], object]) -> _graphs.Graph:
        self.recording = True
        try:
            return _graphs.record(step, self._stream, self._pool, self.generators)
        finally:
            self.recording = False

    def forget(self) -> None:
        """Drop all graphs, and with them the memory that they share."""
        self.graphs.clear()
        self._pool = None if self._stream is None else torch.cuda.graph_pool_handle()


class Phase:
    """Steps of one kind, each with draws of its own, that leave numbers behind.

    Nothing here waits for the device: draws are made for all steps at once, a step finds its own by a counter on the
    device and writes its numbers beside those of the others. The first steps run as they are; then, on a GPU, one is
    recorded as a graph, and the others, also of the next times, are replays of it. A step that can't be recorded goes
    on as it is, and :attr:`execution` says why. :attr:`counter` (1,) is the number of the next step, :attr:`left` how
    many are still to come.

    name:      of errors and timings
    step:      computes one step in place, on tensors that are there before and after it; returns numbers by name
    draw:      makes the draws of all steps
    lane:      where it runs
    before, after: what is done once, before the first step and after the last
    around:    a context for all three
    shrink:    makes steps need less memory, or returns False where it can't: asked when a recording runs out of it
    note:      what there is to say about how its steps run, beside that
    why_eager: why steps can't be recorded, if that is known; None for trying
    """

    def __init__(
        self,
        name: str,
        step: Callable[[Batch], Mapping[str, Tensor]],
        draw: Callable[[], Drawn],
        lane: Lane,
        *,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        shrink: Callable[[], bool] = lambda: False,
        note: Callable[[], str] = str,
        why_eager: str | None = None,
    ) -> None:
        self.name, self.around = name, around
        self._step, self._draw, self._lane = step, draw, lane
        self._before, self._after, self._shrink, self._note = before, after, shrink, note
        self._why_eager = why_eager or _graphs.why_not(lane.device)
        self._warm = 0
        self.counter = torch.zeros(1, dtype=torch.int64, device=lane.device)
        self._drawn: Drawn = {}
        self._names: tuple[str, ...] = ()
        self._records: Tensor | None = None
        self.left = 0

    @property
    def _graph(self) -> _graphs.Graph | None:
        return self._lane.graphs.get(self)

    @property
    def execution(self) -> str:
        """How its steps run: as a CUDA graph, or eagerly and why."""
        how = "CUDA graph"
        if self._graph is None:
            how = f"eager: {self._why_eager or 'too few steps to record one'}"
        return how + self._note()

    def run(self) -> None:
        """All steps, within a phase of the same run, without numbers."""
        self.start()
        while self.left:
            self.advance()
        self.finish()

    def start(self) -> None:
        """Everything up to the first step."""
        self._lane.fork()
        with self._lane.stream():
            if self._before is not None:
                self._before()
            with on_host():
                drawn = self._draw()
            if not self._drawn:
                self._drawn = {name: tensor.to(self._lane.device, non_blocking=True) for name, tensor in drawn.items()}
            else:  # where a recorded step looks for them
                for name, tensor in drawn.items():
                    self._drawn[name].copy_(tensor, non_blocking=True)
            self.counter.zero_()
        self.left = len(self._drawn["index"])

    def advance(self) -> None:
        """One step."""
        self.left -= 1
        with self._lane.stream():
            if self._graph is None and self._why_eager is None and self._warm == WARM_UP:
                self._record()
            graph = self._graph
            if graph is not None:
                graph.replay()
                return
            self._warm = min(self._warm + 1, WARM_UP)
            if self._why_eager is not None or self._warm < WARM_UP:
                self._once()
            elif _graphs.waits(self._once, self._lane.device):
                self._why_eager = "it waits for the device"

    def _record(self) -> None:
        try:
            self._lane.graphs[self] = self._lane.record(self._once)
            return
        except Exception as error:
            reason, out_of_memory = _reason(error)
        if out_of_memory and self._shrink():
            # once more, after steps of the new kind; these may need the memory of what was recorded so far
            self._lane.forget()
            self._warm = 0
        else:
            self._why_eager = reason

    def _once(self) -> None:
        numbers = self._step(batch_at(self.counter, self._drawn))
        if numbers:
            row, *others = (number.detach().view(1) for number in numbers.values())
            row = torch.cat((row, *others)) if others else row
            if self._records is None:
                self._names = tuple(numbers)
                self._records = row.new_zeros(len(self._drawn["index"]), len(row))
            self._records.index_copy_(0, self.counter, row.unsqueeze(0))
        self.counter.add_(1)

    def finish(self) -> dict[str, Tensor]:
        """Everything after the last step; returns each number of every step. This is where the host waits."""
        with self._lane.stream():
            if self._after is not None:
                self._after()
            if self._records is not None:  # each process has noted what its rows add
                self._lane.team.add(self._records)
            self._lane.team.settled(self._lane.device)
        self._lane.join()
        if self._records is None:
            return {}
        return dict(zip(self._names, self._records.cpu().unbind(1), strict=True))


def _reason(error: Exception) -> tuple[str, bool]:
    """Why a recording failed, and whether for lack of memory; the error itself would keep what the step began."""
    first = error.__context__ or error  # what made the recording fail, not that it failed
    return (str(first) or type(first).__name__).splitlines()[0], isinstance(first, torch.OutOfMemoryError)
