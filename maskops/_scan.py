"""What ``torch.load`` would make of a file, found out without making it.

``torch.load(weights_only=True)`` runs no code, but it believes the numbers in a file: a storage of 10^15 elements is
allocated before a byte of it is read, a tuple of tuples as the key of a dict hashes for hours or overflows the stack,
and a packed record unpacks to whatever it likes. So the file's pickle is first gone through by a machine whose objects
do nothing. It knows what ``torch.load`` knows and a state dict needs; everything else ends it.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

_MOST_STEPS = 5_000_000
"""Instructions of a pickle: a thousand tensors take about 40 000. Each may cost some hundred bytes."""

_LARGEST_KEY = 2**61 - 2
"""Larger whole numbers can be made to have one hash, which makes a dict of them as slow as a list."""

_MOST_TUPLES = 1000
"""Tuples as keys: these too can be made to have one hash."""

_LARGEST_SHAPE = 2**120
"""The product of sizes, or of strides, each of which torch bounds by itself."""

_WIDTHS = {"Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Char": 1, "Byte": 1, "Short": 2, "Int": 4, "Long": 8}
_WIDTHS |= {"Bool": 1, "ComplexFloat": 8, "ComplexDouble": 16, "Untyped": 1}
"""Bytes of an element by the name of the storage."""

_MAKES_DICTS = {"collections.OrderedDict", "collections.Counter"}
_MAKES_VIEWS = {f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3")}
_MAKES_TENSORS = _MAKES_VIEWS | {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_MAKES_VALUES = {"torch.Size", "torch.device", "_codecs.encode", "builtins.set", "builtins.complex"}
_KNOWN = _MAKES_DICTS | _MAKES_TENSORS | _MAKES_VALUES

_ATOMS = (str, bytes, int, float, type(None))
_HASHED_AS_NUMBERS = {"torch.Size", "builtins.complex"}


def check(path: Path) -> None:
    """Raise pickle.UnpicklingError, or what a reader raises on a broken file, unless ``torch.load`` may read the file.

    What it allocates is then a small multiple of the file's size.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            _check_zip(path)
        else:
            file.seek(0)
            _check_legacy(file, path.stat().st_size)


def _check_zip(path: Path) -> None:
    size = path.stat().st_size
    _check_end(path, size)
    with zipfile.ZipFile(path) as archive:
        records: dict[str, zipfile.ZipInfo] = {}
        for record in archive.infolist():
            name = record.filename.lower()  # as torch looks for it
            if name in records:
                raise pickle.UnpicklingError("the archive has two records of one name")
            records[name] = record
        if any(name.endswith("/constants.pkl") for name in records):
            raise RuntimeError("a TorchScript archive")
        if sum(record.file_size for record in records.values()) > size:
            raise pickle.UnpicklingError(f"the archive claims to hold more than its {size} bytes")
        folders = {name.partition("/")[0] for name in records}
        if len(folders) != 1:
            raise ValueError("the archive isn't one folder")
        folder = folders.pop()
        if f"{folder}/data.pkl" not in records:
            raise ValueError("the archive has no data.pkl")
        content = archive.read(records[f"{folder}/data.pkl"])
    sizes = {name: record.file_size for name, record in records.items()}
    _Machine(io.BytesIO(content), _Claims(size, sizes, f"{folder}/data/"), size).run()


def _check_end(path: Path, size: int) -> None:
    """The directory must be where both readers look: torch where the file says, Python just before the file's end."""
    with open(path, "rb") as file:
        file.seek(max(0, size - 98))
        tail = file.read().rjust(98, b"\0")
    end, found = size - 22, tail[-22:-18] == b"PK\x05\x06"
    length, offset = struct.unpack("<2L", tail[-10:-2])
    if tail[-42:-38] == b"PK\x06\x07":  # in 64 bits
        end = size - 98
        found = found and tail[:4] == b"PK\x06\x06" and struct.unpack("<Q", tail[-34:-26])[0] == end
        length, offset = struct.unpack("<2Q", tail[40:56])
    if not found or offset + length != end:
        raise zipfile.BadZipFile("the archive's directory isn't at its end")


