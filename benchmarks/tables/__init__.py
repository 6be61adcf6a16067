"""The papers' tables again, or a part of one: their figures beside what this package finds, run by run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.tables import cells, victims, work
from benchmarks.tables.record import Record, markdown
from benchmarks.tables.run import Runner

FOLDER = Path(__file__).parent.parent / "results" / "tables"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", required=True, choices=cells.TABLES, help=f"{cells.explained()}")
    parser.add_argument("--net", nargs="+", help="only these networks of the table; a name not in it stands for its")
    parser.add_argument("--attack", nargs="+", help="only these attacks")
    parser.add_argument("--n", nargs="+", help="only these numbers of clean images, or one-shot")
    parser.add_argument("--method", nargs="+", help="only these; a method that the table lacks gets no paper figures")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="seeds of the purification (default: 0)")
    parser.add_argument("--set", nargs="+", default=[], metavar="METHOD.OPTION=VALUE", help="e.g. anp.epochs=4")
    parser.add_argument("--preset", nargs="+", default=[], metavar="METHOD=PRESET", help="default: paper")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hours", type=float, default=1.0, help="refuse a part that is estimated to take longer")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of TABLE.csv and TABLE.md")
    parser.add_argument("--plan", action="store_true", help="print the estimate and run nothing")
    victims.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """0 when all is well, 2 for what can't be run."""
    try:
        source = victims.Source(options)
        chosen = cells.choose(options, source.describe)
        missing = [reason for net, attack in cells.subjects(chosen) if (reason := source.why_not(net, attack))]
        if missing:
            raise ValueError("; ".join(dict.fromkeys(missing)))
        record = Record(options.out, options.table)
        todo = [cell for cell in chosen if not record.has(cell)]
        if todo:
            estimate = work.estimate(todo, source, torch.device(options.device))
            print(f"{len(todo)} runs, about {estimate / 3600:.1f} hours on this machine", file=sys.stderr)
            if options.plan:
                return 0
            if estimate > 3600 * options.hours:
                raise ValueError(
                    f"that is more than --hours {options.hours:g}: choose a part with --net, --attack, --n, --method"
                )
            Runner(source, record, torch.device(options.device)).run(todo)
        print(markdown(options.out, options.table))
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"benchmarks tables: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
