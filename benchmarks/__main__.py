"""``python -m benchmarks``: ``awm`` and ``ops`` measure, ``report`` writes the README's tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import awm, ops, report, results

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "report":
        return report.main(options.readme, options.results, options.check)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks: torch sees no CUDA device", file=sys.stderr)
        return 2
    repeats, warmup = (100, 20) if device.type == "cuda" else (7, 1)
    repeats = options.repeats or repeats
    warmup = min(warmup, repeats)
    failed = False
    for dtype in (DTYPES[name] for name in options.dtype):
        for outcome, text in _outcomes(options, dtype, device, repeats, warmup):
            print(f"{text}\n", flush=True)
            results.write(outcome.rows, options.out)
            failed |= outcome.failed
    return int(failed)