def _check_legacy(file: BinaryIO, size: int) -> None:
    claim = _Claims(size)
    first = _Machine(file, claim, size).run()
    if first != torch.serialization.MAGIC_NUMBER:
        raise ValueError("invalid magic number")
    for _ in range(4):  # the protocol, the system, the content, the keys of its storages
        _Machine(file, claim, size).run()


class _Claims:
    """What the storages of a file claim to take, which may not be more than the file has.

    size:   the file's
    sizes:  name -> bytes of each record of an archive
    folder: where the records of storages are in it
    """

    def __init__(self, size: int, sizes: Mapping[str, int] | None = None, folder: str = "") -> None:
        self._size, self._sizes, self._folder = size, sizes or {}, folder
        self._claims: dict[str, int] = {}
        self._total = 0

    def __call__(self, key: str, claimed: int) -> None:
        record = self._sizes.get(f"{self._folder}{key}".lower(), claimed)  # torch says that there is none
        if record < claimed:
            raise pickle.UnpicklingError(f"a storage of {claimed} bytes is in a record of {record}")
        before = self._claims.get(key, 0)
        self._claims[key] = max(before, claimed)
        self._total += self._claims[key] - before
        if self._total > self._size:
            raise pickle.UnpicklingError(f"its tensors claim more than the file's {self._size} bytes")


class _Inert:
    """What stands for a global, or for what one made.

    count: of a storage's elements
    """

    def __init__(self, name: str, made: bool = False, count: int = 0) -> None:
        self.name, self.made, self.count = name, made, count


class _Dict:
    """What stands for a dict: it hashes nothing.

    count: of its entries, those that are set twice too
    """

    count = 0


