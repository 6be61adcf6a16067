"""How a model wants its images, where it says so itself: mean, std and size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from maskops._text import one_line
from maskops.cli import transformers_folder

_RESCALE = 1 / 255
_LARGEST = 4096


class Preprocessing(NamedTuple):
    """What a model says of its images; None for what it doesn't.

    mean, std: per channel, of pixels in [0, 1]
    size:      height and width
    source:    where it says so
    cropped:   whether it means the middle of a larger picture
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    source: str = ""
    cropped: bool = False


def of(arch: str, model: nn.Module) -> Preprocessing:
    """From the files of a folder of transformers, or the attributes of a model of timm; nothing for other models.

    errors: ValueError, one line that names the file
    """
    folder = transformers_folder.named(arch)
    return _of_timm(arch, model) if folder is None else _of_folder(folder)


def check_size(wanted: Preprocessing) -> None:
    """errors: ValueError, one line, for a size that could fill the memory, unless somebody means it"""
    if wanted.size is not None and wanted.size > _LARGEST:
        size = one_line(str(wanted.size))
        raise ValueError(f"{wanted.source}: images must be of at most {_LARGEST} pixels; got {size}: give --size")


def _of_timm(arch: str, model: nn.Module) -> Preprocessing:
    found = getattr(model, "pretrained_cfg", None)
    if arch.partition(":")[0].partition(".")[0] != "timm" or not isinstance(found, Mapping):
        return Preprocessing()  # others may have an attribute of that name too
    mean, std = (_channels(found.get(which)) for which in ("mean", "std"))
    together = mean is not None and std is not None
    size = _square(list(found.get("input_size") or ())[1:])
    return Preprocessing(*((mean, std) if together else (None, None)), size, "the model's pretrained_cfg")


def _of_folder(folder: Path) -> Preprocessing:
    config = transformers_folder.read_json(folder / "config.json")
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return Preprocessing(size=_square(config.get("image_size")), source=str(folder / "config.json"))
    content = transformers_folder.read_json(file)
    factor = content.get("rescale_factor", _RESCALE)
    plain = isinstance(factor, (int, float)) and math.isclose(factor, _RESCALE, rel_tol=1e-3)
    if not plain or content.get("do_rescale") is False or content.get("rescale_offset") or content.get("offset"):
        raise ValueError(f"{file} scales pixels in a way of its own, not by 1/255: give --mean and --std, and --size")
    mean = std = None
    if content.get("do_normalize") is not False:
        mean, std = (_channels(content.get(name)) for name in ("image_mean", "image_std"))
        if mean is None or std is None:
            found = {name: content.get(name) for name in ("image_mean", "image_std")}
            raise ValueError(f"{file}: image_mean and image_std must be numbers; got {one_line(json.dumps(found))}")
    size, cropped = None, bool(content.get("do_center_crop"))
    if cropped:
        size = _square(content.get("crop_size"))
    elif content.get("do_resize") is not False:
        size = _square(content.get("size"))
    return Preprocessing(mean, std, size or _square(config.get("image_size")), str(file), cropped)


def _channels(values: Any) -> tuple[float, ...] | None:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        return None
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return tuple(float(value) for value in values) if numbers else None


def _square(size: Any) -> int | None:
    """The side of a square image, however it is said."""
    if isinstance(size, Mapping):
        size = [size[name] for name in ("height", "width", "shortest_edge") if name in size]
    sides = set(size) if isinstance(size, Sequence) and not isinstance(size, str) else {size}
    side = sides.pop() if len(sides) == 1 else None
    return side if isinstance(side, int) and not isinstance(side, bool) and side > 0 else None
