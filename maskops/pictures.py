"""Pictures from files: what Pillow reads of a few formats, and folders of one folder of them per class."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskops._text import printable, readable

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""What an image may be, whatever its name says: Pillow would start other programs for some other formats."""
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def grey_or_rgb(function: str, image):
    """A PIL image of any 8-bit mode in mode L or RGB."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{function}: images must have 8 bits per channel; got PIL mode {image.mode}")
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")


def pixels(image) -> Tensor:
    """(C, H, W) uint8 of a PIL image in mode L or RGB."""
    array = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)


def read_picture(source: Path | bytes, name: str, size: int | None) -> Tensor:
    """(C, H, W) uint8 of an image file, or of what would be in one.

    size:   resized to size x size; None as it is
    errors: ValueError, one line with the name; ImportError without Pillow
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("load_images: folders of images need Pillow: pip install pillow") from error
    with readable(Path(name)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what a file has beside its pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if isinstance(source, Path) and not source.is_file():
            raise OSError("it is no file")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as image:
            image.load()
    image = grey_or_rgb(f"load_images: {printable(name)}", image)
    return pixels(image if size is None else image.resize((size, size), Image.Resampling.BILINEAR))


def stacked(images: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """Images (C, H, W) of one size as one tensor; a grey one among coloured ones becomes RGB.

    errors: ValueError that names two of different sizes
    """
    for name, image in zip(names, images, strict=True):
        if image.shape[1:] != images[0].shape[1:]:
            first, other = printable(names[0]), printable(name)
            found = f"{first} is {tuple(images[0].shape[1:])}, {other} is {tuple(image.shape[1:])}"
            raise ValueError(f"load_images: images must have one size, or give size=; {found}")
    channels = max(len(image) for image in images)
    return torch.stack([image.expand(channels, -1, -1) for image in images])


def read_folder(folder: Path, size: int | None) -> tuple[Tensor, Tensor]:
    """Images and labels of a folder whose folders, sorted as text, are the classes 0, 1, …"""
    if not folder.is_dir():
        raise ValueError(f"load_images: expected a .npz file or a folder of class folders; got {folder}")
    with readable(folder):
        classes = _folders(folder)
    files, labels = [], []
    for label, entry in enumerate(classes):
        with readable(entry):
            of_class = sorted(file for file in entry.iterdir() if file.suffix.lower() in _SUFFIXES)
        files += of_class
        labels += [label] * len(of_class)
    if not files:
        with readable(folder):
            parts = [entry.name for entry in classes if _folders(entry)]
        hint = f"; choose one of its folders, such as {folder}:{parts[0]}" if parts else ""
        raise ValueError(f"load_images: {folder} must hold class folders with images in them; it holds none{hint}")
    names = [str(file) for file in files]
    images = [read_picture(file, name, size) for file, name in zip(files, names, strict=True)]
    return stacked(images, names), torch.tensor(labels)


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
