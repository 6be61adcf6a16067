"""Mutated files against every reader: ``make fuzz MINUTES=10``, and for a few seconds among the tests.

Whatever is in a file, a reader returns or raises an error of ours, soon and in little memory.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from helpers_hostile import legacy, little_memory, pickled, safetensors_file, zipped
from helpers_resume import images, network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from maskops.checkpoint import load_masks, load_run, load_state_dict, save_masks, save_state_dict
from maskops.cli import option_files
from maskops.data import load_images
from maskops.idx import _read as _read_idx
from maskops.purify import swm

SECONDS = 5
"""How long one file may keep the processor: a deadline for each example."""

MEGABYTES = 400
"""What reading one may map beside what the process has."""


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it lies in a folder, what reads it, and valid contents to begin with."""

    name: str
    read: Callable[[Path], Any]
    valid: tuple[bytes, ...]


def _saved(save: Callable[..., None], name: str, *arguments: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, name), *arguments)
        return Path(folder, name).read_bytes()


def _torch(content: Any, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _image(form: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (5, 4), 3).save(file, form)
    return file.getvalue()


def _npz(save: Callable[..., None]) -> bytes:
    file = io.BytesIO()
    save(file, x=np.zeros((2, 3, 4, 4), np.uint8), y=np.array([0, 1]))
    return file.getvalue()


def _purify(checkpoint: Path) -> None:
    # of a run that is over nothing is left to do but to read its checkpoint
    options = {"epochs": 1, "steps": 1, "batch_size": 8, "progress": False, "graphs": False}
    swm(network(), images(), checkpoint=checkpoint, resume=True, **options)


def kinds() -> list[Kind]:
    """Every kind of file that a reader takes."""
    state = {
        "conv.weight": torch.rand(2, 3, 2, 2),
        "bn.num_batches_tracked": torch.tensor(7),
        "half": torch.rand(2).half(),
    }
    nested = {"net": torch.nn.BatchNorm2d(2).state_dict(), "epoch": 3, "optimizer": {"state": {0: torch.rand(1)}}}
    tensors = [_torch(content, True) for content in (state, nested)], [_torch(each, False) for each in (state, nested)]
    masks = _saved(save_masks, "masks.safetensors", {"a.mask": torch.rand(3)}, {"alpha": 0.9, "layers": ["conv"]})
    run = _saved(_purify, "run.safetensors")
    cifar = _cifar_files()
    idx = struct.pack(">4I", 0x803, 2, 3, 4) + bytes(24)
    packed = {"": bytes, ".gz": partial(gzip.compress, mtime=0)}
    return [
        Kind("model.pth", load_state_dict, tuple(tensors[0])),
        Kind("model.pt", load_state_dict, tuple(tensors[1])),
        Kind("model.safetensors", load_state_dict, (_saved(save_state_dict, "m.safetensors", state),)),
        Kind("masks.safetensors", load_masks, (masks,)),
        Kind("state.safetensors", load_run, (run,)),
        Kind("run.safetensors", _purify, (run,)),
        Kind("images.npz", load_images, (_npz(np.savez), _npz(np.savez_compressed))),
        Kind("0/a.png", _folder, tuple(map(_image, ("PNG", "GIF", "BMP", "JPEG", "PPM", "TIFF", "WEBP")))),
        Kind("test_batch", _cifar, tuple(cifar)),
        Kind("test.bin", _cifar, (bytes(3074),)),
        *(
            Kind(f"images-idx3-ubyte{end}", partial(_read_idx, dimensions=3), (pack(idx),))
            for end, pack in packed.items()
        ),
        Kind("rows.parquet", load_images, _parquet_files()),
        Kind("options.json", option_files._read, (b'{"epochs": 3, "mean": [0.5, 1e-3], "arch_options": {"a": null}}',)),
        Kind("options.yaml", option_files._read, (b"epochs: 3\nmean: [0.5, 1e-3]\narch_options: {a: ~}\nflip: yes\n",)),
    ]


def _parquet_files() -> tuple[bytes, ...]:
    """None without pyarrow."""
    if find_spec("pyarrow") is None:
        return ()
    from pyarrow import parquet, table

    columns = {"image": [{"bytes": _image("PNG"), "path": "a.png"}] * 2, "label": [1, 0]}
    files = [io.BytesIO() for _ in range(2)]
    for file, compression in zip(files, ("snappy", "zstd"), strict=True):
        parquet.write_table(table(columns), file, compression=compression)
    return tuple(file.getvalue() for file in files)


def _cifar_files() -> list[bytes]:
    data = np.zeros((2, 3072), np.uint8)
    return [pickle.dumps({b"data": data, b"labels": [0, 1]}, protocol) for protocol in (2, 4)]


def _folder(file: Path) -> Any:
    return load_images(file.parents[1])


def _cifar(file: Path) -> Any:
    return load_images(f"{file.parent}:test")


_NUMBERS = st.sampled_from(
    [0, 1, 2, 2**7, 2**8 - 1, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**64 - 1]
)


@st.composite
def mutated(draw: Callable[[Any], Any], valid: tuple[bytes, ...]) -> bytes:
    """A valid file with bytes changed, inserted, doubled, cut out or overwritten by numbers at the edge."""
    content = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(content)))
        length = draw(st.integers(1, 32))
        match draw(st.sampled_from(("flip", "set", "insert", "remove", "copy", "cut", "number"))):
            case "flip" if place < len(content):
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "set":
                content[place : place + 1] = draw(st.binary(min_size=1, max_size=8))
            case "insert":
                content[place:place] = draw(st.binary(max_size=32))
            case "remove":
                del content[place : place + length]
            case "copy":
                start = draw(st.integers(0, len(content)))
                content[place:place] = content[start : start + length]
            case "cut":
                del content[place:]
            case "number":
                width = draw(st.sampled_from((1, 2, 4, 8)))
                content[place : place + width] = (draw(_NUMBERS) % 256**width).to_bytes(width, "little")
    return bytes(content)


