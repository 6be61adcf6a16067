"""What a table consists of: one cell for each network, attack, number of clean images, method and seed."""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from maskops.purify._options import settle
from maskops.purify.methods import METHODS

PAPERS = Path(__file__).parent / "papers"
TABLES = {
    "awm1": "AWM Table 1: small VGG and ResNet-18, 5000 to 50 images",
    "awm2": "AWM Table 2: one-shot (the paper's figures are ResNet-18's)",
    "awm4": "AWM Table 4: from ANP to AWM",
    "awm5": "AWM Table 5: constraints on the trigger and the masks",
    "awm9": "AWM Table 9: masks on one layer (the paper's figures are GTSRB's)",
    "awm10": "AWM Table 10: several triggers at once",
    "anp1": "ANP Table 1: ResNet-18, 500 images",
    "anp3": "ANP Tables 3 and 4: noise steps",
    "nft1": "NFT, comparison on CIFAR-10 (supplementary, Table 6)",
    "nft7": "NFT Table 7: augmentations",
    "nft15": "NFT Table 15: architectures",
    "digits": "Every method on the demo's networks, which read handwritten digits; of no paper",
    "precision": "Float32 against bfloat16 activations, on one of the demo's networks; of no paper",
}
AXES = ("net", "attack", "n", "method")
ONE_SHOT_BATCH = 16
"""AWM's Table 7 has it for the one-shot set, which counts 100 images with its copies."""
ASR_EXCL = ("anp1", "anp3", "nft1", "nft7", "nft15")
"""Tables whose ASR leaves out images of the target class; the others' counts all."""

VARIANTS: dict[str, dict[str, Any]] = {
    "awm:no_clip": {"projection": "none"},
    "awm:no_shrink": {"gamma": 0.0},
    "awm:no_clip_no_shrink": {"projection": "none", "gamma": 0.0},
    "awm:l2": {"projection": "l2"},
    "awm:l2_penalty": {"projection": "none", "trigger_penalty": 1.0},
    **{f"awm:layer_{index + 1}": {"include": name} for index, name in enumerate(("0", "3", "8", "11", "16", "19"))},
    "ft:lr_0.02": {"lr": 0.02},
    **{
        f"anp:epsilon_{epsilon}_steps_{steps}": {"epsilon": epsilon, "noise_steps": steps}
        for epsilon in (0.1, 0.4)
        for steps in (1, 2, 5, 10)
    },
    **{f"{method}:bfloat16": {"dtype": torch.bfloat16} for method in ("awm", "nft")},
    **{f"nft:{name}": {"augmentation": name} for name in ("randaugment", "cutmix", "augmix", "cutout", "adversarial")},
}
"""What a paper's row changes in a method."""


@dataclass(frozen=True)
class Cell:
    """One run of a method, its changes to the preset included."""

    table: str
    net: str
    attack: str
    n: str
    method: str
    seed: int
    preset: str
    changes: dict[str, Any] = field(hash=False)
    victim: str

    @property
    def algorithm(self) -> str:
        return settings(self.method)[0]

    @property
    def key(self) -> tuple[str, ...]:
        place = self.net, self.attack, self.n, self.method
        return *place, str(self.seed), self.preset, described(self.changes), self.victim

    def check(self) -> None:
        """Raise for a number of images, a preset or a change that can't be."""
        if self.n != "one-shot" and not (self.n.isdigit() and int(self.n) > 0):
            raise ValueError(f"--n takes whole numbers above 0 and one-shot; got {self.n}")
        if ":" in self.attack:
            raise ValueError(
                f"no attack {self.attack}: its parts are measured in one run of {self.attack.split(':')[0]}"
            )
        settle(self.method, METHODS[self.algorithm].presets, self.preset, self.changes)


def settings(method: str) -> tuple[str, str, dict[str, Any]]:
    """The name in METHODS, the preset and the changes that a row of a table stands for."""
    if method == "swm_atr":
        return "awm", "swm_atr", {}
    changes = dict(VARIANTS.get(method, {}))
    if "include" in changes:
        changes["include"] = f"features.{changes['include']}"
    return method.partition(":")[0], "paper", changes


def described(changes: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(changes.items()))


def explained() -> str:
    return "; ".join(f"{name}: {title}" for name, title in TABLES.items())


