"""Remove a backdoor from a model with a few clean images, and measure before and after."""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskops import models, report
from maskops.backdoor import Metrics, der, evaluate, parse
from maskops.checkpoint import CheckpointError, load_state_dict
from maskops.cli import processes, unfinished
from maskops.cli.options import add_options, arch_options, best_device, given, method_in
from maskops.data import Pair, load_images, one_shot, split
from maskops.purify import Purification
from maskops.purify.methods import METHODS

_CLI_DEVICE = "where to run (default: the GPU if there is one, else the CPU)"
_NAMED_KEYS = 4


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    method = method_in(argv)
    inputs = parser.add_argument_group("the model and the images")
    titles = "; ".join(f"{name}: {method.title}" for name, method in METHODS.items())
    inputs.add_argument("--method", choices=METHODS, default="awm", help=f"{titles} (default: awm)")
    known = ", ".join(models.ARCHITECTURES)
    inputs.add_argument(
        "--arch", required=True, help=f"{known}, or package.module:callable, which is imported and called"
    )
    inputs.add_argument(
        "--arch-options", type=arch_options, default={}, metavar="KEY=VALUE,…", help="arguments of the architecture"
    )
    text = "the model's: .pth, .pt or .safetensors; code in it is never run"
    inputs.add_argument("--weights", required=True, metavar="FILE", help=text)
    inputs.add_argument(
        "--clean", required=True, metavar="PATH", help="clean images: file.npz, file.npz:train, or a class folder each"
    )
    chosen = inputs.add_mutually_exclusive_group()
    chosen.add_argument("--n", type=int, help="how many of them, drawn by --seed (default: all)")
    chosen.add_argument(
        "--one-shot",
        action="store_true",
        help="one of each class, drawn by --seed, and nine augmented copies of each, some mirrored unless --no-flip",
    )
    inputs.add_argument("--size", type=int, metavar="N", help="resize the images of class folders to N x N")

    measuring = parser.add_argument_group("measuring", "The purification sees none of these.")
    measuring.add_argument("--eval", required=True, metavar="PATH", help="images to measure on, as --clean")
    measuring.add_argument(
        "--trigger", type=parse, metavar="SPEC", help="e.g. badnets_square:size=4,margin=1 or additive:trigger.png"
    )
    measuring.add_argument("--target", type=int, metavar="CLASS", help="the class that the trigger leads to")
    measuring.add_argument("--curves", action="store_true", help="measure after every epoch too")

    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the results go")
    output.add_argument("--overwrite", action="store_true", help="replace results in a folder that isn't empty")
    text = f"go on with the run that was stopped and left {unfinished.STATE} there; begin it if there is none"
    output.add_argument("--resume", action="store_true", help=text)

    presets = METHODS[method].presets
    options = parser.add_argument_group(f"options of {METHODS[method].title}", "Other methods: --method NAME --help.")
    options.add_argument("--preset", choices=presets, default="paper", help="where the values begin (default: paper)")
    add_options(options, {name: preset.options for name, preset in presets.items()})
    settings = {name: preset.setting for name, preset in presets.items()}
    # the folder gets plain layers and the masks, so there is no choice to make
    add_options(parser.add_argument_group("setting"), settings, {"folded"}, {"device": _CLI_DEVICE})


def run(arguments: argparse.Namespace) -> None:
    method = METHODS[arguments.method]
    changes = given(arguments, *method.presets["paper"])
    for one, other in (("trigger", "target"), ("mean", "std")):
        if (getattr(arguments, one, None) is None) != (getattr(arguments, other, None) is None):
            raise ValueError(f"--{one} and --{other} belong together")
    place = processes.join(arguments.method, method.splits, changes.get("device"), best_device())
    with processes.heard(place.team):
        _run(arguments, {**changes, "device": place.device}, place)


