"""Processes that purify together, for the tests, and what they are asked to run."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from datetime import timedelta
from itertools import count
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.counting import count as counted
from maskops.cli import main
from maskops.purify import _buckets, _checkpoint, _distributed, _failures, sweep
from maskops.purify._plan import _first_epoch, _one_step
from maskops.purify._sweep import ALGORITHMS
from maskops.purify.methods import METHODS

AUGMENTED = {"crop": 1, "flip": True}
AWM = {"epochs": 2, "inner_steps": 2, "outer_steps": 2}
STEPS = {"epochs": 2, "steps": 2}
CASES = {
    "awm": ("awm", "plain", {**AWM, **AUGMENTED, "inner_labels": "predicted", "inner_lr": 1.0}),
    "awm in one batch": ("awm", "plain", {**AWM, "branches": "concatenated", "clamp": True, "trigger_penalty": 0.1}),
    "awm in small batches": ("awm", "plain", {**AWM, "batch_size": 3, "inner_labels": "predicted"}),
    "awm without running statistics": ("awm", "no statistics", {**AWM, "inner_labels": "predicted"}),
    "awm in parts": (
        "awm",
        "plain",
        {**AWM, "branches": "concatenated", "micro_batch_size": 2, "trigger_penalty": 0.1},
    ),
    "awm in the backward": ("awm", "plain", {**AWM, "step_in_backward": True, "recompute": True}),
    "awm of a sum in the backward": ("awm", "sum", {**AWM, "step_in_backward": True}),
    "swm": ("swm", "plain", {**STEPS, **AUGMENTED, "noise_steps": 2}),
    "swm of neurons": ("swm", "plain", {**STEPS, "granularity": "neuron", "batch_size": 2}),
    "anp": ("anp", "plain", {**STEPS, **AUGMENTED, "threshold": "auto", "noise_steps": 2}),
    "anp in small batches": ("anp", "plain", {**STEPS, "batch_size": 3}),
    "anp with biases": ("anp", "no norms", {**STEPS, "number": 2}),
    "anp in eval mode": ("anp", "plain", {**STEPS, "statistics": "running", "number": 2}),
    "nft": ("nft", "plain", {**STEPS, "tune_bias": True}),
    "nft in small batches": ("nft", "plain", {**STEPS, "batch_size": 3, "tune_bias": True}),
    "nft cutmix": ("nft", "untaped", {**STEPS, "augmentation": "cutmix", "statistics": "running"}),
    "nft by functions": ("nft", "functional", {**STEPS, "layers": "conv", "tune_bias": True}),
    "nft in parts": ("nft", "plain", {**STEPS, "tune_bias": True, "statistics": "running", "micro_batch_size": 2}),
    "nft adversarial": ("nft", "plain", {**STEPS, "augmentation": "adversarial", "crop": 0}),
}
"""Name -> method, network and options; batches of 7 unless these say otherwise."""

MORE = {"nft with dropout": ("nft", "dropout", STEPS)}
"""Cases that several processes don't compute as one does."""


class Functional(nn.Module):
    """A batch norm that is no module, and a momentum that is an average."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3)
        self.norm = nn.BatchNorm2d(6, momentum=None)
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        hidden = nn.functional.relu(nn.functional.batch_norm(self.first(images), None, None, training=True))
        hidden = self.norm(self.second(hidden)).relu()
        return self.head(hidden.mean((2, 3)))


class Sum(nn.Module):
    """Two weights with one gradient, which autograd gives both as one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        hidden = nn.functional.conv2d(images, self.first.weight + self.second.weight, self.first.bias).relu()
        return self.head(hidden.mean((2, 3)))


