"""Plant a backdoor in a small network and remove it: half a minute, nothing to download."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from maskops import demo
from maskops.cli import output
from maskops.cli.options import best_device, device


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(demo.FOLDER),
        metavar="FOLDER",
        help="where the results go (default: %(default)s)",
    )
    parser.add_argument("--device", type=device, help="where to run (default: the GPU if there is one, else the CPU)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=int, default=demo.EPOCHS, metavar="N", help="of the purification (default: %(default)s)"
    )
    output.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    demo.run(arguments.out, arguments.device or best_device(), arguments.seed, arguments.epochs)
    content = json.loads((arguments.out / "result.json").read_text(encoding="utf-8"))
    arguments.result = {"out": str(arguments.out), **content}
