"""What a purification gets: the model, clean images, others to measure on, and how images reach the model."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskops._state import eval_mode
from maskops._text import printable
from maskops.backdoor import Metrics, evaluate, parse
from maskops.cli import models, output, preprocessing
from maskops.data import Pair, holds_pictures, load_images, one_shot, split

_LAYOUTS = """clean images: file.npz, file.npz:train; a folder with a folder of pictures per class, or FOLDER:train;
file.parquet, or a folder of such files as on Hugging Face's hub; CIFAR's or MNIST's own folder, FOLDER:train"""


_SIZE = """resize images to N x N (default: arrays as they are; pictures to what the model's own configuration says, or
else to the size of the arrays that they are used with, or else as they are)"""


class Attack:
    """A trigger, and the text that names it."""

    def __init__(self, text: str) -> None:
        try:
            self.text, self.trigger = text, parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None


@dataclass(frozen=True)
class Inputs:
    """All that was read.

    model:      with its weights, on the device
    clean:      images and labels for the purification
    evaluation: images and labels to measure on
    changes:    options of the method, with what follows from the model
    notes:      where all this is from, for result.json: with the options there, what repeats the run
    warnings:   what is to be known of the images
    """

    arguments: argparse.Namespace
    model: nn.Module
    clean: Pair
    evaluation: Pair
    changes: Mapping[str, Any]
    notes: Mapping[str, Any]
    warnings: Sequence[str]

    def measure(self, model: nn.Module) -> Metrics:
        """ACC, and ASR where a trigger is given, of a model that may want its images normalised."""
        return self.evaluate(_OnPixels(model, self.changes.get("mean"), self.changes.get("std")))

    def evaluate(self, model: nn.Module) -> Metrics:
        """The same of a model on pixels."""
        attack = self.arguments.trigger
        with self._named_errors():
            return evaluate(model, *self.evaluation, attack and attack.trigger, self.arguments.target)

    def check(self) -> int:
        """How many classes the model tells apart, of which the labels and the target must be; it sees two images."""
        images = self.evaluation[0][:2].to(next(self.model.parameters()).device)
        with self._named_errors(), torch.no_grad(), eval_mode(self.model):
            classes = _OnPixels(self.model, self.changes.get("mean"), self.changes.get("std"))(images).shape[1]
            attack = self.arguments.trigger
            if attack is not None:
                attack.trigger(images)
        for name, label in (
            ("--clean: labels", int(self.clean[1].max())),
            ("--eval: labels", int(self.evaluation[1].max())),
            ("--target", self.arguments.target or 0),
        ):
            if not 0 <= label < classes:
                raise ValueError(f"{name} must be below the model's {classes} classes; got {label}")
        return classes

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            shape = tuple(self.evaluation[0].shape[1:])
            raise ValueError(f"{self.arguments.arch} can't compute on images {shape}: {error}") from error


def add_arguments(parser: argparse.ArgumentParser, inputs: argparse._ArgumentGroup) -> None:
    """What names the inputs; ``inputs`` is the parser's group for them."""
    models.add_arguments(inputs)
    inputs.add_argument("--clean", required=True, metavar="PATH", help=_LAYOUTS)
    chosen = inputs.add_mutually_exclusive_group()
    chosen.add_argument("--n", type=int, help="how many of them, drawn by --seed (default: all)")
    chosen.add_argument(
        "--one-shot",
        action="store_true",
        help="one of each class, drawn by --seed, and nine augmented copies of each, some mirrored unless --no-flip",
    )
    inputs.add_argument("--size", type=int, metavar="N", help=_SIZE)

    measuring = parser.add_argument_group("measuring", "The purification sees none of these.")
    measuring.add_argument("--eval", required=True, metavar="PATH", help="images to measure on, as --clean")
    measuring.add_argument(
        "--trigger", type=Attack, metavar="SPEC", help="e.g. badnets_square:size=4,margin=1 or additive:trigger.png"
    )
    measuring.add_argument("--target", type=int, metavar="CLASS", help="the class that the trigger leads to")
    measuring.add_argument("--curves", action="store_true", help="measure after every epoch too")


