"""The model that a command line names."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import nn

from maskops import models
from maskops.checkpoint import load_state_dict
from maskops.cli.options import arch_options

_NAMED_KEYS = 4


def add_arguments(inputs: argparse._ArgumentGroup) -> None:
    known = ", ".join(models.ARCHITECTURES)
    inputs.add_argument(
        "--arch", required=True, help=f"{known}, or package.module:callable, which is imported and called"
    )
    inputs.add_argument(
        "--arch-options", type=arch_options, default={}, metavar="KEY=VALUE,…", help="arguments of the architecture"
    )
    text = "the model's: .pth, .pt or .safetensors; code in it is never run"
    inputs.add_argument("--weights", required=True, metavar="FILE", help=text)


def load(arguments: argparse.Namespace) -> nn.Module:
    """The model with its weights, on the CPU.

    errors: ValueError, one line, for weights that aren't the architecture's
    """
    model = models.build(arguments.arch, **arguments.arch_options)
    found, expected = load_state_dict(arguments.weights), model.state_dict()
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
    model.load_state_dict(found)
    return model


def listed(title: str, names: Sequence[str]) -> str:
    """The first few names after a title; nothing for none."""
    more = f" and {len(names) - _NAMED_KEYS} more" if len(names) > _NAMED_KEYS else ""
    return f"{title} {', '.join(names[:_NAMED_KEYS])}{more}" if names else ""
