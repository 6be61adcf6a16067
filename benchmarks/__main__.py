"""``steps``, ``epoch``, ``ops`` and ``large`` measure, ``moved`` counts, ``kernels`` compiles, ``tables`` repeats
papers, ``report`` and ``figures`` show results.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import (
    dry,
    epoch,
    figures,
    kernels,
    large,
    moved,
    networks,
    ops,
    plan,
    report,
    results,
    steps,
    sweep,
    tables,
)
from benchmarks.contestants import CONTESTANTS
from benchmarks.steps_table import table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    """0 when all is well; 1 when a contestant's results were wrong or the README is out of date; 2 without a GPU."""
    options = _parser().parse_args(arguments)
    if options.command == "report":
        return report.main(options.readme, options.results, options.check)
    if options.command == "figures":
        return figures.main(options)
    if options.command == "moved":
        return moved.main(options)
    if options.command == "tables":
        return tables.main(options)
    if options.command == "kernels":
        return kernels.main(options)
    if options.command == "large":
        return large.main(options)
    if options.command == "steps" and options.dry:
        return dry.main(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: torch sees no CUDA device", file=sys.stderr)
        return 2
    failed = False
    for outcome, text in _measured(options):
        print(f"{text}\n", flush=True)
        results.write(outcome.rows, options.out)
        failed |= outcome.failed
    return int(failed)


def _measured(options: argparse.Namespace) -> Iterator[tuple[results.Outcome, str]]:
    device = torch.device(options.device)
    dtypes = [DTYPES[name] for name in options.dtype]
    if options.command == "epoch":
        for net, batch in _nets(options):
            for dtype in dtypes:
                outcome = epoch.run(net, batch, dtype, device, options.repeats or 3)
                yield outcome, epoch.table(outcome)
        return
    if options.command == "sweep":
        for net, batch in _nets(options):
            for dtype in dtypes:
                outcome = sweep.run(net, options.runs, batch, dtype, device, options.repeats or 3, 1)
                yield outcome, sweep.table(outcome)
        return
    repeats, warmup = (100, 20) if device.type == "cuda" else (7, 1)
    repeats = options.repeats or repeats
    how = device, repeats, min(warmup, repeats)
    if options.command == "ops":
        yield from _measured_ops(options, dtypes, *how)
        return
    for dtype, (net, batch), method in itertools.product(dtypes, list(_nets(options)), options.method):
        known = CONTESTANTS[method]
        contestants = {name: known[name] for name in options.contestants or known if name in known}
        limits = options.compile_limit, options.peaks, options.loader
        outcome = steps.run(net, batch, dtype, *how, method, contestants, *limits)
        yield outcome, table(outcome)


def _measured_ops(
    options: argparse.Namespace, dtypes: list[torch.dtype], device: torch.device, repeats: int, warmup: int
) -> Iterator[tuple[results.Outcome, str]]:
    start = time.monotonic()
    batches = options.batch or [128]
    for done, dtype in enumerate(dtypes):
        deadline = start + options.seconds * (done + 1) / len(dtypes)
        if options.processes:
            ops.compile_kernels(options.processes, options.net, batches, dtype, device, options.ops, deadline)
            continue
        how = device, repeats, warmup, options.compile, options.ops, deadline
        outcome = ops.run(options.net, batches, dtype, *how)
        yield outcome, ops.table(outcome)


def _nets(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Each network with each batch, or with the one that is usual for it."""
    for net in options.net:
        for batch in options.batch or [networks.usual_batch(net)]:
            yield net, batch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in {"steps": steps, "epoch": epoch, "sweep": sweep, "ops": ops}.items():
        command = commands.add_parser(name, help=module.__doc__, description=module.__doc__)
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        known = f"names that maskops.models.build knows; {', '.join(networks.OTHERS)}"
        command.add_argument("--net", nargs="+", default=list(steps.NETS), help=known)
        usual = "128" if name == "ops" else "128; on images of 224 x 224 64, or 32 for transformers and their like"
        command.add_argument("--batch", type=int, nargs="+", help=usual)
        dtypes = [dtype for dtype in DTYPES if name == "ops" or DTYPES[dtype] in steps.TOLERANCE]
        command.add_argument("--dtype", nargs="+", choices=dtypes, default=["float32"])
        repeats = "3" if name in ("epoch", "sweep") else "100 on a GPU, 7 on a CPU"
        command.add_argument("--repeats", type=int, help=repeats)
        command.add_argument("--out", type=Path, help="a CSV, or a folder of one per device; benchmarks/results")
        if name == "steps":
            _add_steps(command)
        elif name == "ops":
            _add_ops(command)
        elif name == "sweep":
            command.add_argument("--runs", type=int, default=16, help="so many at once")
    kernels.add_arguments(commands.add_parser("kernels", help=kernels.__doc__, description=kernels.__doc__))
    tables.add_arguments(commands.add_parser("tables", help=tables.__doc__, description=tables.__doc__))
    large.add_arguments(commands.add_parser("large", help=large.__doc__, description=large.__doc__))
    moved.add_arguments(commands.add_parser("moved", help=moved.__doc__, description=moved.__doc__))
    figures.add_arguments(commands.add_parser("figures", help=figures.__doc__, description=figures.__doc__))
    command = commands.add_parser("report", help="write the tables and the pictures from the results")
    command.add_argument("--readme", type=Path, default=results.ROOT / "README.md")
    command.add_argument("--results", type=Path, default=results.FOLDER)
    command.add_argument("--check", action="store_true", help="write nothing; fail when the README is out of date")
    return parser


def _add_steps(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", nargs="+", choices=CONTESTANTS, default=["awm"])
    names = list(dict.fromkeys(itertools.chain.from_iterable(CONTESTANTS.values())))
    command.add_argument("--contestants", nargs="+", choices=names, help="all that the method has")
    command.add_argument("--compile-limit", type=int, default=600, help="seconds, then without torch.compile")
    command.add_argument("--no-peaks", dest="peaks", action="store_false", help="don't measure peak memory")
    command.add_argument("--loader", action="store_true", help="time the published data loader too")
    command.add_argument("--dry", action="store_true", help="time nothing: count launches, bytes, operations, memory")


def _add_ops(command: argparse.ArgumentParser) -> None:
    command.add_argument("--compile", action="store_true", help="torch.compile too, which takes a while")
    command.add_argument("--ops", nargs="+", choices=plan.OPS, default=list(plan.OPS))
    only = "only compile Triton's kernels into its cache, in so many processes"
    command.add_argument("--processes", type=int, help=only)
    until = "begin nothing after that; the dtypes share it"
    command.add_argument("--seconds", type=float, default=math.inf, help=until)


if __name__ == "__main__":
    sys.exit(main())
