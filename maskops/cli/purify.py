"""Remove a backdoor from a model with a few clean images, and measure before and after."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maskops import report
from maskops.backdoor import Metrics, der
from maskops.checkpoint import CheckpointError
from maskops.cli import dry_run, info, inputs, option_files, output, processes, unfinished
from maskops.cli.options import add_options, best_device, given, method_in
from maskops.purify import Purification
from maskops.purify.methods import METHODS

_CLI_DEVICE = "where to run (default: the GPU if there is one, else the CPU)"


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    file = option_files.given(argv)
    method = method_in(argv, otherwise=file.values.get("method"))
    parser.usage = (
        "%(prog)s [--method NAME] --arch ARCH --weights FILE --clean PATH --eval PATH --out FOLDER [option …]"
    )
    option_files.add_argument(parser)
    named = parser.add_argument_group("the model and the images")
    titles = "; ".join(f"{name}: {method.title}" for name, method in METHODS.items())
    named.add_argument("--method", choices=METHODS, default="awm", help=f"{titles} (default: awm)")
    inputs.add_arguments(parser, named)

    written = parser.add_argument_group("output")
    written.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the results go")
    written.add_argument("--overwrite", action="store_true", help="replace results in a folder that isn't empty")
    text = f"go on with the run that was stopped and left {unfinished.STATE} there; begin it if there is none"
    written.add_argument("--resume", action="store_true", help=text)

    text = "check everything, say what would run and what memory it takes, and write nothing"
    written.add_argument("--dry-run", action="store_true", help=text)
    output.add_arguments(parser, "which backends compute, and how the steps ran")

    presets = METHODS[method].presets
    options = parser.add_argument_group(f"options of {METHODS[method].title}", "Other methods: --method NAME --help.")
    options.add_argument("--preset", choices=presets, default="paper", help="where the values begin (default: paper)")
    add_options(options, {name: preset.options for name, preset in presets.items()})
    settings = {name: preset.setting for name, preset in presets.items()}
    # the folder gets plain layers and the masks, so there is no choice to make
    add_options(parser.add_argument_group("setting"), settings, {"folded"}, {"device": _CLI_DEVICE})
    option_files.apply(parser, file, argv)


def run(arguments: argparse.Namespace) -> None:
    method = METHODS[arguments.method]
    changes = given(arguments, *method.presets["paper"])
    for one, other in (("trigger", "target"), ("mean", "std")):
        if (getattr(arguments, one, None) is None) != (getattr(arguments, other, None) is None):
            raise ValueError(f"--{one} and --{other} belong together")
    if arguments.dry_run:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise processes.UsageError("--dry-run is for one process: start it without torchrun")
        _check_out(arguments)
        dry_run.run(arguments, {**changes, "device": changes.get("device") or best_device()})
        return
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
            seed = changes.get("seed", method.presets["paper"].setting.seed)
            read = inputs.load(arguments, changes, seed)
            if arguments.verbose:
                for backend, text in info.served(changes["device"]).items():
                    output.note(f"backend {backend}: {text}")
            before = read.measure(read.model)  # in every process, as all that is measured: none waits for another
        curves: unfinished.Curves | None = None

        def on_epoch(epoch: int, working: nn.Module) -> None:
            if arguments.curves:
                metrics = read.evaluate(working)
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
                result = method.run(read.model, read.clean, **how, **read.changes)
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
        after = read.measure(result.model)
        about = {
            "curves": [] if curves is None else curves.measured,
            "trigger": arguments.trigger and arguments.trigger.trigger,
            "preset": arguments.preset,
            "notes": {
                "inputs": read.notes,
                "evaluation_images": len(read.evaluation[1]),
                "warnings": [*read.warnings, *heard],
            },
        }
        _conclude(folder, out, result, before, after, read.clean[0], about)
        if arguments.verbose and result.execution:
            output.note(result.explain())
        content = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        arguments.result = {"out": str(out), "files": sorted(file.name for file in folder.iterdir()), **content}
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
