"""Arrays from .npz files: no more is allocated than is there, and nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maskops._text import one_line, readable

NPZ_PAIRS = {
    "images": ("images", "labels"),
    "x": ("x", "y"),
    "test": ("x_test", "y_test"),
    "train": ("x_train", "y_train"),
}
_LARGE = 1 << 30
_RATIO = 100
"""An array of more than _LARGE bytes may be packed to no less than one part in so many."""


def read_npz(path: Path, wanted: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of an archive, as they are in it; nothing is unpickled.

    wanted: one of ``NPZ_PAIRS``; None where the archive holds one alone
    errors: ValueError, one line that names the file
    """
    with readable(path):
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        with open(path, "rb") as file:
            alone = file.read(6) == b"\x93NUMPY"
    if alone:
        raise ValueError(f"load_images: {path} must hold named arrays; it holds one array, as np.save writes it")
    with open(path, "rb") as file:  # where np.load fails on a file that it opened itself, that stays open
        with readable(path):
            archive = np.load(file, allow_pickle=False)
        with archive:
            names = _npz_names(path, archive.files, wanted)
            with readable(path):
                size = path.stat().st_size
                for member in archive.zip.infolist():
                    if member.filename.removesuffix(".npy") in names:  # NumPy takes names with and without it
                        _check_packed(archive.zip, member, size)
                images, labels = (archive[name] for name in names)
    return images, labels


def _check_packed(archive: zipfile.ZipFile, member: zipfile.ZipInfo, size: int) -> None:
    """Raise ValueError for an array that isn't all there, or is packed as no image is: memory comes before reading.

    size: of the archive's file, which bounds what its directory says
    """
    name = one_line(member.filename)
    if member.compress_size > size - member.header_offset:
        raise ValueError(f"{name} claims {member.compress_size} bytes in a file of {size}")
    if member.file_size > max(_LARGE, _RATIO * member.compress_size):
        raise ValueError(f"{name} unpacks from {member.compress_size} bytes to {member.file_size}")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} is in version {version} of the format, which is for names of fields")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    # an array of objects has no size; np.load refuses it
    if not dtype.hasobject and (min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > member.file_size):
        raise ValueError(f"{name} claims shape {shape} in {member.file_size} bytes")


def _npz_names(path: Path, files: Sequence[str], wanted: str | None) -> tuple[str, str]:
    found = [choice for choice, pair in NPZ_PAIRS.items() if set(pair) <= set(files)]
    if wanted in found:
        return NPZ_PAIRS[wanted]
    choices = " or ".join(f"{path}:{choice}" for choice in found)
    if wanted is not None:
        raise ValueError(f"load_images: {path} holds no {wanted!r}; choose {choices or 'another file'}")
    if len(found) > 1:
        raise ValueError(f"load_images: {path} holds several sets of images; choose {choices}")
    if not found:
        expected = " or ".join("/".join(pair) for pair in NPZ_PAIRS.values())
        raise ValueError(
            f"load_images: {path} must hold {expected}; it holds {one_line(', '.join(files)) or 'nothing'}"
        )
    return NPZ_PAIRS[found[0]]