def _run(arguments: argparse.Namespace, changes: dict[str, Any], place: processes.Place) -> None:
    method, team = METHODS[arguments.method], place.team
    leads, out = team.rank == 0, arguments.out
    state = out / unfinished.STATE
    with team.all_or_none():
        if leads:
            _check_out(arguments)
    with report.results_folder(out) if leads else nullcontext() as folder:
        with team.all_or_none():
            model = _load_model(arguments).to(changes["device"])
            seed = changes.get("seed", method.presets["paper"].setting.seed)
            clean, evaluation, warnings = _load_data(arguments, seed)
            _check_channels(clean[0].shape[1], changes)
            measure = partial(_measure, arguments, evaluation, changes)
            before = measure(model)  # in every process, as all that is measured: none waits for another
        curves: unfinished.Curves | None = None

        def on_epoch(epoch: int, working: nn.Module) -> None:
            if arguments.curves:
                metrics = evaluate(working, *evaluation, arguments.trigger, arguments.target)
                if curves is not None:
                    curves.add(epoch, metrics)

        try:
            with team.all_or_none():
                if leads and arguments.overwrite:
                    unfinished.move(out, folder)
                if leads and not state.exists():
                    unfinished.remove(out)
                if leads and arguments.curves:
                    curves = unfinished.Curves(out, folder, state.exists())
            how = {"preset": arguments.preset, "on_epoch": on_epoch, "checkpoint": state, "resume": arguments.resume}
            with report.heard_warnings() as heard:
                result = method.run(model, clean, **how, **changes)
            if leads:
                unfinished.remove(folder)
        except BaseException as error:
            if leads and not state.exists():  # before the first step
                unfinished.remove(out)
                unfinished.move(folder, out)
            if not isinstance(error, KeyboardInterrupt):
                raise
            left = f"--resume goes on from {state}" if state.exists() else "nothing was written"
            raise KeyboardInterrupt(left) from None
        place.leave()
        if not leads:
            return
        after = measure(result.model)
        inputs = {name: str(getattr(arguments, name)) for name in ("arch", "weights", "clean", "eval", "trigger")}
        about = {
            "curves": [] if curves is None else curves.measured,
            "trigger": arguments.trigger,
            "preset": arguments.preset,
            "notes": {
                "inputs": {**inputs, "target": arguments.target, "clean_images": len(clean[1])},
                "evaluation_images": len(evaluation[1]),
                "warnings": [*warnings, *heard],
            },
        }
        _conclude(folder, out, result, before, after, clean[0], about)
    unfinished.remove(out)


def _check_out(arguments: argparse.Namespace) -> None:
    state, curves = (arguments.out / name for name in (unfinished.STATE, unfinished.CURVES))
    if arguments.resume and arguments.overwrite:
        raise ValueError("--resume goes on with what --overwrite would replace: give one of them")
    if state.exists() and not (arguments.resume or arguments.overwrite):
        raise ValueError(f"{state} is of a run that was stopped: give --resume to go on with it, or --overwrite")
    if arguments.resume and state.exists() and curves.exists() != arguments.curves:
        begun = "with --curves: give it too" if curves.exists() else "without --curves: leave it out"
        raise ValueError(f"the run that --resume goes on with was begun {begun}")
    known = (curves.name, state.name) if arguments.resume else (curves.name,)
    if not (arguments.overwrite or report.is_empty(arguments.out, known)):
        raise ValueError(f"--out {arguments.out} is not empty; name another folder, or give --overwrite")


def _check_channels(channels: int, changes: dict[str, Any]) -> None:
    for name in ("mean", "std"):
        if len(changes.get(name, range(channels))) != channels:
            raise ValueError(f"--{name} needs {channels} values, one per channel; got {changes[name]}")