def figures(table: str) -> dict[tuple[str, str, str, str], tuple[float, float]]:
    """(net, attack, n, method) -> the paper's ACC and ASR in percent; method "none" is the model as it was."""
    if not (PAPERS / f"{table}.csv").exists():
        return {}
    with open(PAPERS / f"{table}.csv", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        places = ((tuple(row[name] for name in ("net", "attack", "n", "method")), row) for row in rows)
        return {place: (float(row["acc"]), float(row["asr"])) for place, row in places}


def figure(paper: dict, net: str, attack: str, n: str, method: str) -> str:
    """The paper's ACC and ASR; those of another network, by its name, where the table has none of this one."""
    others = [key for key in paper if key[1:] == (attack, n, method)]
    if not others:
        return ""
    chosen = (net, attack, n, method) if (net, attack, n, method) in paper else others[0]
    acc, asr = paper[chosen]
    return f"{acc:g} / {asr:g}" + ("" if chosen[0] == net else f" ({chosen[0]})")


def places(table: str) -> list[tuple[str, str, str, str]]:
    """(net, attack, n, method) of every run that makes up a table."""
    if table == "digits":
        return [("digits", f"square_{seed}", "100", method) for seed in range(3) for method in METHODS]
    if table == "precision":
        return [
            ("digits", "square_0", "100", f"{method}{dtype}")
            for method in ("awm", "nft")
            for dtype in ("", ":bfloat16")
        ]
    found = ((net, attack.partition(":")[0], n, method) for net, attack, n, method in figures(table))
    # measurements of one attack, as several:any, are one run
    return [place for place in dict.fromkeys(found) if place[3] != "none"]


def choose(options: argparse.Namespace, victim: Callable[[str, str], str]) -> list[Cell]:
    """The cells that the command line asks for, those of one subject one after the other.

    victim: says of a network and an attack where the model comes from
    """
    table = places(options.table)
    known = [list(dict.fromkeys(place[axis] for place in table)) for axis in range(4)]
    asked = [getattr(options, name) or values for name, values in zip(AXES, known, strict=True)]
    unknown = [name for name in asked[3] if settings(name)[0] not in METHODS or (":" in name and name not in VARIANTS)]
    if unknown:
        raise ValueError(f"unknown methods: {', '.join(unknown)}; known: {', '.join(METHODS)} and the table's variants")
    presets = dict(_split(text, "=") for text in options.preset)
    changes = _changes(options.set)
    for name in (*presets, *changes):
        if name not in METHODS:
            raise ValueError(f"--set and --preset: unknown method {name}; known: {', '.join(METHODS)}")
    # a combination of the table's own values that the table doesn't have is none of it
    chosen = [
        place
        for place in product(*asked)
        if place in table or any(value not in values for value, values in zip(place, known, strict=True))
    ]
    if not chosen:
        raise ValueError(f"{options.table} has no such part")
    cells = [
        _cell(options.table, place, seed, presets, changes, victim(*place[:2]))
        for place in chosen
        for seed in options.seed
    ]
    for cell in cells:
        cell.check()
    return cells


def subjects(cells: Iterable[Cell]) -> list[tuple[str, str]]:
    """The networks and attacks, each pair once; ``several:…`` are measurements of one attack."""
    return list(dict.fromkeys((cell.net, cell.attack.partition(":")[0]) for cell in cells))


def _cell(table, place, seed, presets, changes, victim) -> Cell:
    net, attack, n, method = place
    algorithm, preset, own = settings(method)
    preset = presets.get(algorithm, preset) if preset == "paper" else preset
    own |= {"flip": False} if net == "digits" else {}  # a mirrored digit is another, or none
    if n == "one-shot" and algorithm in ("awm", "swm"):
        own["batch_size"] = ONE_SHOT_BATCH
    return Cell(table, net, attack, n, method, seed, preset, {**own, **changes.get(algorithm, {})}, victim)


def _changes(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    changes: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, value = _split(text, "=")
        method, option = _split(name, ".")
        with contextlib.suppress(SyntaxError, ValueError):  # else it is text
            value = ast.literal_eval(value)
        changes.setdefault(method, {})[option] = value
    return changes


def _split(text: str, separator: str) -> tuple[str, str]:
    left, found, right = text.partition(separator)
    if not (left and found and right):
        raise ValueError(f"expected {'METHOD=PRESET' if separator == '=' else 'METHOD.OPTION=VALUE'}; got {text!r}")
    return left, right
