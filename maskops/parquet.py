"""Pictures and labels from Parquet files, as Hugging Face's hub keeps data sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskops._text import one_line, readable
from maskops.pictures import read_picture, stacked

_IMAGES = ("image", "img", "picture")
_LABELS = ("label", "labels", "fine_label", "target")
_MOST_ROWS = 10_000_000
_LARGE = 1 << 30
_RATIO = 100
"""More than _LARGE bytes, packed or as pixels, may come of a file of no less than one part in so many."""


def is_parquet(path: Path) -> bool:
    """Whether this is a .parquet file, or a folder with some where the hub has them."""
    return bool(_places(path))


def read_parquet(path: Path, part: str | None, size: int | None) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) uint8 and labels (N,) of one split.

    path:   a file, or a folder with files such as ``train-00000-of-00002.parquet``, or with ``data`` that has them
    part:   which of several splits
    size:   images are resized to size x size; None: they must all have one size
    errors: ValueError, one line that names the file; ImportError without pyarrow, or with one that ran code of files
    """
    images: list[Tensor] = []
    labels: list[int] = []
    names: list[str] = []
    for file in _files(path, part):
        bytes_left = max(_LARGE, _RATIO * file.stat().st_size)
        for row, (picture, label) in enumerate(_rows(file)):
            names.append(f"{file}: row {row}")
            images.append(read_picture(picture, names[-1], size))
            labels.append(label)
            bytes_left -= images[-1].numel()
            if bytes_left < 0:
                raise ValueError(f"load_images: {names[-1]}: so many pixels in a file of {file.stat().st_size} bytes")
    if not images:
        raise ValueError(f"load_images: {path} holds no rows")
    return stacked(images, names), torch.tensor(labels)


def _places(path: Path) -> list[Path]:
    """The file, or those in a folder, in its folder ``data`` or in its only folder."""
    if not path.is_dir():
        return [path] if path.suffix == ".parquet" else []
    within = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    # not in all of them, which may be a thousand classes with a thousand pictures each
    folders = within if len(within) == 1 else [folder for folder in within if folder.name == "data"]
    return next((found for folder in (path, *folders) if (found := sorted(folder.glob("*.parquet")))), [])


def _files(path: Path, part: str | None) -> list[Path]:
    if path.suffix == ".parquet" and not path.is_dir():
        if part is not None:
            raise ValueError(f"load_images: {path} is one set of images; it has no {part!r}")
        return [path]
    splits: dict[str, list[Path]] = {}
    for file in _places(path):
        splits.setdefault(file.stem.split("-")[0], []).append(file)
    if part is None and len(splits) == 1:
        (part,) = splits
    if part not in splits:
        found = "holds several sets of images" if part is None else f"holds no {part!r}"
        raise ValueError(
            f"load_images: {path} {found}; choose {one_line(' or '.join(f'{path}:{name}' for name in splits))}"
        )
    return splits[part]


def _rows(file: Path) -> Iterator[tuple[bytes, int]]:
    """Encoded picture and label of each row: one at a time, as a row may be said a million times in a few bytes."""
    parquet = _pyarrow()
    with readable(file), parquet.ParquetFile(file) as content:
        image, label = _columns(content.schema_arrow)
        _check_packed(content.metadata, file.stat().st_size)
        for batch in content.iter_batches(1, columns=[image, label], use_threads=False):
            picture, number = (column[0].as_py() for column in batch.columns)
            picture = picture["bytes"] if isinstance(picture, dict) else picture
            if picture is None or number is None:
                raise ValueError("a row lacks its picture or its label")
            yield picture, number


def _columns(schema: Any) -> tuple[str, str]:
    """The names of the columns of encoded pictures and of labels."""
    import pyarrow

    def holds_bytes(kind: Any) -> bool:
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    images, labels = {}, []
    for field in schema:
        if holds_bytes(field.type):
            images[field.name] = field.name
        elif pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            if holds_bytes(field.type.field("bytes").type):
                images[field.name] = f"{field.name}.bytes"
        elif pyarrow.types.is_integer(field.type):
            labels.append(field.name)
    image, label = _one_of(_IMAGES, list(images)), _one_of(_LABELS, labels)
    if image is None or label is None:
        expected = "a column of encoded images, such as image, and one of whole numbers, such as label"
        raise ValueError(f"it must have {expected}; it has {one_line(', '.join(schema.names))}")
    return images[image], label


def _one_of(usual: Sequence[str], found: Sequence[str]) -> str | None:
    named = [name for name in usual if name in found]
    return named[0] if named else found[0] if len(found) == 1 else None


def _check_packed(metadata: Any, size: int) -> None:
    if metadata.num_rows > _MOST_ROWS:
        raise ValueError(f"it has {metadata.num_rows} rows, more than {_MOST_ROWS}")
    # not of the columns alone: of some broken files pyarrow ends the process when it is asked about a column
    unpacked = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    if unpacked > max(_LARGE, _RATIO * size):
        raise ValueError(f"its rows unpack from {size} bytes to {unpacked}")


def _pyarrow() -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("load_images: Parquet files need pyarrow: pip install maskops[parquet]") from error
    if int(pyarrow.__version__.split(".")[0]) < 15:  # before 14.0.1, reading a schema could run code
        raise ImportError(f"load_images: Parquet files need pyarrow of at least 15; got {pyarrow.__version__}")
    return parquet