class _OnPixels(nn.Module):
    """Logits of images in [0, 1] from a model that may want them normalised, and may return them in an object."""

    def __init__(self, model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        super().__init__()
        self.model = model
        self.mean, self.std = mean, std

    def forward(self, images: Tensor) -> Tensor:
        if self.mean is not None:
            mean, std = (images.new_tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
            images = (images - mean) / std
        output = self.model(images)
        return output if isinstance(output, Tensor) else output.logits


def _measure(arguments: argparse.Namespace, evaluation: Pair, changes: dict[str, Any], model: nn.Module) -> Metrics:
    model = _OnPixels(model, changes.get("mean"), changes.get("std"))
    try:
        return evaluate(model, *evaluation, arguments.trigger, arguments.target)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        shape = tuple(evaluation[0].shape[1:])
        raise ValueError(f"{arguments.arch} can't compute on images {shape}: {error}") from error


def _load_model(arguments: argparse.Namespace) -> nn.Module:
    model = models.build(arguments.arch, **arguments.arch_options)
    found, expected = load_state_dict(arguments.weights), model.state_dict()
    differing = [name for name in found.keys() & expected.keys() if found[name].shape != expected[name].shape]
    reasons = [
        _listed("it lacks", [name for name in expected if name not in found]),
        _listed("it has besides", [name for name in found if name not in expected]),
        _listed(
            "shapes differ",
            [f"{name} {tuple(found[name].shape)}, not {tuple(expected[name].shape)}" for name in sorted(differing)],
        ),
    ]
    if any(reasons):
        reason = "; ".join(filter(None, reasons))
        raise ValueError(f"{arguments.weights} doesn't fit the architecture {arguments.arch}: {reason}")
    model.load_state_dict(found)
    return model


def _listed(title: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED_KEYS} more" if len(names) > _NAMED_KEYS else ""
    return f"{title} {', '.join(names[:_NAMED_KEYS])}{more}" if names else ""


def _load_data(arguments: argparse.Namespace, seed: int) -> tuple[Pair, Pair, list[str]]:
    """Clean images for the purification, others to measure on, and what is to be known of them."""
    images, labels = _load_images(arguments.clean, arguments.size)
    evaluation = _load_images(arguments.eval, arguments.size)
    if evaluation[0].shape[1:] != images.shape[1:]:
        shapes = f"{tuple(images.shape[1:])} and {tuple(evaluation[0].shape[1:])}"
        raise ValueError(f"--clean and --eval must hold images of one shape; got {shapes}")
    count = len(labels) if arguments.n is None else arguments.n
    if count < 1:
        raise ValueError(f"--n must be at least 1; got {count}")
    generator = torch.Generator().manual_seed(seed)
    if arguments.one_shot:
        if images.shape[-1] != images.shape[-2]:
            raise ValueError(f"--one-shot needs square images; got {tuple(images.shape[2:])}")
        clean = one_shot(images, labels, images.shape[-1], generator, flip=getattr(arguments, "flip", True))
        originals = clean[0][: len(labels.unique())]
    else:
        clean = split(images, labels, count, generator)[0]
        originals = clean[0]
    seen = _count_shared(originals, evaluation[0])
    if seen == len(originals):
        raise ValueError("all clean images are among those of --eval: measure on others, e.g. file.npz:test")
    warnings = [f"{seen} of {len(originals)} clean images are among those of --eval too"] if seen else []
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return clean, evaluation, warnings


def _load_images(path: str, size: int | None) -> Pair:
    return load_images(path, size if Path(path).is_dir() else None)


def _count_shared(images: Tensor, others: Tensor) -> int:
    """How many of the images are, pixel for pixel, among the others."""
    known = {_digest(image) for image in others}
    return sum(_digest(image) in known for image in images)


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy().tobytes()).digest()


def _conclude(
    folder: Path,
    out: Path,
    result: Purification,
    before: Metrics,
    after: Metrics,
    images: Tensor,
    about: dict[str, Any],
) -> None:
    """Write and print the results; ``about`` are more arguments of :func:`maskops.report.write`."""
    known = before.asr_excl is not None and not math.isnan(before.asr_excl)
    effectiveness = der(before, after) if known else None
    try:
        no_picture = report.write(folder, result, before, after, images, **about)
    except (CheckpointError, OSError) as error:  # the inputs were all right
        raise RuntimeError(str(error)) from error
    print(report.measured(before, after))
    print(report.cost(result) + (f", DER {effectiveness:.3f} (0.5: no change)" if known else ""))
    if str(result.options["device"]).startswith("cuda") and result.execution:
        print(result.explain())
    if no_picture:
        print(f"no picture: {no_picture}")
    print(f"written to {out}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