_OPCODES = st.sampled_from(
    [bytes([code]) for code in b"()]}lt.0123RbacosSeuNIJKMLGXUTVFqrhjpgQP\x80" + bytes(range(0x81, 0x99))]
)
_NAMES = st.sampled_from(
    [
        *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"),
        *(b"cbuiltins\nset\n", b"cbuiltins\neval\n", b"cposix\nsystem\n", b"ctorch\nSize\n", b"c_codecs\nencode\n"),
        *(b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000", b"X\x03\x00\x00\x00cpu", b"X\x03\x00\x00\x00net"),
    ]
)
_PICKLES = st.lists(st.one_of(_OPCODES, _NAMES, st.binary(max_size=5)), max_size=40).map(b"".join)
_WORDS = st.sampled_from(("dtype", "shape", "data_offsets", "__metadata__", "w", "maskops", "F32", "BOOL"))
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | _WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_WORDS, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def _headers(draw: Callable[[Any], Any]) -> bytes:
    """A safetensors file with a header of the right form, most of whose numbers are wrong."""
    sizes = st.integers(-1, 5) | _NUMBERS
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(("F32", "F64", "BF16", "I8", "U64", "BOOL", "C64", "F8_E4M3", "x")),
            "shape": st.lists(sizes, max_size=4),
            "data_offsets": st.tuples(sizes, sizes),
        }
    )
    names = st.text(max_size=4) | st.just("__metadata__")
    header = draw(st.dictionaries(names, entry | _JSON, max_size=4) | _JSON)
    return safetensors_file(json.dumps(header).encode(), draw(st.binary(max_size=64)))


_KINDS = st.sampled_from(
    ("|u1", "<f4", "<i8", "|b1", "|O", "<c8", "<U9", "<M8[s]", "<f2", ">f8", "<f16", [("a", "O")], [("a", "<i4", 5)])
)


