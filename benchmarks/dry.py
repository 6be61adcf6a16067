"""Steps without a clock: what each contestant asks of a GPU, counted on any machine.

A step is run on two small batches on the CPU, as it would run on a GPU, and what it takes on the whole batch follows
from the two exactly.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

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
    for net in options.net:
        for batch in options.batch or [networks.usual_batch(net)]:
            for method in options.method:
                known = CONTESTANTS[method]
                names = [name for name in options.contestants or known if name in known and visible(known[name])]
                failed |= _print(net, batch, method, names)
    return int(failed)


def visible(make: Make) -> bool:
    """Whether what a contestant runs can be seen without compiling or capturing it."""
    return getattr(make, "counts_as", None) is None and not getattr(make, "needs_cuda", False)


def _print(net: str, batch: int, method: str, names: Sequence[str]) -> bool:
    reason = networks.why_not(net)
    if reason is not None:
        print(f"{net}: no numbers, {reason}\n")
        return False
    failed = False
    for phase in PHASES[method]:
        found, notes = {}, []
        for name in names:
            say(f"{net}: counting {name}, {phase}")
            outcome = _counts_or_reason(CONTESTANTS[method][name], net, batch, method, phase)
            if isinstance(outcome, Counts):
                found[name] = outcome
            else:
                notes.append(f"{name}: no numbers, {outcome}")
                failed |= name in OURS
        head = f"{method} on {net}, batch {batch}, float32: {phase}, counted"
        print("\n".join([head, table(net, batch, method, phase, found), *notes]), end="\n\n", flush=True)
    return failed


def _counts_or_reason(*what) -> Counts | str:
    try:
        return counts(*what)
    except Exception as error:
        return first_line(error)


def counts(make: Make, net: str, batch: int, method: str = "awm", phase: str = "inner") -> Counts:
    """What one step of a contestant takes on a GPU, without its share of what a phase does once.

    errors: ValueError when the step isn't the same ops on every batch
    """
    return scaled(*(_small(make, net, size, method, phase) for size in (SMALL, LARGE)), SMALL, LARGE, batch)


def _small(make: Make, net: str, batch: int, method: str, phase: str) -> Counts:
    contestant = make(make_problem(net, batch, torch.float32, torch.device("cpu"), method, as_gpu=True))
    contestant.reset()
    if phase == "inner":
        begin(contestant)
    step = getattr(contestant, phase)
    step(0)  # the second step is like all that follow, beside what the first left behind
    return count(lambda: step(1))


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
