"""Compile every Triton kernel for GPUs that need not be there, and write down what the binaries take."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from benchmarks.kernels import table
from benchmarks.results import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = sorted(table.SHARED_MEMORY)
    parser.add_argument("--capability", nargs="+", type=int, choices=known, default=known, help="of the architectures")
    parser.add_argument("--kernel", nargs="+", default=[], metavar="MODULE.NAME", help="only these")
    parser.add_argument("--first", action="store_true", help="only the first case of each kernel")
    parser.add_argument("--jobs", type=int, default=1, help="processes; one per architecture at most")
    parser.add_argument("--out", type=Path, default=table.FOLDER, help="folder of kernels.csv and kernels.md")


def main(options: argparse.Namespace) -> int:
    """0 when all is well; 1 when something could not be compiled; 2 when nothing can be.

    Rows of other kernels and architectures than the chosen ones stay as they are.
    """
    reason = _unknown(options.kernel) or why_not()
    if reason:
        print(f"benchmarks kernels: {reason}", file=sys.stderr)
        return 2
    failed = False
    for capability, rows, failures in _compiled(options):
        replaced = {(name, str(capability)) for name in options.kernel or table.kernel_names()}
        table.replace(rows, replaced, options.out)
        say(f"sm_{capability}: {len(rows)} binaries, {len(failures)} failures")
        failed |= bool(failures)
    return int(failed)


def _compiled(options: argparse.Namespace) -> Iterator[tuple[int, list[table.Row], list[str]]]:
    """Architecture after architecture: the rows, and what could not be compiled."""
    capabilities, sources = list(dict.fromkeys(options.capability)), table.sources_hash()
    compiled = partial(_compile, kernels=options.kernel, first=options.first, sources=sources)
    if options.jobs == 1:
        yield from map(compiled, capabilities)
        return
    with ProcessPoolExecutor(min(options.jobs, len(capabilities)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(compiled, capabilities)


def why_not() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    try:
        import triton
    except ModuleNotFoundError:
        return "it needs triton, which is not installed"
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, and what is interpreted is not compiled"
    try:
        return None if triton.knobs.nvidia.cuobjdump.path else "Triton brought no cuobjdump along"
    except RuntimeError as error:
        return f"Triton's tools for NVIDIA are not there: {error}"


def _unknown(kernels: list[str]) -> str | None:
    unknown = sorted(set(kernels) - set(table.kernel_names()))
    return f"there is no {', '.join(unknown)}; the kernels are {', '.join(table.kernel_names())}" if unknown else None


def _compile(capability: int, kernels: list[str], first: bool, sources: str) -> tuple[int, list[table.Row], list[str]]:
    # these modules need triton
    from benchmarks.kernels import elementwise, frozen, layers, many
    from benchmarks.kernels.compiling import Compiler

    compiler = Compiler(capability, kernels, first, sources)
    for cases in (layers, frozen, many, elementwise):
        compiler.compile(cases.all_cases())
    return capability, compiler.rows, compiler.failures
