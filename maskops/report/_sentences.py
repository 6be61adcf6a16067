"""What the numbers say, in words."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from maskops.backdoor import removed
from maskops.purify.methods import METHODS
from maskops.report._masks import channels, layer_of

KINDS = ("weight", "kernel", "neuron")

SHARES = {
    "acc": ("ACC", "clean images that are classified rightly"),
    "asr_all": ("asr_all", "images with the trigger that are taken for the target class, of all"),
    "asr_excl": ("asr_excl", "the same, of those that aren't of the target class"),
    "ra": ("RA", "images with the trigger that are still classified rightly, of the same"),
}


def summary(content: Mapping[str, Any]) -> str:
    """What was done and what came of it, in one sentence."""
    return f"{_done(content)}: {_outcome(content)}."


def _done(content: Mapping[str, Any]) -> str:
    method = content["options"].get("method", "A purification")
    name = METHODS[method].title if method in METHODS else method
    images = (content.get("inputs") or {}).get("clean_images")
    source = f" with {images:,} clean images" if isinstance(images, int) else ""
    if content["masks"] is None:
        return f"{name} changed the weights of the model{source}"
    layers = content["masks"]["layers"]
    kinds = kinds_of_mask(content)
    if content["pruned"] is not None:
        cut, of = (sum(layer[key] for layer in content["pruned"]["layers"].values()) for key in ("count", "of"))
        return f"{name} cut {cut:,} of {count(of, kinds.removesuffix('s'))} in {_layers(layers)}{source}"
    values = sum(sum(layer["counts"]) for layer in layers.values())
    return f"{name} learned{source} how much to keep of each of {values:,} {kinds} in {_layers(layers)}"


def _layers(of: Mapping[str, Any]) -> str:
    return count(len({layer_of(name) for name in of}), "layer")


def count(number: int, of: str) -> str:
    """
    >>> count(1, "layer"), count(1200, "layer")
    ('1 layer', '1,200 layers')
    """
    return f"{number:,} {of}{'' if number == 1 else 's'}"


def kinds_of_mask(content: Mapping[str, Any]) -> str:
    """Weights, kernels or neurons: what each value of the masks belongs to."""
    granularity = content["options"].get("granularity")
    kinds = {kind_of_mask(layer, granularity) for layer in content["masks"]["layers"].values()}
    return " and ".join(f"{kind}s" for kind in KINDS if kind in kinds)


def kind_of_mask(layer: Mapping[str, Any], granularity: str | None) -> str:
    """What each value of one mask belongs to; the shape decides where the granularity isn't known.

    >>> [kind_of_mask({"shape": shape}, None) for shape in ((8,), (8, 1), (8, 4), (8, 4, 1, 1), (8, 4, 3, 3))]
    ['neuron', 'neuron', 'weight', 'kernel', 'weight']
    >>> kind_of_mask({"shape": (8, 1, 1, 1)}, "kernel"), kind_of_mask({"shape": (8, 4)}, "kernel")
    ('kernel', 'weight')
    """
    shape = layer["shape"]
    known = granularity in KINDS
    if len(shape) == 1 or (not known and prod(shape) == channels(shape, layer.get("transposed_groups"))):
        return "neuron"
    if len(shape) == 2:  # a kernel of a linear layer is a weight
        return "neuron" if granularity == "neuron" else "weight"
    if known:
        return granularity
    return "kernel" if prod(shape[2:]) == 1 else "weight"


def _outcome(content: Mapping[str, Any]) -> str:
    before, after = content["before"], content["after"]
    accuracy = f"the accuracy on clean images {moved(before['acc'], after['acc'])}"
    attack = [measurement["asr_all"] for measurement in (before, after)]
    if None in attack:
        return f"{accuracy}, but what became of a backdoor was not measured, because no trigger was given"
    target = (content.get("inputs") or {}).get("target")
    goal = "the target class" if target is None else f"class {target}"
    classes = len(after["acc_per_class"])
    limit = f"the AWM paper's limit of {150 / classes:.3g} % for a removed backdoor"
    side = "below" if removed(attack[1], classes) else "not below"
    success = f"the share of images with the trigger that are taken for {goal} (asr_all) {moved(*attack)}"
    return f"{accuracy}, and {success}, which is {side} {limit}"


def moved(before: float | None, after: float | None) -> str:
    """
    >>> moved(0.995, 0.049), moved(0.5, 0.5001), moved(None, 0.5)
    ('fell from 99.5 % to 4.9 %', 'stayed at 50.0 %', 'went from an unknown value to 50.0 %')
    """
    shown = percent(before), percent(after)
    if shown[0] == shown[1]:
        return f"stayed at {shown[0]}"
    if None in (before, after):
        return f"went from {shown[0]} to {shown[1]}"
    return f"{'fell' if after < before else 'rose'} from {shown[0]} to {shown[1]}"


def percent(share: float | None) -> str:
    return "an unknown value" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """
    >>> duration(31.42), duration(312.3), duration(7260)
    ('31.4 s', '5 min 12 s', '2 h 1 min')
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def size(amount: float) -> str:
    """
    >>> size(3 << 20), size(20 << 30)
    ('3 MiB', '20.0 GiB')
    """
    return f"{amount / 2**20:.0f} MiB" if amount < 10 * 2**30 else f"{amount / 2**30:.1f} GiB"
