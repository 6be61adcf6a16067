"""Whom the purifications are tried on: published backdoored models, or networks trained under an attack."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import nn

from maskops import demo, models
from maskops.backdoor import (
    Additive,
    BadNetsSquare,
    Composite,
    Metrics,
    Several,
    evaluate,
    evaluate_composite,
    evaluate_several,
    pattern_from_file,
)
from maskops.backdoor.attacks import ATTACKS
from maskops.backdoor.training import train_backdoored
from maskops.checkpoint import load_state_dict
from maskops.data import Pair, load_images, one_shot, split

PUBLISHED = {
    "badnets": ("vgg_cifar10_badnets_8.pth", 8),
    "trojan_sq": ("vgg_cifar10_trojan_sq_2.pth", 2),
    "l2_inv": ("vgg_cifar10_l2_inv_0.pth", 0),
}
"""Attack -> the file of a small VGG that the authors of I-BAU published, and its target class."""
IMAGES = "cifar10_original.npz"
PATTERNS = {"trojan_sq": "pattern", "trojan_sq_all": "pattern", "trojan_wm": "pattern", "l2_inv": "pattern"}
SEVERAL = ("badnets", "trojan_wm", "l2_inv")
CLASSES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bench-dir", type=Path, help=f"folder with the published models, their triggers' PNGs and {IMAGES}"
    )
    parser.add_argument("--train", help="images to train networks on that aren't published: .npz or class folders")
    parser.add_argument("--eval", help="images to measure those on, and to draw their clean images from")
    parser.add_argument("--patterns", type=Path, help="folder of trojan_sq.png, trojan_wm.png, l2_inv.png")
    parser.add_argument("--train-epochs", type=int, default=30)


@dataclass(frozen=True)
class Victim:
    """A backdoored model, clean images for the defender, and ``measure(model)``: attack or part of it -> metrics."""

    model: nn.Module
    clean: Pair
    measure: Callable[[nn.Module], dict[str, Metrics]]

    def clean_images(self, n: str, seed: int) -> Pair:
        generator = torch.Generator().manual_seed(seed)
        images, labels = self.clean
        if n == "one-shot":
            return one_shot(images, labels, images.shape[-1], generator)
        return split(images, labels, int(n), generator)[0]


class Source:
    """Makes victims from what the command line names."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)

    def why_not(self, net: str, attack: str) -> str | None:
        """One sentence if there is no such victim here."""
        if self._published(net, attack) or net == "digits":
            return None
        if net not in models.ARCHITECTURES:
            return f"no architecture {net} here; there are {', '.join(models.ARCHITECTURES)}"
        if attack not in ATTACKS:
            return f"no attack {attack}; there are {', '.join(ATTACKS)}"
        if not (self.options.train and self.options.eval):
            return f"{net} under {attack} isn't published: give --train and --eval to train it, or --bench-dir"
        if (attack in PATTERNS or attack == "several") and self.options.patterns is None:
            return f"the trigger of {attack} is a PNG: give --patterns"
        return None

    def describe(self, net: str, attack: str) -> str:
        """Where the model comes from, in a few words that tell it from others."""
        if not self.trains(net, attack):
            return "published" if self._published(net, attack) else "demo"
        return f"trained {self.options.train_epochs} epochs on {Path(str(self.options.train)).name}"

    def training_count(self) -> int:
        """How many images a training has."""
        return len(self._images(self.options.train)[1])

    def trains(self, net: str, attack: str) -> bool:
        return net != "digits" and not self._published(net, attack)

    def _published(self, net: str, attack: str) -> bool:
        folder = self.options.bench_dir
        return net == "small_vgg" and attack in PUBLISHED and folder is not None and (folder / IMAGES).exists()

    def image_shape(self, net: str) -> tuple[int, int, int]:
        return (1, 8, 8) if net == "digits" else (3, 32, 32)

    def network(self, net: str) -> nn.Module:
        if net == "digits":
            return demo.network()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return models.build(net)

    def victim(self, net: str, attack: str) -> Victim:
        if self._published(net, attack):
            return self._load(attack)
        if net == "digits":
            seed = int(attack.removeprefix("square_"))
            train, test = demo.digits(seed)
            measure = partial(_measure, attack, test, demo.TRIGGER, demo.TARGET, "all_to_one")
            return Victim(demo.digits_model(seed, self.device), train, measure)
        data = self._images(self.options.train)
        # half to measure on, half for the defender: a model has seen neither
        held_out = self._images(self.options.eval)
        evaluation, clean = split(*held_out, len(held_out[1]) // 2, torch.Generator().manual_seed(0))
        how = ATTACKS[attack](tuple(data[0].shape[1:]), CLASSES, **self._pattern_files(attack))
        trained = train_backdoored(
            self.network(net),
            data,
            how,
            epochs=self.options.train_epochs,
            crop=data[0].shape[-1] // 8,
            flip=True,
            device=self.device,
            progress=True,
        )
        measure = partial(_measure, attack, evaluation, trained.trigger, how.target, how.rule)
        return Victim(trained.model, clean, measure)

    def _load(self, attack: str) -> Victim:
        folder = self.options.bench_dir
        file, target = PUBLISHED[attack]
        model = self.network("small_vgg")
        model.load_state_dict(load_state_dict(folder / file))
        png = folder / f"{attack}.png"
        trigger = BadNetsSquare() if attack == "badnets" else Additive(pattern_from_file(png))
        evaluation, clean = (self._images(f"{folder / IMAGES}:{part}") for part in ("test", "train"))
        model.eval().to(self.device)
        return Victim(model, clean, partial(_measure, attack, evaluation, trigger, target, "all_to_one"))

    def _pattern_files(self, attack: str) -> dict[str, Path]:
        folder = self.options.patterns
        if attack == "several":
            return {name: folder / f"{name}.png" for name in ("trojan_wm", "l2_inv")}
        if attack in PATTERNS:
            return {PATTERNS[attack]: folder / f"{attack.removesuffix('_all')}.png"}
        return {}

    @lru_cache(maxsize=4)  # noqa: B019 - one source lives as long as the program
    def _images(self, path: str) -> Pair:
        return load_images(path)


def _measure(attack: str, evaluation: Pair, trigger, target: int | None, rule: str, model: nn.Module):
    images, labels = evaluation
    if isinstance(trigger, Composite):
        generator = torch.Generator().manual_seed(0)
        return {attack: evaluate_composite(model, images, labels, trigger, generator, num_classes=CLASSES)}
    if isinstance(trigger, Several):
        found = evaluate_several(model, images, labels, trigger, target, rule=rule, num_classes=CLASSES)
        parts = {f"{attack}:{name}": metrics for name, metrics in zip(SEVERAL, found.each, strict=True)}
        return {f"{attack}:any": found.any_of, f"{attack}:together": found.together, **parts}
    return {attack: evaluate(model, images, labels, trigger, target, rule=rule, num_classes=CLASSES)}
