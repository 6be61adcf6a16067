"""MNIST, and the sets in its format, as torchvision and their authors leave them on the disk."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from maskops._text import readable

_PREFIXES = {"train": "train", "test": "t10k"}
_LARGE = 1 << 30
_RATIO = 100
"""A packed file may hold more than _LARGE bytes if it is packed to no less than one part in so many."""


def is_idx(folder: Path) -> bool:
    """Whether a folder holds files as ``train-images-idx3-ubyte`` or ``t10k-images-idx3-ubyte.gz``."""
    return any(_find(folder, prefix, "images", 3) is not None for prefix in _PREFIXES.values())


def read_idx(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, H, W) uint8 and labels (N,) uint8.

    folder: with the files, or with torchvision's ``raw`` that has them
    part:   ``"train"`` or ``"test"``
    errors: ValueError, one line, for missing files and for those that aren't as long as they say
    """
    files = [_find(folder, _PREFIXES[part], *kind) for kind in (("images", 3), ("labels", 1))]
    if None in files:
        lacking = "images" if files[0] is None else "labels"
        raise ValueError(
            f"load_images: {folder} holds no {_PREFIXES[part]}-{lacking}-idx{3 if lacking == 'images' else 1}-ubyte"
        )
    images, labels = (_read(file, dimensions) for file, dimensions in zip(files, (3, 1), strict=True))
    return images[:, None], labels


def _find(folder: Path, prefix: str, what: str, dimensions: int) -> Path | None:
    names = [f"{prefix}-{what}{dot}idx{dimensions}-ubyte{packed}" for dot in "-." for packed in ("", ".gz")]
    places = (place / name for place in (folder, folder / "raw") for name in names)
    return next((file for file in places if file.is_file()), None)


def _read(file: Path, dimensions: int) -> np.ndarray:
    with readable(file), gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as content:
        magic, *shape = struct.unpack(f">{1 + dimensions}I", _exactly(content, 4 * (1 + dimensions)))
        if magic != 0x800 + dimensions:
            raise ValueError(f"it begins with {magic:#x}, not {0x800 + dimensions:#x}")
        count, size = math.prod(shape), file.stat().st_size
        if count > (max(_LARGE, _RATIO * size) if file.suffix == ".gz" else size):
            raise ValueError(f"it claims shape {tuple(shape)} in {size} bytes")
        numbers = _exactly(content, count)
        if content.read(1):
            raise ValueError(f"it has more than shape {tuple(shape)} takes")
    return np.frombuffer(numbers, dtype=np.uint8).reshape(shape)


def _exactly(content: BinaryIO, count: int) -> bytearray:
    """So many bytes; read in parts, as a packed file may have fewer than it says."""
    found = bytearray()
    while len(found) < count:
        part = content.read(min(count - len(found), 1 << 20))
        if not part:
            raise ValueError(f"it ends {count - len(found)} bytes too soon")
        found += part
    return found
