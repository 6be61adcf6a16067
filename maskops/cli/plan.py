"""Say what memory a purification will need, and which options make it fit."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import torch

from maskops import models
from maskops.cli.options import add_options, arch_options, given, method_in
from maskops.purify import plan
from maskops.purify._sweep import ALGORITHMS
from maskops.purify.methods import METHODS

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    method = method_in(argv, ALGORITHMS)
    parser.add_argument("--method", choices=ALGORITHMS, default="awm", help="default: awm")
    parser.add_argument("--arch", required=True, help="as for purify; its weights aren't needed, nor made")
    parser.add_argument("--arch-options", type=arch_options, default={}, metavar="KEY=VALUE,…")
    parser.add_argument("--shape", type=_shape, required=True, metavar="C,H,W", help="of an image")
    parser.add_argument("--classes", type=int, required=True, help="how many the model tells apart")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that torchrun will start (default: 1)")
    parser.add_argument("--images", type=int, default=500, help="how many clean images there will be (default: 500)")
    parser.add_argument("--memory", type=_bytes, metavar="24GB", help="of the device: choose options that fit")
    presets = METHODS[method].presets
    parser.add_argument("--preset", choices=presets, default="paper", help="where the values begin (default: paper)")
    options = parser.add_argument_group(f"options of {METHODS[method].title}")
    add_options(options, {name: preset.options for name, preset in presets.items()})
    settings = {name: preset.setting for name, preset in presets.items()}
    add_options(parser.add_argument_group("setting"), settings, {"folded", "device", "progress", "graphs", "seed"})


def run(arguments: argparse.Namespace) -> None:
    changes = given(arguments, *METHODS[arguments.method].presets["paper"])
    about = {name: getattr(arguments, name) for name in ("shape", "classes", "images", "processes")}
    with torch.device("meta"):
        model = models.build(arguments.arch, **arguments.arch_options)
    found = plan(model, arguments.method, **about, memory=arguments.memory, preset=arguments.preset, **changes)
    print(found)
    if not found.fits:
        raise RuntimeError(f"it doesn't fit into {arguments.memory / 1e9:g} GB: the least is {found.peak / 1e9:.3g} GB")


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