def network(kind: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    if kind == "sum":
        return Sum().double()
    if kind == "functional":
        return Functional().double()
    norms = {} if kind != "no statistics" else {"track_running_stats": False}
    first = [nn.Conv2d(3, 8, 3, padding=1)] + [nn.BatchNorm2d(8, **norms)] * (kind != "no norms")
    second = [nn.Conv2d(8, 8, 3)] + [nn.BatchNorm2d(8, **norms)] * (kind != "no norms")
    model = nn.Sequential(
        *first, nn.ReLU(), *second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 4)
    )
    if kind != "dropout":
        model[-2].p = 0.0
    if kind == "untaped":
        model[0].register_forward_hook(lambda *_: None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.05, 0.2)
    return model.double()


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(22, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(22) % 4


def purify(name: str, **more: Any) -> dict[str, Any]:
    """What came out of a case, as tensors and lists."""
    method, kind, options = {**CASES, **MORE}[name]
    result = METHODS[method].run(network(kind), images(), progress=False, **{"batch_size": 7, **options, **more})
    tensors = {**result.model.state_dict(), **{f"mask {key}": mask for key, mask in result.masks.items()}}
    tensors |= {f"score {key}": score for key, score in (result.scores or {}).items()}
    if result.trigger is not None:
        tensors["trigger"] = result.trigger
    return {"tensors": tensors, "history": result.history, "execution": result.execution, "options": result.options}


def begin(folder: Path, size: int, task: Callable[..., Any], *arguments: Any, seconds: int = 30) -> list[Process]:
    """Start processes that form a group, whose patience is given, and call ``task(rank, *arguments)``."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers_distributed", "torch._dynamo"])
    how = folder, seconds, task, arguments
    processes = [context.Process(target=_take_part, args=(rank, size, *how)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def outcomes(folder: Path, processes: list[Process]) -> list[Any]:
    """What each process returned, or the type and message of its error; None for one that left nothing."""
    for process in processes:
        process.join(60)
        if process.exitcode is None:
            process.kill()
    files = [folder / f"{rank}.pt" for rank in range(len(processes))]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def together(folder: Path, size: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    return outcomes(folder, begin(folder, size, task, *arguments))


def _take_part(rank: int, size: int, folder: Path, seconds: int, task: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    _checkpoint._PAUSE = 0
    _buckets._BYTES = 1000
    where = {"init_method": f"file://{folder / 'store'}", "rank": rank, "world_size": size}
    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds), **where)
    torch.save(_outcome(task, rank, *arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()


def all_cases(rank: int) -> dict[str, Any]:
    return {name: purify(name) for name in CASES}


def one_case(rank: int, name: str, of_rank: dict[int, dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    """A case, with options that only some processes have."""
    return purify(name, **more, **(of_rank or {}).get(rank, {}))


def in_buckets(rank: int, names: list[str], *sizes: int) -> list[dict[str, Any]]:
    """Cases whose gradients are summed in buckets of so many bytes, for each of several sizes."""
    found = []
    for size in sizes:
        _buckets._BYTES = size
        found.append({name: purify(name) for name in names})
    return found


LEAN = {"step_in_backward": True, "remake_weights": True}


def in_parts(rank: int) -> dict[str, Any]:
    """AWM with masks of which each process has its part."""

    def measure(epoch: int, model: nn.Module) -> None:
        if rank == 0:  # nobody waits for the others here
            model(images()[0])

    found = {name: purify(name, **LEAN, shard=True, **more) for name, more in IN_PARTS.items()}
    purify("awm in small batches", **LEAN, shard=True, on_epoch=measure)
    run = ALGORITHMS["awm"](
        network(), images(), "paper", None, {**LEAN, "shard": True, "layers": ("conv", "linear")}
    ).run
    found["kept"] = len(run.arena.weight), sum(weight.numel() for weight in run.arena.effective_weights.values())
    return found


def peaks(rank: int, runs: list[tuple[str, nn.Module, dict[str, Any]]], *data: torch.Tensor) -> list[int]:
    """Bytes of tensors that runs of these methods, models and options need at one time, the models among them."""
    found = []
    for method, model, options in runs:

        def run(method: str = method, model: nn.Module = model, options: dict[str, Any] = options) -> None:
            algorithm = ALGORITHMS[method](model, data, "paper", None, {**options, "progress": False})
            for _ in range(2):
                for phase in _first_epoch(algorithm):
                    _one_step(algorithm, phase)

        there = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        found.append(there + counted(run).peak)
    return found


IN_PARTS = {
    "awm in one batch": {"recompute": True},
    "awm in small batches": {"state_bits": 8},
}


def other_images(rank: int, name: str) -> None:
    method, kind, options = CASES[name]
    pixels, labels = images()
    METHODS[method].run(network(kind), (pixels, labels.roll(rank)), progress=False, **options)


def stopped(rank: int, name: str, checkpoint: Path, epochs: int, more: dict[str, Any] | None = None) -> str:
    """A run that every process stops after so many epochs."""

    def stop(epoch: int, model: nn.Module) -> None:
        if epoch + 1 == epochs:
            raise KeyboardInterrupt

    try:
        purify(name, checkpoint=checkpoint, on_epoch=stop, **(more or {}))
    except KeyboardInterrupt:
        return "stopped"
    return "not stopped"


def broken(rank: int, name: str, function: str, where: int) -> dict[str, Any]:
    """A run in which a function fails in one process."""
    if rank == where:
        mock.patch(function, side_effect=ValueError("it fails")).start()
    return purify(name)


def killed(rank: int, name: str, checkpoint: Path) -> dict[str, Any]:
    """A run whose last process is killed in the middle of a later step."""
    _before_a_sum(rank, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return purify(name, checkpoint=checkpoint)


def hanging(rank: int, name: str) -> dict[str, Any]:
    """A run whose last process stops to do anything in the middle of a later step."""
    _before_a_sum(rank, lambda: time.sleep(60))
    return purify(name)


def fail(*_: Any) -> None:
    raise ValueError("it fails")


def failing(rank: int, name: str, where: int, checkpoint: Path) -> list[Any]:
    """A run that fails in all processes, one that doesn't fail, and one in which a later step of one process does."""
    found = [_outcome(purify, name, on_epoch=fail), _outcome(purify, name)]
    _before_a_sum(rank, fail, where)
    return [*found, _outcome(purify, name, checkpoint=checkpoint)]


def failing_at_the_end(rank: int, name: str) -> list[Any]:
    """A run that fails in the first process when the other has ended it, and one that doesn't fail."""
    _failures._PATIENCE = 3 * _distributed._LOOK  # for the other, which waits for the next run and looks
    with mock.patch("maskops.purify._masks.MaskRun.finish", side_effect=fail) if rank == 0 else nullcontext():
        first = _outcome(purify, name)
    return [first, _outcome(purify, name)]


def failing_in_parts(rank: int, function: str, where: int) -> Any:
    """A run with parts of masks in which a function fails in one process, before the first step or after one."""
    if rank == where:
        mock.patch(function, side_effect=fail).start()
    return _outcome(purify, "awm in one batch", **LEAN, shard=True)


def failing_command_line(rank: int, *arguments: str) -> tuple[int, str]:
    """A command line of which one process fails in the middle of a step."""
    _before_a_sum(rank, fail, at=3)
    return command_line(rank, *arguments)


def _outcome(task: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return task(*arguments, **options)
    except Exception as error:
        return type(error).__name__, str(error)


def _before_a_sum(rank: int, what: Callable[[], None], where: int = 1, at: int = 30) -> None:
    add, steps = _distributed._Processes.add, count()

    def after_that_add(self: Any, *tensors: torch.Tensor) -> None:
        if rank == where and next(steps) == at:
            what()
        add(self, *tensors)

    _distributed._Processes.add = after_that_add


def with_norm(rank: int, norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    METHODS["nft"].run(model, images(), layers="conv", progress=False)


def swept(rank: int) -> None:
    sweep("awm", network(), images(), [{"seed": 0}], progress=False)


def command_line(rank: int, *arguments: str) -> tuple[int, str]:
    """A command line's exit code, and what it prints."""
    os.environ["RANK"] = str(rank)
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        return main(arguments), printed.getvalue()
