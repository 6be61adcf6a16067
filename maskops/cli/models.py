"""The model that a command line names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from maskops import models
from maskops.checkpoint import load_state_dict
from maskops.cli import transformers_folder
from maskops.cli.options import arch_options

_NAMED_KEYS = 4


def add_arguments(inputs: argparse._ArgumentGroup) -> None:
    known = ", ".join(models.ARCHITECTURES)
    text = "package.module:callable, which is imported and called; or transformers:FOLDER, of which no code runs"
    inputs.add_argument("--arch", required=True, help=f"{known}; {text}")
    inputs.add_argument(
        "--arch-options", type=arch_options, default={}, metavar="KEY=VALUE,…", help="arguments of the architecture"
    )
    text = "the model's: .pth, .pt or .safetensors; code in it is never run (default: a transformers folder's own)"
    inputs.add_argument("--weights", metavar="FILE", help=text)


def build(arguments: argparse.Namespace) -> nn.Module:
    """The architecture with random weights."""
    folder = transformers_folder.named(arguments.arch)
    if folder is None:
        return models.build(arguments.arch, **arguments.arch_options)
    _check_no_options(arguments)
    return transformers_folder.build(folder)


def load(arguments: argparse.Namespace) -> nn.Module:
    """The model with its weights, on the CPU; ``arguments.weights`` becomes what they were read from.

    errors: ValueError, one line, for weights that aren't the architecture's
    """
    folder = transformers_folder.named(arguments.arch)
    if folder is not None:
        _check_no_options(arguments)
        arguments.weights = arguments.weights or str(folder / transformers_folder.WEIGHTS)
        return transformers_folder.load(folder, arguments.weights)
    if arguments.weights is None:
        raise ValueError("--weights must be given, unless --arch is transformers:FOLDER")
    model = build(arguments)
    found = load_state_dict(arguments.weights)
    _check_fits(arguments, found, model)
    model.load_state_dict(found)
    return model


def _check_no_options(arguments: argparse.Namespace) -> None:
    if arguments.arch_options:
        raise ValueError(f"--arch {arguments.arch} takes no --arch-options: they are in its config.json")


def _check_fits(arguments: argparse.Namespace, found: Mapping[str, Tensor], model: nn.Module) -> None:
    expected = model.state_dict()
    differing = [name for name in found.keys() & expected.keys() if found[name].shape != expected[name].shape]
    reasons = [
        listed("it lacks", [name for name in expected if name not in found]),
        listed("it has besides", [name for name in found if name not in expected]),
        listed(
            "shapes differ",
            [f"{name} {tuple(found[name].shape)}, not {tuple(expected[name].shape)}" for name in sorted(differing)],
        ),
    ]
    if any(reasons):
        reason = "; ".join(filter(None, reasons))
        raise ValueError(f"{arguments.weights} doesn't fit the architecture {arguments.arch}: {reason}")


def listed(title: str, names: Sequence[str]) -> str:
    """The first few names after a title; nothing for none."""
    more = f" and {len(names) - _NAMED_KEYS} more" if len(names) > _NAMED_KEYS else ""
    return f"{title} {', '.join(names[:_NAMED_KEYS])}{more}" if names else ""