def load(arguments: argparse.Namespace, changes: Mapping[str, Any], seed: int) -> Inputs:
    """Read everything.

    changes: options of the method that were given
    seed:    of what is drawn from the clean images
    errors:  ValueError, ImportError, TypeError: one line for what can't be used
    """
    model = models.load(arguments)
    wanted = preprocessing.of(arguments.arch, model) if _may_ask(arguments, changes) else preprocessing.Preprocessing()
    if arguments.size is None:
        preprocessing.check_size(wanted)
    changes, taken = dict(changes), []
    if wanted.mean is not None and not {"mean", "std"} & changes.keys():
        changes |= {"mean": wanted.mean, "std": wanted.std}
        taken += [f"{name} {','.join(map(str, changes[name]))}" for name in ("mean", "std")]
    clean, evaluation, size, warnings = _load_data(arguments, wanted.size, seed)
    if arguments.size is None and size is not None and size == wanted.size:
        taken.append(f"images of {size} x {size}" + (" (resized whole, not cropped)" if wanted.cropped else ""))
    said = f"{', '.join(taken)}: from {printable(wanted.source)}; --mean, --std and --size would overrule it"
    if taken:
        output.note(said)
    side = clean[0].shape[-1]
    if wanted.size not in (None, side) and arguments.size is None:
        differing = f"the images are of {side} pixels, and {printable(wanted.source)} says {wanted.size}"
        warnings.append(f"{differing}: --size {wanted.size} would resize them")
    for warning in warnings:
        output.note(f"warning: {warning}")
    _check_channels(clean[0].shape[1], changes)
    names = ("arch", "arch_options", "weights", "clean", "n", "one_shot", "eval", "target", "curves", "preset")
    notes = {name: getattr(arguments, name) for name in names}
    notes |= {"trigger": arguments.trigger and arguments.trigger.text, "size": size, "clean_images": len(clean[1])}
    if taken:
        notes["taken_from"] = wanted.source
        warnings.append(said)
    return Inputs(arguments, model.to(changes["device"]), clean, evaluation, changes, notes, warnings)


def _may_ask(arguments: argparse.Namespace, changes: Mapping[str, Any]) -> bool:
    """Whether something isn't given that the model's own files may say."""
    return arguments.size is None or not {"mean", "std"} & changes.keys()


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


def _load_data(
    arguments: argparse.Namespace, wanted: int | None, seed: int
) -> tuple[Pair, Pair, int | None, list[str]]:
    """Clean images for the purification, others to measure on, the size they were given, and what is to be known.

    wanted: the model's own, for pictures; None where it doesn't say
    """
    (images, labels), evaluation, size = _load_both(arguments, wanted)
    if evaluation[0].shape[1:] != images.shape[1:]:
        shapes = f"{tuple(images.shape[1:])} and {tuple(evaluation[0].shape[1:])}"
        hint = "" if size is not None else "; --size resizes them"
        raise ValueError(f"--clean and --eval must hold images of one shape; got {shapes}{hint}")
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
    shared = f"{seen} of {len(originals)} clean images are among those of --eval too"
    return clean, evaluation, size, [shared] if seen else []


def _load_both(arguments: argparse.Namespace, wanted: int | None) -> tuple[Pair, Pair, int | None]:
    """Both sets, and the size they were given: --size for all, or for pictures the model's or that of the other set."""
    paths, size = (arguments.clean, arguments.eval), arguments.size
    if size is not None:
        return *(load_images(path, size) for path in paths), size
    pictures = [holds_pictures(path) for path in paths]
    loaded = [None if has_sizes else load_images(path) for path, has_sizes in zip(paths, pictures, strict=True)]
    if any(pictures):
        arrays = next((pair[0] for pair in loaded if pair is not None), None)
        size = wanted
        if size is None and arrays is not None and arrays.shape[2] == arrays.shape[3]:
            size = arrays.shape[2]
    clean, evaluation = (pair or load_images(path, size) for pair, path in zip(loaded, paths, strict=True))
    return clean, evaluation, size


def _count_shared(images: Tensor, others: Tensor) -> int:
    """How many of the images are, pixel for pixel, among the others."""
    known = {_digest(image) for image in others}
    return sum(_digest(image) in known for image in images)


def _digest(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy().tobytes()).digest()


def _check_channels(channels: int, changes: Mapping[str, Any]) -> None:
    for name in ("mean", "std"):
        if len(changes.get(name) or range(channels)) != channels:
            raise ValueError(f"--{name} needs {channels} values, one per channel; got {changes[name]}")
