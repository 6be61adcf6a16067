"""CIFAR-10 and CIFAR-100 as their author distributes them, and as torchvision leaves them on the disk."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from maskops._text import one_line

_PYTHON = {"train": ("data_batch_1", "train"), "test": ("test_batch", "test")}
_BINARY = {"train": ("data_batch_1.bin", "train.bin"), "test": ("test_batch.bin", "test.bin")}
_PIXELS = 3 * 32 * 32


def is_cifar(folder: Path) -> bool:
    """Whether a folder is one of cifar-10-batches-py, cifar-10-batches-bin, cifar-100-python, cifar-100-binary."""
    return any((folder / name).is_file() for layout in (_PYTHON, _BINARY) for name in layout["test"])


def read_cifar(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64: of CIFAR-100 the fine ones.

    part:   ``"train"`` or ``"test"``
    errors: ValueError for another part, for missing files and for files that hold anything but arrays and plain values:
            they are pickles, of which nothing else is read, so that no code in one runs
    """
    if part not in _PYTHON:
        raise ValueError(f"read_cifar: part must be train or test; got {part!r}")
    files = _files(folder, part)
    pairs = [(_read_binary if file.suffix == ".bin" else _read_python)(file) for file in files]
    images, labels = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    return images.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _files(folder: Path, part: str) -> list[Path]:
    for layout in (_PYTHON, _BINARY):
        for name in layout[part]:
            batches = [folder / name.replace("_1", f"_{index}") for index in range(1, 6)]
            files = batches if name.startswith("data_batch") else [folder / name]
            missing = [file.name for file in files if not file.is_file()]
            if not missing:
                return files
            if len(missing) < len(files):
                raise ValueError(f"read_cifar: {folder} lacks {', '.join(missing)}")
    raise ValueError(f"read_cifar: {folder} holds no {part} images of CIFAR")


def _read_binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    labels = 1 if "batch" in file.name else 2  # CIFAR-100 has a coarse label before the fine one
    content = np.fromfile(file, dtype=np.uint8)
    if content.size == 0 or content.size % (labels + _PIXELS):
        raise ValueError(f"read_cifar: {file} is no whole number of images of {labels + _PIXELS} bytes")
    rows = content.reshape(-1, labels + _PIXELS)
    return rows[:, labels:], rows[:, labels - 1]


def _read_python(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = _ArraysOnly(file.read_bytes()).load()
        images, labels = content[b"data"].bytes(), content.get(b"labels", content.get(b"fine_labels"))
        labels = np.array([int(label) for label in labels], dtype=np.int64)
    except Exception as error:  # a hostile pickle may raise anything
        raise ValueError(f"read_cifar: cannot read {file} ({one_line(error)})") from None
    if images.ndim != 2 or images.shape[1] != _PIXELS or labels.shape != images.shape[:1]:
        raise ValueError(f"read_cifar: {file} must hold (N, {_PIXELS}) bytes and N labels; got {images.shape}")
    return images, labels


class _Array:
    """What stands for an array while a pickle is read: nothing of numpy's is called with what the file says."""

    def __init__(self, kind: Any = None, shape: Any = None, dtype: Any = None) -> None:
        self.data, self.shape, self.dtype = b"", (0,), None

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, fortran, self.data = state
        if fortran:
            raise pickle.UnpicklingError("an array in column order")

    def bytes(self) -> np.ndarray:
        if not isinstance(self.dtype, _Dtype) or self.dtype.name not in ("u1", "|u1", "uint8"):
            raise ValueError("an array of something else than bytes")
        if not isinstance(self.data, (bytes, bytearray)):  # of a number it would make as many zeros
            raise ValueError("an array whose content is no bytes")
        return np.frombuffer(bytearray(self.data), dtype=np.uint8).reshape(tuple(map(int, self.shape)))


class _Dtype:
    def __init__(self, name: str, align: Any = None, copy: Any = None) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: tuple) -> None:
        pass  # byte order and alignment


def _from_buffer(data: Any, dtype: Any, shape: tuple, order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order != "C", data))
    return array


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


# Python's own reader, not the one in C, which allocates what a file says: places in a memo of 2^32, bytes to come
class _ArraysOnly(pickle._Unpickler):
    """Reads numbers, text, lists, dicts and stand-ins for arrays; refuses every other name before it is looked up.

    Keys are text: a tuple of tuples as a key can take hours to hash, or overflow the stack.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._left = len(content)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encoded
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
        return _STAND_INS[module, name]

    def _encoded(self, text: str, encoding: str) -> bytes:
        self._left -= len(text)  # a text that is in the file once can be given to any number of calls
        if self._left < 0:
            raise pickle.UnpicklingError("it makes more bytes of its text than it has")
        return text.encode("latin1")  # the one that pickle writes bytes in

    def _byte_array(self) -> None:
        content = self.read(struct.unpack("<Q", self.read(8))[0])  # what is there, whatever it claims
        self.append(bytearray(content))

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        pickle._Unpickler.load_setitem(self)

    def _set_items(self) -> None:
        _check_keys(self.stack[::2])
        pickle._Unpickler.load_setitems(self)

    def _build(self) -> None:
        if type(self.stack[-2]) not in (_Array, _Dtype):  # and not a stand-in itself, which would stay changed
            raise pickle.UnpicklingError("a state is given to what is no array")
        pickle._Unpickler.load_build(self)

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it holds what arrays don't need")

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.BYTEARRAY8[0]] = _byte_array
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items
    for _code in (pickle.DICT, pickle.ADDITEMS, pickle.FROZENSET, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[_code[0]] = _refuse


def _check_keys(keys: list[Any]) -> None:
    if not all(isinstance(key, (str, bytes)) for key in keys):
        raise pickle.UnpicklingError("a key is no text")