class _Machine:
    """Goes through one pickle, instruction by instruction.

    claim: is told the key and the bytes of each storage
    size:  of the file, in bytes: of what is in it no more is ever copied
    """

    def __init__(self, file: BinaryIO, claim: Callable[[str, int], None], size: int) -> None:
        self._file, self._claim = file, claim
        self._copies_left, self._tuples_left = size, _MOST_TUPLES
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MOST_STEPS):
            code = self._read(1)
            if code == pickle.STOP:
                return self._stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise pickle.UnpicklingError(f"unsupported instruction {code!r}")
            step(self)
        raise pickle.UnpicklingError(f"more than {_MOST_STEPS} instructions")

    def _read(self, count: int) -> bytes:
        content = self._file.read(min(count, 1 << 26))  # no more than that is ever allocated for nothing
        if len(content) != count:
            raise EOFError("the pickle ends in the middle")
        return content

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._read(struct.calcsize(form)))[0]

    def _put(self, form: str) -> None:
        self._memo[self._number(form)] = self._stack[-1]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _text(self) -> None:
        self._push(str(self._read(self._number("<I")), "utf-8", "surrogatepass"))

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise pickle.UnpicklingError("the stack is empty")
        start = len(self._stack) - count
        self._stack[start:] = [tuple(self._stack[start:])]

    def _copy(self, *values: Any) -> None:
        """Count what a call copies or looks through: what is in a file once can be given to any number of calls."""
        for value in values:
            self._copies_left -= _length(value)
            if self._copies_left < 0:
                raise pickle.UnpicklingError("it makes more copies of its content than a file of tensors does")
            if isinstance(value, (list, tuple)):
                self._copies_left -= sum(map(_length, value))
        if self._copies_left < 0:
            raise pickle.UnpicklingError("it makes more copies of its content than a file of tensors does")

    def _set_items(self, items: list[Any]) -> None:
        for key in items[::2]:
            if isinstance(key, tuple):
                self._tuples_left -= 1
                self._copy(key)
            _check_key(key)
        if self._tuples_left < 0:
            raise pickle.UnpicklingError(f"more than {_MOST_TUPLES} keys are tuples")
        if not isinstance(self._stack[-1], _Dict):
            raise pickle.UnpicklingError("items are set in what is no dict")
        self._stack[-1].count += len(items) // 2

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _append(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise pickle.UnpicklingError("something is appended to what is no list")
        self._stack[-1].extend(items)

    def _global(self) -> None:
        module, name = (self._file.readline(1000)[:-1].decode() for _ in range(2))
        module = "builtins" if module == "__builtin__" else module  # Python 2's name
        full = f"{module}.{name}"
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if full not in _KNOWN and not is_dtype and _width(full) is None:
            if module == "torch" or (module.startswith("torch.") and not module.startswith("torch.nn.")):
                raise pickle.UnpicklingError(f"it holds {full}, which is no plain tensor")
            raise pickle.UnpicklingError(f"GLOBAL {full} is not allowed")
        self._push(_Inert(full))

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Inert) or function.made or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("something else than a function is called")
        name = function.name
        self._copy(*arguments)
        if name in _MAKES_DICTS:
            pairs = name == "collections.OrderedDict"
            if not all(_is_plain_argument(argument, pairs) for argument in arguments):
                raise pickle.UnpicklingError(f"{name} of what it can't be made of")
            made = _Dict()
            made.count = sum(map(_length, arguments))
            self._push(made)
            return
        if name not in _KNOWN:
            raise pickle.UnpicklingError(f"{name} is called")
        if name == "builtins.set" and not all(_is_plain_argument(argument, False) for argument in arguments):
            raise pickle.UnpicklingError("a set of what is no name or number")
        if name == "_codecs.encode" and arguments[1:] not in (("latin1",), (b"latin1",)):
            raise pickle.UnpicklingError("text is encoded otherwise than in latin1")
        if name in _MAKES_TENSORS:
            _check_shapes(arguments)
        if name in _MAKES_VIEWS:
            _check_extent(arguments)
        self._push(_Inert(name, made=True))

    def _build(self) -> None:
        self._copy(self._stack.pop())
        if not isinstance(self._stack[-1], _Dict):
            raise pickle.UnpicklingError("an object is given a state that only a dict's may be")

    def _persistent(self) -> None:
        found = self._stack.pop()
        if not isinstance(found, tuple) or len(found) not in (5, 6) or found[0] not in ("storage", b"storage"):
            raise pickle.UnpicklingError("only storages may be loaded")
        kind, key, _, count = found[1:5]
        width = _width(kind.name) if isinstance(kind, _Inert) and not kind.made else None
        if width is None or not isinstance(key, (str, bytes, int)) or not isinstance(count, int) or count < 0:
            raise pickle.UnpicklingError("a storage must have a type, a key and a size")
        key = key.decode("ascii") if isinstance(key, bytes) else str(key)
        self._claim(key, count * width)
        self._push(_Inert("storage", made=True, count=count))


