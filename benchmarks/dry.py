"""Steps without a clock: what each contestant asks of a GPU, counted on any machine.

A step is run on two small batches on the CPU, as it would run on a GPU, and what it takes on the whole batch follows
from the two exactly. The largest networks have no memory and nothing is computed, unless numbers decide what is done.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import networks
from benchmarks.contestants import CONTESTANTS, Make
from benchmarks.counting import Counts, count, scaled
from benchmarks.measure import first_line
from benchmarks.minimal import LEAST, PUBLISHED, Amount
from benchmarks.problem import make_problem
from benchmarks.results import aligned, say
from benchmarks.steps import OURS, PHASES, begin

SMALL, LARGE = 2, 4
HEAD = ["", "launches", "GFLOP", "GB", "peak MiB"]


def main(options: argparse.Namespace) -> int:
    """Print a table per network, batch, method and phase; 1 when the published step or ours can't be counted."""
    failed = False
    for dtype, net in itertools.product(options.dtype, options.net):
        for batch in options.batch or [networks.usual_batch(net)]:
            for method in options.method:
                known = CONTESTANTS[method]
                names = [name for name in options.contestants or known if name in known and visible(known[name])]
                failed |= _print(net, batch, getattr(torch, dtype), method, names)
    return int(failed)


def visible(make: Make) -> bool:
    """Whether what a contestant runs can be seen without compiling or capturing it."""
    return getattr(make, "counts_as", None) is None and not getattr(make, "needs_cuda", False)


def _print(net: str, batch: int, dtype: torch.dtype, method: str, names: Sequence[str]) -> bool:
    reason = networks.why_not(net)
    if reason is not None:
        print(f"{net}: no numbers, {reason}\n")
        return False
    failed = False
    for phase in PHASES[method]:
        found, notes = {}, []
        for name in names:
            say(f"{net}: counting {name}, {phase}")
            outcome = _counts_or_reason(CONTESTANTS[method][name], net, batch, method, phase, dtype)
            if isinstance(outcome, Counts):
                found[name] = outcome
            else:
                notes.append(f"{name}: no numbers, {outcome}")
                failed |= name in OURS
        head = f"{method} on {net}, batch {batch}, {str(dtype).removeprefix('torch.')}: {phase}, counted"
        print("\n".join([head, table(net, batch, method, phase, found), *notes]), end="\n\n", flush=True)
    return failed


def _counts_or_reason(*what) -> Counts | str:
    try:
        return counts(*what)
    except Exception as error:
        return first_line(error)


def counts(
    make: Make, net: str, batch: int, method: str = "awm", phase: str = "inner", dtype: torch.dtype = torch.float32
) -> Counts:
    """What one step of a contestant takes on a GPU, without its share of what a phase does once.

    errors: ValueError when the step isn't the same ops on every batch
    """
    return scaled(*(_small(make, net, size, dtype, method, phase) for size in (SMALL, LARGE)), SMALL, LARGE, batch)


def _small(make: Make, net: str, batch: int, dtype: torch.dtype, method: str, phase: str) -> Counts:
    too_big = net.startswith(networks.TRANSFORMERS)
    with without_memory() if too_big and not getattr(make, "needs_memory", False) else nullcontext():
        contestant = make(make_problem(net, batch, dtype, torch.device("cpu"), method, as_gpu=True))
        contestant.reset()
        if phase == "inner":
            begin(contestant)
        step = getattr(contestant, phase)
        step(0)  # the second step is like all that follow, beside what the first left behind
        return count(lambda: step(1))


@contextmanager
def without_memory() -> Iterator[None]:
    """Within, tensors have a shape and a dtype but no memory, and every number that is read of one is 1.

    Ops are those of tensors with memory, but for the backward of batch norms in train mode, which then makes a gradient
    of its input also where none is needed.
    """
    copying = mock.patch.object(FakeTensor, "__deepcopy__", _copied, create=True)
    moving = mock.patch.object(nn.Module, "_apply", _in_place)
    # which draws anew for as long as a number is out of bounds
    drawing = mock.patch.object(nn.init, "_no_grad_trunc_normal_", lambda tensor, *_, **__: tensor, create=True)
    with copying, moving, drawing, FakeTensorMode(), _Ones():
        yield


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """As torch's own copy of a tensor, which looks for its memory."""
    copied = tensor.detach().clone()
    memo[id(tensor)] = Parameter(copied, tensor.requires_grad) if isinstance(tensor, Parameter) else copied
    return memo[id(tensor)]


def _in_place(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """As torch's own way to move a module, which swaps such tensors for others, and can't swap all of them."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = function(tensor.data)
    return module


class _Ones(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


def table(net: str, batch: int, method: str, phase: str, by_name: dict[str, Counts]) -> str:
    """One line per contestant, and those of the tables where these are of this batch."""
    lines = [HEAD]
    for name, found in by_name.items():
        numbers = f"{found.flops / 1e9:.1f}", f"{found.bytes / 1e9:.2f}", f"{found.peak / 2**20:.0f}"
        lines.append([name, found.ops, *numbers])
    if batch == networks.usual_batch(net):
        key = method, net, phase
        lines += [_line("counted before, official", PUBLISHED.get(key)), _line("least, 16 bits", LEAST.get(key))]
    return aligned([line for line in lines if line])


def _line(name: str, amount: Amount | None) -> list:
    return [] if amount is None else [name, amount.launches, amount.gflop, amount.gb, ""]