@st.composite
def _archives(draw: Callable[[Any], Any]) -> bytes:
    """A .npz file whose arrays' headers say what they like."""
    shape = st.lists(st.integers(-2, 5) | _NUMBERS, max_size=5).map(tuple)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))) as archive:
        for name in draw(st.sampled_from((("x", "y"), ("images", "labels"), ("x", "x"), ("../x", "y"), ("x\x1b[2J",)))):
            kind = draw(
                st.sampled_from(
                    ("|u1", "<f4", "<i8", "|b1", "|O", "<c8", "<U9", "<M8[s]", "<f2", ">f8", "[('a', 'O')]")
                )
            )
            descr = kind if kind.startswith("[") else repr(kind)
            header = (
                f"{{'descr': {descr}, 'fortran_order': {draw(st.booleans())}, 'shape': {draw(shape)!r}}}\n".encode()
            )
            content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + draw(st.binary(max_size=400))
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def _with_its_pickle_mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """The archive with its checksums right, which would otherwise be all that is found wrong."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    inner = members["data.pkl"]
    return mutated((inner,)).map(lambda changed: zipped(b"", {**members, "data.pkl": changed}))


def generated(kind: Kind) -> st.SearchStrategy[bytes]:
    """Files of the kind that are made up, not mutated."""
    if kind.name == "model.pth":
        made = st.builds(zipped, _PICKLES, st.dictionaries(st.just("data/0"), st.binary(max_size=32)))
        return made | st.sampled_from(kind.valid).flatmap(_with_its_pickle_mutated)
    if kind.name == "model.pt":
        return st.builds(legacy, _PICKLES, st.just(("0",)), st.binary(max_size=32)) | _PICKLES.map(pickled)
    if kind.name.endswith(".safetensors"):
        return _headers()
    if kind.name.endswith(".npz"):
        return _archives()
    if kind.name == "test_batch":
        return _PICKLES.map(pickled)
    return st.binary(max_size=4000)


def check(kind: Kind, content: bytes) -> str:
    """What reading the file came to; raises where that is no error of ours."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, kind.name)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        before = time.process_time()
        try:
            with little_memory(MEGABYTES):
                kind.read(file)
            outcome = "read"
        except (ValueError, TypeError) as error:
            outcome = type(error).__name__
            line = str(error)
            assert line.isprintable() and str(folder) in line, line
        assert time.process_time() - before < SECONDS, "it took too long"
        left = [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()]
        assert left == [kind.name] and (outcome == "read" or file.read_bytes() == content), left
    return outcome


def fuzz(kind: Kind, examples: int, seed: int | None = None) -> Counter[str]:
    """Read so many files; returns how many came to what."""
    outcomes: Counter[str] = Counter()
    how = {"max_examples": examples, "deadline": None, "database": None, "derandomize": seed is None}
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

    @settings(**how, suppress_health_check=slow)
    @given(mutated(kind.valid) | generated(kind))
    def one(content: bytes) -> None:
        outcomes[check(kind, content)] += 1

    if seed is not None:
        one = hypothesis.seed(seed)(one)
    one()
    return outcomes


def main(minutes: float) -> int:
    """All kinds in turn until the time is over; returns how many kinds had a file that was not dealt with."""
    end, seed = time.monotonic() + 60 * minutes, time.time_ns() % 2**32
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    totals: dict[str, Counter[str]] = {}
    failed: set[str] = set()
    every = [kind for kind in kinds() if kind.valid]
    while time.monotonic() < end:
        for kind in every:
            seed += 1
            try:
                totals.setdefault(kind.name, Counter()).update(fuzz(kind, 100, seed))
            except Exception as error:
                failed.add(kind.name)
                lines = traceback.format_exception(type(error), error, error.__traceback__)
                # the last of them hold the whole file, which the seed gives too
                print(f"{kind.name}, seed {seed}: {''.join(line[:400] for line in lines[-8:])}", flush=True)
            if time.monotonic() > end:
                break
    for name, outcomes in totals.items():
        counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        print(f"{name:<20} {outcomes.total()} files: {counts}{'; failed' if name in failed else ''}")
    print(f"{sum(outcomes.total() for outcomes in totals.values())} files in {minutes:g} minutes")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
