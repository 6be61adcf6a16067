"""``awm`` and ``ops`` measure, ``kernels`` compiles, ``tables`` repeats papers, ``report`` writes the README."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import awm, kernels, networks, ops, plan, report, results, tables

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    """0 when all is well; 1 when a contestant's results were wrong or the README is out of date; 2 without a GPU."""
    options = _parser().parse_args(arguments)
    if options.command == "report":
        return report.main(options.readme, options.results, options.check)
    if options.command == "tables":
        return tables.main(options)
    if options.command == "kernels":
        return kernels.main(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: torch sees no CUDA device", file=sys.stderr)
        return 2
    failed = False
    for outcome, table in _outcomes(options):
        print(f"{table}\n", flush=True)
        results.write(outcome.rows, options.out)
        failed |= outcome.failed
    return int(failed)


def _outcomes(options: argparse.Namespace) -> Iterator[tuple[results.Outcome, str]]:
    device = torch.device(options.device)
    repeats, warmup = (100, 20) if device.type == "cuda" else (7, 1)
    repeats = options.repeats or repeats
    how = device, repeats, min(warmup, repeats)
    start = time.monotonic()
    for done, dtype in enumerate(DTYPES[name] for name in options.dtype):
        if options.command == "ops":
            deadline = start + options.seconds * (done + 1) / len(options.dtype)
            if options.processes:
                what = options.net, options.batch, dtype, device, options.ops, deadline
                ops.compile_kernels(options.processes, *what)
                continue
            outcome = ops.run(options.net, options.batch, dtype, *how, options.compile, options.ops, deadline)
            yield outcome, ops.table(outcome)
            continue
        contestants = {name: awm.CONTESTANTS[name] for name in options.contestants}
        for net, batch in itertools.product(options.net, options.batch):
            outcome = awm.run(net, batch, dtype, *how, contestants, options.compile_limit, options.peaks)
            yield outcome, awm.table(outcome)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("awm", "one inner and one outer step of AWM"), ("ops", "the public functions")):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        others = f"; {', '.join(networks.OTHERS)}" if name == "ops" else ""
        known = f"names that maskops.models.build knows{others}"
        command.add_argument("--net", nargs="+", default=list(awm.NETS), help=known)
        command.add_argument("--batch", type=int, nargs="+", default=[128])
        dtypes = [dtype for dtype in DTYPES if name == "ops" or DTYPES[dtype] in awm.TOLERANCE]
        command.add_argument("--dtype", nargs="+", choices=dtypes, default=["float32"])
        command.add_argument("--repeats", type=int, help="100 on a GPU, 7 on a CPU")
        command.add_argument("--out", type=Path, help="a CSV, or a folder of one per device; benchmarks/results")
        if name == "awm":
            command.add_argument("--contestants", nargs="+", choices=awm.CONTESTANTS, default=list(awm.CONTESTANTS))
            command.add_argument("--compile-limit", type=int, default=600, help="seconds, then without torch.compile")
            command.add_argument("--no-peaks", dest="peaks", action="store_false", help="don't measure peak memory")
        else:
            command.add_argument("--compile", action="store_true", help="torch.compile too, which takes a while")
            command.add_argument("--ops", nargs="+", choices=plan.OPS, default=list(plan.OPS))
            only = "only compile Triton's kernels into its cache, in so many processes"
            command.add_argument("--processes", type=int, help=only)
            until = "begin nothing after that; the dtypes share it"
            command.add_argument("--seconds", type=float, default=math.inf, help=until)
    kernels.add_arguments(commands.add_parser("kernels", help=kernels.__doc__, description=kernels.__doc__))
    tables.add_arguments(commands.add_parser("tables", help=tables.__doc__, description=tables.__doc__))
    command = commands.add_parser("report", help="write the README's tables from the results")
    command.add_argument("--readme", type=Path, default=results.ROOT / "README.md")
    command.add_argument("--results", type=Path, default=results.FOLDER)
    command.add_argument("--check", action="store_true", help="write nothing; fail when the README is out of date")
    return parser


if __name__ == "__main__":
    sys.exit(main())
