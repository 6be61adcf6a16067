"""Several processes on one command line, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NamedTuple

import torch
import torch.distributed as dist

from maskops.purify import NonFiniteError
from maskops.purify._distributed import ProcessError, Team, team_of


class UsageError(ValueError):
    """What is wrong with a command line, which all processes find alike."""


class Place(NamedTuple):
    """Where a process stands.

    team:   the processes that it works with
    device: its own
    leave:  to be called when the group is no longer needed
    """

    team: Team
    device: torch.device
    leave: Callable[[], None] = lambda: None


def join(method: str, splits: bool, device: torch.device | None, best: torch.device) -> Place:
    """Make the processes that torchrun has started with this one a group.

    splits: whether the method's work can be split
    device: what the command line says: with an index, or a CPU, all processes use this one
    best:   where to run otherwise; of GPUs each process has its own
    """
    size, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    chosen = best if device is None else device
    if size == 1 and team_of(method).size == 1:
        return Place(team_of(method), chosen)
    if not splits:
        raise UsageError(f"{method} can't be split over processes: start it without torchrun")
    own_gpu = chosen.type == "cuda" and (device is None or device.index is None)
    if own_gpu:
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", size)), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"{here} processes need a GPU each; got {gpus}: start fewer, or give --device cpu")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    if dist.is_initialized():  # by who called the command line
        return Place(team_of(method), chosen)
    dist.init_process_group("nccl" if own_gpu else "gloo")
    return Place(team_of(method), chosen, dist.destroy_process_group)


@contextmanager
def heard(team: Team) -> Iterator[None]:
    """Within, nothing is printed unless this is the first process."""
    if team.rank == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def told_elsewhere(error: BaseException) -> bool:
    """Whether the first process, which isn't this one, prints the error."""
    of_all = isinstance(error, (ProcessError, NonFiniteError, UsageError, KeyboardInterrupt))
    return (of_all or isinstance(error.__cause__, ProcessError)) and int(os.environ.get("RANK", "0")) > 0
