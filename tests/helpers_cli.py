"""What the tests of the command line share: a small network by name, its weights, and images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from maskops.cli import main

ARCH = f"{__name__}:network"
QUICK = ["--epochs", "1", "--no-progress", "--device", "cpu"]


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3),
        nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    )  # fmt: skip


def write_inputs(folder: Path) -> dict[str, str]:
    """A model and images in a folder, and the options that name them."""
    torch.manual_seed(0)
    torch.save(network().state_dict(), folder / "model.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 8, 8), dtype=np.uint8)
    labels = np.arange(30) % 3
    np.savez(folder / "x.npz", x_train=pixels[:12], y_train=labels[:12], x_test=pixels[12:], y_test=labels[12:])
    named = {"arch": ARCH, "weights": "model.pth", "clean": "x.npz:train", "eval": "x.npz:test"}
    return {name: value if name == "arch" else str(folder / value) for name, value in named.items()}


def line(options: dict[str, object]) -> list[str]:
    """Options by name as a command line; those that are None are left out."""
    given = {name: value for name, value in options.items() if value is not None}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def refused(capsys, argv: list[str]) -> str:
    """The one line of a command line that is refused with exit code 2 and nothing on stdout."""
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert code == 2 and printed.out == "", printed
    assert printed.err.count("\n") == 1 and printed.err[:-1].isprintable(), printed.err
    if "Traceback" in printed.err:
        pytest.fail(printed.err)
    return printed.err
