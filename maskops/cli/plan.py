"""Say what memory a purification will need, and which options make it fit."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from maskops.cli import models, option_files, output
from maskops.cli.options import add_options, arch_options, given, method_in, plain
from maskops.purify import plan
from maskops.purify._plan import Plan
from maskops.purify._sweep import ALGORITHMS
from maskops.purify.methods import METHODS

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    file = option_files.given(argv)
    method = method_in(argv, ALGORITHMS, file.values.get("method"))
    parser.usage = "%(prog)s [--method NAME] --arch ARCH --shape C,H,W --classes N [--memory 24GB] [option …]"
    option_files.add_argument(parser)
    parser.add_argument("--method", choices=ALGORITHMS, default="awm", help="default: awm")
    parser.add_argument("--arch", required=True, help="as for purify; its weights aren't needed, nor made")
    parser.add_argument("--arch-options", type=arch_options, default={}, metavar="KEY=VALUE,…")
    parser.add_argument("--shape", type=_shape, required=True, metavar="C,H,W", help="of an image")
    parser.add_argument("--classes", type=int, required=True, help="how many the model tells apart")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that torchrun will start (default: 1)")
    parser.add_argument("--images", type=int, default=500, help="how many clean images there will be (default: 500)")
    parser.add_argument("--memory", type=_bytes, metavar="24GB", help="of the device: choose options that fit")
    output.add_arguments(parser)
    presets = METHODS[method].presets
    parser.add_argument("--preset", choices=presets, default="paper", help="where the values begin (default: paper)")
    options = parser.add_argument_group(f"options of {METHODS[method].title}")
    add_options(options, {name: preset.options for name, preset in presets.items()})
    settings = {name: preset.setting for name, preset in presets.items()}
    add_options(parser.add_argument_group("setting"), settings, {"folded", "device", "progress", "graphs", "seed"})
    option_files.apply(parser, file, argv)


def run(arguments: argparse.Namespace) -> None:
    changes = given(arguments, *METHODS[arguments.method].presets["paper"])
    about = {name: getattr(arguments, name) for name in ("shape", "classes", "images", "processes")}
    with torch.device("meta"):
        model = models.build(arguments)
    found = plan(model, arguments.method, **about, memory=arguments.memory, preset=arguments.preset, **changes)
    arguments.result = as_json(found)
    print(found)
    if not found.fits:
        raise RuntimeError(f"it doesn't fit into {arguments.memory / 1e9:g} GB: the least is {found.peak / 1e9:.3g} GB")


def as_json(found: Plan) -> dict[str, Any]:
    """All that is in a plan, as values that JSON knows."""
    numbers = {**asdict(found), "peak": found.peak, "bytes_per_parameter": found.bytes_per_parameter}
    return {**numbers, "options": {name: plain(value) for name, value in found.options.items()}}


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected C,H,W; got {text!r}")
    return sizes


def _bytes(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+) *([KMGT]?I?B)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 24GB or 80GiB; got {text!r}")
    return float(match[1]) * _UNITS[match[2]]
