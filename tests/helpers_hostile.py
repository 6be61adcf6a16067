"""What the tests of hostile files share: pickles written instruction by instruction, and what refusing one may do."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from maskops.data import load_images

_ZIP_EXTRAS = {"version": b"3\n", "byteorder": b"little"}


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    content = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(content)]) + content


def named(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def tuple_of(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + pickle.REDUCE


def dict_of(**items: bytes) -> bytes:
    return pickle.EMPTY_DICT + b"".join(text(name) + item + pickle.SETITEM for name, item in items.items())


def storage(count: int, key: str = "0", kind: str = "FloatStorage", legacy: bool = False) -> bytes:
    view = [pickle.NONE] if legacy else []
    parts = text("storage"), named("torch", kind), text(key), text("cpu"), number(count)
    return tuple_of(*parts, *view) + pickle.BINPERSID


def tensor(of: bytes, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    shape, strides = (tuple_of(*map(number, numbers)) for numbers in (size, stride))
    hooks = call(named("collections", "OrderedDict"))
    return call(named("torch._utils", "_rebuild_tensor_v2"), of, number(offset), shape, strides, pickle.NEWFALSE, hooks)


def pickled(content: bytes) -> bytes:
    return pickle.PROTO + b"\x02" + content + pickle.STOP


def zipped(content: bytes, records: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    """A file as torch.save writes one, around a pickle and its records."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        members = {"data.pkl": pickled(content), **_ZIP_EXTRAS, **(records or {})}
        for name, member in members.items():
            archive.writestr(name if name.startswith(("/", "..")) else f"archive/{name}", member)
    return file.getvalue()


def legacy(content: bytes, keys: tuple[str, ...] = (), data: bytes = b"") -> bytes:
    """A file as torch.save wrote one before 1.6."""
    head = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True})
    parts = [pickle.dumps(part, 2) for part in head]
    return b"".join([*parts, pickled(content), pickle.dumps(list(keys), 2), data])


def safetensors_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@contextmanager
def little_memory(megabytes: int = 300):
    """Within, the process may map so much more memory than it has: asking for more fails, and so does the test."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + megabytes * 2**20, before[1]))
    try:
        yield
    except MemoryError:
        pytest.fail("too much memory was asked for")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def tree(folder) -> dict[str, bytes]:
    """Every file of a folder and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def nothing_but(name: str, folder: Path | None = None):
    """At the end the folder, by default the current one, holds this file alone."""
    folder = Path.cwd() if folder is None else folder
    yield
    assert list(tree(folder)) == [name]


def line_of(path, **options):
    """The one printable line of the refusal, which may take neither time nor memory."""
    start = time.monotonic()
    with little_memory(), pytest.raises((ValueError, TypeError)) as caught:
        load_images(path, **options)
    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert message.isprintable() and message.startswith(("load_images: ", "read_cifar: ")) and len(message) < 1500
    return message
