"""What is looked at rather than read: triggers on images, and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from maskops.report._blocks import folded, section, table
from maskops.report._charts import Value, heat_map, number
from maskops.report._markup import Markup, element
from maskops.report._masks import channels, layer_of, lost
from maskops.report._png import data_uri
from maskops.report._sentences import count, kind_of_mask, kinds_of_mask

_TRIGGER_PIXELS, _IMAGE_PIXELS = 128, 96
_SMALL = 64  # up to this many pixels, each is to be seen
_COLUMNS = 64
_SHARES = (0.1, 1, 5, 20, 50)
_LOST = (0.01, 0.1, 0.25, 0.5, 0.75)
_NAMED_NEURONS = 40
_TITLES = {"recovered": "Recovered trigger Δ", "real": "Real trigger"}
_ORIGINS = {
    "recovered": "The recovered trigger is what the method found by itself, without knowing the real one.",
    "real": "The real trigger was used for measuring alone, and is what it adds to the images here on average.",
}
_SCALE = "Grey is unchanged, black and white are the largest change of a pixel in [0, 1]."


class Shown(NamedTuple):
    """What a trigger adds to images, (1, C, H, W), and images with it, (N, C, H, W)."""

    added: Tensor
    images: Tensor


def trigger_section(content: Mapping[str, Any], images: Tensor, triggers: Mapping[str, Shown]) -> Markup | None:
    if not triggers:
        return None
    rows = [_strip("Clean images", images)]
    rows += [_strip(f"With the {name} trigger", one.images) for name, one in triggers.items()]
    patterns = [_pattern(name, one.added[0], content["triggers"][name]) for name, one in triggers.items()]
    return section(
        "The trigger",
        element("p", " ".join([*(_ORIGINS[name] for name in triggers), _SCALE])),
        element(
            "div", element("div", patterns, class_="patterns"), element("div", rows, class_="images"), class_="figures"
        ),
    )


def _pattern(name: str, added: Tensor, sizes: Mapping[str, Value]) -> Markup:
    title = _TITLES[name]
    largest = max(float(added.abs().max()), 1e-6)
    note = f"largest change {number(sizes['largest'])}, sum {number(sizes['l1'])}"
    picture = _image(0.5 + added / (2 * largest), _TRIGGER_PIXELS, f"{title}: {note}")
    return element("figure", element("figcaption", element("h3", title), element("p", note)), picture)


def _strip(title: str, images: Tensor) -> Markup:
    shown = [_image(image, _IMAGE_PIXELS, "") for image in images]
    strip = element("div", shown, class_="strip", role="img", aria_label=f"{count(len(images), 'image')}: {title}")
    return element("figure", element("figcaption", element("h3", title)), strip)


def _image(image: Tensor, most: int, alt: str) -> Markup:
    pixels = "pixels" if max(image.shape[1:]) <= _SMALL else None
    return element("img", src=data_uri(image, most), alt=alt, class_=pixels)


def masks_section(content: Mapping[str, Any], masks: Mapping[str, Tensor]) -> Markup | None:
    """The masks as they were learned, before anything was pruned."""
    if not masks:
        return None
    kept = "1 keeps a weight as it was, 0 takes it away"
    before = "" if content["pruned"] is None else " These are the masks as they were learned, before pruning."
    return section(
        "The masks",
        element("p", f"A mask is a factor on what a layer has learned: {kept}.{before}"),
        element("div", _distribution(content), _channels(content, masks), class_="figures"),
        _layers(content),
    )


def _distribution(content: Mapping[str, Any]) -> Markup:
    edges, rows = content["masks"]["edges"], []
    for name, layer in content["masks"]["layers"].items():
        whole = sum(layer["counts"]) or 1
        rows.append(
            (layer_of(name), [_level(100 * each / whole, _SHARES) if each else None for each in layer["counts"]])
        )
    levels = [f"{label} %" for label in _ranges(_SHARES)]
    ticks = [(share, f"{edges[0] + share * (edges[-1] - edges[0]):.3g}") for share in (0, 0.25, 0.5, 0.75, 1)]
    note = "Which share of each layer's mask has which value. Empty: none has it."
    return heat_map("Distribution of mask values", rows, levels, ticks, "mask value", note)


def _channels(content: Mapping[str, Any], masks: Mapping[str, Tensor]) -> Markup:
    cut = content["pruned"] is not None
    groups = {name: layer.get("transposed_groups") for name, layer in content["masks"]["layers"].items()}
    rows = [
        (layer_of(name), [_level(each, _LOST) for each in lost(masks[name], _COLUMNS, of).tolist()])
        for name, of in groups.items()
    ]
    note = "How much of each channel was taken away: 1 minus the mean of its mask."
    if cut:
        note = "How far the mask of each channel fell: 1 minus its mean."
    if any(channels(masks[name].shape, of) > _COLUMNS for name, of in groups.items()):
        note += f" In layers of more than {_COLUMNS} channels a cell is the one of several that lost the most."
    ticks = ((0, "first"), (1, "last"))
    return heat_map("Each channel of each layer", rows, list(_ranges(_LOST)), ticks, "channel", note)


def _level(value: float, limits: Sequence[float]) -> int:
    """How many limits the value reaches; without a number it is none.

    >>> _level(0.05, _SHARES), _level(50, _SHARES)
    (0, 5)
    """
    return sum(value >= limit for limit in limits)


def _ranges(limits: Sequence[float]) -> list[str]:
    """
    >>> _ranges((1, 5))
    ['below 1', '1 to 5', 'from 5']
    """
    between = [f"{low:g} to {high:g}" for low, high in pairwise(limits)]
    return [f"below {limits[0]:g}", *between, f"from {limits[-1]:g}"]


def _layers(content: Mapping[str, Any]) -> Markup:
    edges, rows = content["masks"]["edges"], []
    for name, layer in content["masks"]["layers"].items():
        whole = sum(layer["counts"]) or 1
        ends = (f"{100 * layer['counts'][end] / whole:.1f} %" for end in (0, -1))
        shape = " × ".join(map(str, layer["shape"]))
        rows.append((layer_of(name), shape, *(number(layer[of]) for of in ("mean", "least", "most")), *ends))
    ends = (f"below {edges[1]:.2g}", f"from {edges[-2]:.2g}")
    head = ("layer", "shape of the mask", "mean", "least", "most", *ends)
    return folded(f"Numbers of {count(len(rows), 'layer')}", table(head, rows, "Values of each layer's mask"))


def pruned_section(content: Mapping[str, Any]) -> Markup | None:
    if content["pruned"] is None:
        return None
    layers, largest, least = (content["pruned"][key] for key in ("layers", "largest_cut", "smallest_kept"))
    limits = [f"the largest mask among what was cut is {number(largest)}"] if largest is not None else []
    limits += [f"the smallest among what was kept is {number(least)}"] if least is not None else []
    said = "; ".join(limits if largest is not None else ["nothing was cut", *limits])
    granularity, shapes = content["options"].get("granularity"), content["masks"]["layers"]
    kinds = {name: kind_of_mask(shapes[name], granularity) for name in layers}
    rows = [(layer_of(name), layer["count"], layer["of"], _which(layer, kinds[name])) for name, layer in layers.items()]
    return section(
        f"Pruned {kinds_of_mask(content)}",
        element("p", f"{said[:1].upper()}{said[1:]}."),
        table(("layer", "cut", "of", "which"), rows, "What was cut out of each layer"),
    )


def _which(layer: Mapping[str, Any], kind: str) -> str:
    neurons = layer.get("neurons")
    if not neurons:
        return "none" if layer["count"] == 0 else f"single {kind}s"
    more = f" and {len(neurons) - _NAMED_NEURONS} more" if len(neurons) > _NAMED_NEURONS else ""
    return f"no. {', '.join(map(str, neurons[:_NAMED_NEURONS]))}{more}"
