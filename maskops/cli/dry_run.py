"""What a purification would do, after every check that can be made without a step of it; nothing is written."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from textwrap import fill
from typing import Any

import torch

from maskops.cli.inputs import Inputs, load
from maskops.cli.plan import as_json
from maskops.purify import plan
from maskops.purify._loop import plain_options
from maskops.purify._options import settle
from maskops.purify._sweep import ALGORITHMS
from maskops.purify.methods import METHODS

_STEPS = ("epochs", "steps", "inner_steps", "outer_steps")


def run(arguments: argparse.Namespace, changes: Mapping[str, Any]) -> None:
    """Print what would run, and leave it in ``arguments.result``.

    errors: ValueError, TypeError for what the run would refuse; RuntimeError where a GPU's memory won't do
    """
    method = METHODS[arguments.method]
    options, setting = settle(arguments.method, method.presets, arguments.preset, changes)
    _check_writable(arguments)
    read = load(arguments, changes, setting.seed)
    options, setting = settle(arguments.method, method.presets, arguments.preset, read.changes)
    images = read.clean[0]
    if hasattr(options, "for_images"):
        options = options.for_images(images.to(setting.device) if setting.device else images)
    classes = read.check()
    settings = {**plain_options(options), **plain_options(replace(setting, device=None)), "device": str(setting.device)}
    settings.pop("folded", None)
    steps = {name: settings[name] for name in _STEPS if name in settings}
    found = {
        "method": arguments.method,
        "inputs": dict(read.notes),
        "images": {"clean": list(images.shape), "eval": list(read.evaluation[0].shape), "classes": classes},
        "parameters": sum(parameter.numel() for parameter in read.model.parameters()),
        "steps": steps,
        "options": settings,
        "plan": _planned(arguments, read, classes),
        "out": str(arguments.out),
    }
    arguments.result = found
    _print(found, method.title)
    _check_memory(found["plan"], setting.device)


def _check_writable(arguments: argparse.Namespace) -> None:
    there = next(folder for folder in (arguments.out, *arguments.out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OSError(f"--out {arguments.out}: can't write to {there}")


def _planned(arguments: argparse.Namespace, read: Inputs, classes: int) -> dict[str, Any] | None:
    if arguments.method not in tuple(ALGORITHMS):
        return None
    images = read.clean[0]
    about = {"shape": tuple(images.shape[1:]), "classes": classes, "images": len(images), "preset": arguments.preset}
    changes = {name: value for name, value in read.changes.items() if name not in ("device", "shard")}
    return as_json(plan(read.model.cpu(), arguments.method, **about, **changes))


def _check_memory(planned: Mapping[str, Any] | None, device: Any) -> None:
    if planned is None or device is None or device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    if planned["peak"] > free:
        needed = f"it needs {_size(planned['peak'])}, and {_size(free)} are free on {device}"
        raise RuntimeError(f"{needed}: maskops plan --memory finds options that fit")


def _print(found: Mapping[str, Any], title: str) -> None:
    planned, shapes = found["plan"], found["images"]
    if planned is None:
        memory = "not predicted for this method"
    else:
        memory = f"{_size(planned['peak'])} of tensors at most, as planned for a GPU"
    rows = {
        "method": f"{found['method']}: {title}",
        "model": f"{found['inputs']['arch']}, {found['parameters']} parameters, {shapes['classes']} classes",
        "images": f"{tuple(shapes['clean'])} clean, {tuple(shapes['eval'])} to measure on",
        "steps": ", ".join(f"{name}={value}" for name, value in found["steps"].items()),
        "options": ", ".join(f"{name}={_shown(value)}" for name, value in found["options"].items()),
        "memory": memory,
        "output": f"{found['out']} (nothing was run or written)",
    }
    for name, text in rows.items():
        print(fill(text, 110, initial_indent=f"{name:<8} ", subsequent_indent=9 * " ", break_long_words=False))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_shown, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