_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: lambda machine: machine._number("B"),
    pickle.GLOBAL: _Machine._global,
    pickle.NEWOBJ: _Machine._reduce,
    pickle.REDUCE: _Machine._reduce,
    pickle.BUILD: _Machine._build,
    pickle.BINPERSID: _Machine._persistent,
    pickle.APPEND: lambda machine: machine._append([machine._stack.pop()]),
    pickle.APPENDS: lambda machine: machine._append(machine._since_mark()),
    pickle.SETITEM: _Machine._set_item,
    pickle.SETITEMS: lambda machine: machine._set_items(machine._since_mark()),
    pickle.MARK: _Machine._mark,
    pickle.TUPLE: lambda machine: machine._push(tuple(machine._since_mark())),
    pickle.TUPLE1: lambda machine: machine._tuple(1),
    pickle.TUPLE2: lambda machine: machine._tuple(2),
    pickle.TUPLE3: lambda machine: machine._tuple(3),
    pickle.NONE: lambda machine: machine._push(None),
    pickle.NEWFALSE: lambda machine: machine._push(False),
    pickle.NEWTRUE: lambda machine: machine._push(True),
    pickle.EMPTY_TUPLE: lambda machine: machine._push(()),
    pickle.EMPTY_LIST: lambda machine: machine._push([]),
    pickle.EMPTY_DICT: lambda machine: machine._push(_Dict()),
    pickle.EMPTY_SET: lambda machine: machine._push(_Inert("set", made=True)),
    pickle.BININT: lambda machine: machine._push(machine._number("<i")),
    pickle.BININT1: lambda machine: machine._push(machine._number("B")),
    pickle.BININT2: lambda machine: machine._push(machine._number("<H")),
    pickle.LONG1: lambda machine: machine._push(pickle.decode_long(machine._read(machine._number("B")))),
    pickle.BINFLOAT: lambda machine: machine._push(machine._number(">d")),
    pickle.BINUNICODE: _Machine._text,
    pickle.SHORT_BINSTRING: lambda machine: machine._push(machine._read(machine._number("B"))),
    pickle.BINGET: lambda machine: machine._push(machine._memo[machine._number("B")]),
    pickle.LONG_BINGET: lambda machine: machine._push(machine._memo[machine._number("<I")]),
    pickle.BINPUT: lambda machine: machine._put("B"),
    pickle.LONG_BINPUT: lambda machine: machine._put("<I"),
}
"""All instructions that ``torch.load(weights_only=True)`` knows."""


def _width(name: str) -> int | None:
    module, _, kind = name.rpartition(".")
    if module not in ("torch", "torch.storage", "torch.cuda") or not kind.endswith("Storage"):
        return None
    return _WIDTHS.get(kind.removesuffix("Storage"))


def _check_shapes(arguments: tuple[Any, ...]) -> None:
    """Sizes, strides and offsets: what torch computes with them must not overflow."""
    for argument in arguments:
        numbers = argument if isinstance(argument, tuple) else (argument,)
        numbers = [number for number in numbers if isinstance(number, int)]
        if any(number < 0 for number in numbers):
            raise pickle.UnpicklingError(f"a tensor has a negative size, stride or offset ({min(numbers)})")
        product = 1
        for number in numbers:  # one by one: the product of all could take hours
            product *= max(1, number)
            if product > _LARGEST_SHAPE:
                raise pickle.UnpicklingError("a tensor's sizes or strides are too large")


def _check_extent(arguments: tuple[Any, ...]) -> None:
    """A tensor must lie in its storage: for one that doesn't torch makes an old file's storage as large as it says."""
    storage, offset, size, stride = (*arguments, None, None, None, None)[:4]
    if not isinstance(storage, _Inert) or storage.name != "storage":
        raise pickle.UnpicklingError("a tensor is made of what is no storage")
    plain = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
    if not plain or not all(isinstance(number, int) for number in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor must have an offset, sizes and strides, which are numbers")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.count:
        raise pickle.UnpicklingError(f"a tensor reaches up to element {last} of a storage of {storage.count}")


def _length(value: Any) -> int:
    """How much a call may copy of a value."""
    if isinstance(value, _Dict):
        return value.count
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 0


def _check_key(key: Any) -> None:
    for part in key if isinstance(key, tuple) else (key,):
        named = isinstance(part, _Inert) and part.name not in _HASHED_AS_NUMBERS
        if not (named or _is_atom(part)):
            raise pickle.UnpicklingError("a key must be a name or a number")


def _is_atom(value: Any) -> bool:
    return isinstance(value, _ATOMS) and not (isinstance(value, int) and abs(value) > _LARGEST_KEY)


def _is_plain_argument(argument: Any, pairs: bool) -> bool:
    """Whether a dict or a set can be made of it without harm.

    pairs: of keys and values, and not of keys alone
    """
    if isinstance(argument, _Dict):
        return True
    items = argument if isinstance(argument, (list, tuple)) else [argument]
    return all(
        all(map(_is_atom, item)) and len(item) == 2 if pairs and isinstance(item, (list, tuple)) else _is_atom(item)
        for item in items
    )
