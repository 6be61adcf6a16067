"""Model files, mask files and checkpoints that mean harm: one line, nothing run, nothing large allocated or changed."""

import itertools
import json
import pickle
import tarfile
import time
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers_hostile import (
    call,
    dict_of,
    legacy,
    little_memory,
    named,
    number,
    pickled,
    safetensors_file,
    storage,
    tensor,
    text,
    tree,
    tuple_of,
    zipped,
)

from maskops.checkpoint import CheckpointError, load_masks, load_run, load_state_dict, save_state_dict

BITS = np.arange(4, dtype=np.float32).tobytes()
PLAIN = tensor(storage(4), (2, 2), (2, 1))
OLD = tensor(storage(4, legacy=True), (2, 2), (2, 1))


def line_of(path, read=load_state_dict):
    """The one printable line of the refusal, which may take neither time nor memory."""
    start = time.monotonic()
    before = path.read_bytes()
    with little_memory(), pytest.raises(CheckpointError) as caught:
        read(path)
    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert message.isprintable() and message.startswith(f"{read.__name__}: ") and len(message) < 1500
    assert path.read_bytes() == before
    return message


def refused(tmp_path, content, name="model.pth"):
    path = tmp_path / name
    path.write_bytes(content)
    return line_of(path)


def test_files_written_by_hand_are_read(tmp_path):
    path = tmp_path / "model.pth"
    data = {"data/0": BITS}
    old = legacy(dict_of(w=OLD), ("0",), (4).to_bytes(8, "little") + BITS)
    for content in (zipped(dict_of(w=PLAIN), data), old):
        path.write_bytes(content)
        assert load_state_dict(path)["w"].tolist() == [[0, 1], [2, 3]]


def nested_tuples(depth, width=1):
    """A tuple of tuples …, of which each holds the one before so many times."""
    again = (pickle.BINGET + b"\x00") * (width - 1)
    level = again + {1: pickle.TUPLE1, 2: pickle.TUPLE2}[width] + pickle.BINPUT + b"\x00"
    return pickle.EMPTY_TUPLE + pickle.BINPUT + b"\x00" + level * depth


def nested(kind, depth):
    empty, add = {"lists": (pickle.EMPTY_LIST, pickle.APPEND), "dicts": (pickle.EMPTY_DICT, pickle.SETITEM)}[kind]
    key = text("net") if kind == "dicts" else b""
    return (empty + key) * depth + empty + add * depth


def laughs(levels=60):
    """A list that holds ten times one that holds ten times one …: together they hold 10^60."""
    again = (pickle.BINGET + b"\x00") * 10
    level = pickle.EMPTY_LIST + pickle.MARK + again + pickle.APPENDS + pickle.BINPUT + b"\x00"
    return pickle.EMPTY_LIST + pickle.BINPUT + b"\x00" + level * levels


BOMBS = {
    "a tuple of tuples as a key": pickle.EMPTY_DICT + nested_tuples(60, 2) + pickle.NONE + pickle.SETITEM,
    "a deep tuple as a key": pickle.EMPTY_DICT + nested_tuples(200_000) + pickle.NONE + pickle.SETITEM,
    "a deep tuple in a set": call(named("builtins", "set"), pickle.EMPTY_LIST + nested_tuples(200_000) + pickle.APPEND),
    "deep lists": nested("lists", 300_000),
    "deep dicts": nested("dicts", 100_000),
    "a billion laughs": laughs(),
    "keys of one hash": pickle.EMPTY_DICT
    + b"".join(number((2**61 - 1) * place) + pickle.NONE + pickle.SETITEM for place in range(1, 20_000)),
    "a text of 4 GB": pickle.BINUNICODE + b"\xff\xff\xff\xff" + b"short",
    "bytes of 10 TB": call(named("builtins", "bytearray"), number(10**13)),
    "a tensor by its class": call(named("torch", "Tensor"), number(10**6), number(10**9)),
    "a storage by its class": call(named("torch", "FloatStorage"), number(10**13)),
    "getattr": call(call(named("builtins", "getattr"), named("os", "system"), text("__call__")), text("true")),
    "a call of what was made": call(call(named("collections", "OrderedDict")), text("x")),
    "bz2": call(named("_codecs", "encode"), text("x" * 99), text("idna")),
    "an empty stack": pickle.TUPLE3,
    "a mark that isn't there": pickle.APPENDS,
    "a memo that isn't there": pickle.BINGET + b"\x07",
    "a module's name in Latin-1": named("\xe9\xe9", "x").decode().encode("latin1"),
    "a class's name with codes": named("evil\x1b[2J", "na\rme"),
}


@pytest.mark.parametrize("wrap", [zipped, legacy, pickled], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_bomb_is_one_line(tmp_path, bomb, wrap, suffix):
    refused(tmp_path, wrap(BOMBS[bomb]), f"model{suffix}")


TENSORS = {
    "10^15 numbers": ((10**15,), (1,), 10**15),
    "10^15 numbers of 4": ((10**15,), (1,), 4),
    "10^15 numbers that are one": ((10**15,), (0,), 4),
    "a storage larger than its record": ((5,), (1,), 5),
    "overlapping strides": ((3, 3), (1, 0), 4),
    "negative strides": ((2, 2), (-2, 1), 4),
    "a negative size": ((-2, -2), (2, 1), 4),
    "sizes that overflow": ((2**40, 2**40), (0, 0), 4),
    "a storage of a negative size": ((2,), (1,), -4),
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_not_all_there_is_one_line(tmp_path, name, old):
    size, stride, count = TENSORS[name]
    content = dict_of(w=tensor(storage(count, legacy=old), size, stride))
    file = legacy(content, ("0",), (4).to_bytes(8, "little") + BITS) if old else zipped(content, {"data/0": BITS})
    refused(tmp_path, file)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("size", "stride"), [((2**29,), (1,)), ((2, 2), (2**31, 1)), ((2**16, 2**16), (2**14, 1))], ids=str
)
def test_a_tensor_beyond_its_storage_does_not_make_it_larger(tmp_path, size, stride, old):
    content = dict_of(w=tensor(storage(4, legacy=old), size, stride))
    file = legacy(content, ("0",), (4).to_bytes(8, "little") + BITS) if old else zipped(content, {"data/0": BITS})
    assert "of a storage of 4" in refused(tmp_path, file)


def test_sizes_that_are_hidden_in_an_object_are_one_line(tmp_path):
    sizes = call(named("torch", "Size"), tuple_of(number(2**29)))
    hooks = call(named("collections", "OrderedDict"))
    arguments = storage(4, legacy=True), number(0), sizes, tuple_of(number(1)), pickle.NEWFALSE, hooks
    content = dict_of(w=call(named("torch._utils", "_rebuild_tensor_v2"), *arguments))
    file = legacy(content, ("0",), (4).to_bytes(8, "little") + BITS)
    assert "sizes and strides, which are numbers" in refused(tmp_path, file)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_tensors_of_all_kinds_of_numbers_and_layouts_are_read(tmp_path, old):
    kinds = [torch.bool, torch.bfloat16, torch.complex64, torch.int64, torch.float64]
    kinds += [] if old else [torch.uint16]  # which torch writes, but doesn't read, in the old format
    state = {str(dtype): torch.arange(6).to(dtype).view(2, 3) for dtype in kinds}
    whole = torch.arange(24.0).view(2, 3, 2, 2)
    state |= {"view": whole[1:, 1], "turned": whole.permute(3, 0, 2, 1), "empty": torch.empty(0, 3), "one": whole.sum()}
    torch.save(state, tmp_path / "model.pth", _use_new_zipfile_serialization=not old)
    read = load_state_dict(tmp_path / "model.pth")
    assert all(torch.equal(read[name], value) for name, value in state.items())


def test_an_offset_before_the_storage_is_one_line(tmp_path):
    refused(tmp_path, zipped(dict_of(w=tensor(storage(4), (2,), (1,), offset=-1)), {"data/0": BITS}))
    refused(tmp_path, zipped(dict_of(w=tensor(storage(4), (2,), (1,), offset=3)), {"data/0": BITS}))


def test_one_record_read_under_many_keys_is_one_line(tmp_path):
    keys = ["".join(letters) for letters in itertools.product("aA", repeat=8)]  # torch takes them for one
    big = b"\0" * (1 << 20)
    content = b"".join(text(key) + tensor(storage(1 << 18, key), (1,), (1,)) + pickle.SETITEM for key in keys)
    assert "claim more than" in refused(tmp_path, zipped(pickle.EMPTY_DICT + content, {"data/aaaaaaaa": big}))


@pytest.mark.parametrize("name", ["../../outside", "/tmp/maskops-outside", "data/../../outside", "data/0/../1"])
def test_names_of_records_lead_nowhere(tmp_path, name):
    (tmp_path / "in" / "side").mkdir(parents=True)
    path = tmp_path / "in" / "side" / "model.pth"
    path.write_bytes(zipped(dict_of(w=PLAIN), {"data/0": BITS, name: b"written"}))
    try:
        load_state_dict(path)  # records that nothing names aren't looked at
    except CheckpointError as error:
        assert "\n" not in str(error)
    assert list(tree(tmp_path)) == ["in/side/model.pth"]


def test_a_record_that_is_a_link_is_bytes(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(zipped(dict_of(w=PLAIN)))
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("archive/data/0")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, b"/dev/zero\0\0\0\0\0\0\0")
    assert load_state_dict(path)["w"].shape == (2, 2)


def test_two_records_of_one_name_are_one_line(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(zipped(dict_of(w=PLAIN), {"data/0": BITS}))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", BITS)
    assert "two records of one name" in line_of(path)


@pytest.mark.parametrize("inside", ["data.pkl", "data/0"])
def test_an_archive_that_unpacks_to_more_than_it_is_is_one_line(tmp_path, inside):
    zeros = b"\0" * (200 << 20)
    if inside == "data.pkl":
        content = zipped(text("x") + zeros, method=zipfile.ZIP_DEFLATED)
    else:
        content = zipped(dict_of(w=PLAIN), {"data/0": zeros}, zipfile.ZIP_DEFLATED)
    assert len(content) < 1 << 20
    assert "claims to hold more than" in refused(tmp_path, content)


def test_a_directory_that_is_not_at_the_end_is_one_line(tmp_path):
    refused(tmp_path, zipped(dict_of(w=PLAIN), {"data/0": BITS}) + b"trailing")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_cut_anywhere_is_one_line(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    save_state_dict(path, {"weight": torch.rand(3, 2), "bias": torch.rand(3)})
    content = path.read_bytes()
    for length in range(1, len(content), 23):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as caught:
            load_state_dict(path)
        assert str(caught.value).isprintable()


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_tensor_is_one_line(tmp_path, old):
    kinds = {
        "sparse": torch.eye(2).to_sparse(),
        "csr": torch.eye(2).to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(torch.rand(2), 0.1, 0, torch.qint8),
        "meta": torch.empty(2, device="meta"),
        "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        "subclass": torch.rand(2).as_subclass(Own),
        "expanded": torch.rand(1).expand(9),
    }
    for kind, value in kinds.items():
        path = tmp_path / f"{kind}.pth"
        torch.save({"net": {"weight": value}}, path, _use_new_zipfile_serialization=not old)
        assert str(path) in line_of(path)


def test_attributes_of_a_file_shadow_nothing(tmp_path):
    names = dict.fromkeys(("items", "values", "get", "pop", "keys", "detach", "numel", "untyped_storage"), number(5))
    hooks = call(named("collections", "OrderedDict"))
    weight = call(
        named("torch._utils", "_rebuild_parameter_with_state"), PLAIN, pickle.NEWFALSE, hooks, dict_of(**names)
    )
    entries = call(named("collections", "OrderedDict")) + text("weight") + weight + pickle.SETITEM
    content = entries + dict_of(**names) + pickle.BUILD
    path = tmp_path / "model.pth"
    for nested in (content, dict_of(net=content)):
        path.write_bytes(zipped(nested, {"data/0": BITS}))
        found = load_state_dict(path)["weight"]
        assert found.tolist() == [[0, 1], [2, 3]] and type(found) is torch.Tensor and not vars(found)


NAMES = ["conv\nweight", "conv\x1b[2J.weight", "conv\rweight", "w\x00", "w\u202ev", "w" * 5000, "\x9b31m"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_names_that_a_terminal_would_obey_are_one_line(tmp_path, name, suffix):
    path = tmp_path / f"model{suffix}"
    save_state_dict(path, {name: torch.ones(1)})
    assert "has a name that can't be shown" in line_of(path)


def test_names_of_pythons_own_are_names(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"__class__": torch.ones(1), "__dict__": torch.ones(1)}, path)
    assert sorted(load_state_dict(path)) == ["__class__", "__dict__"]


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HEADERS = {
    "10^15 numbers": {"w": {**ENTRY, "shape": [10**15], "data_offsets": [0, 4 * 10**15]}},
    "overlapping": {"v": ENTRY, "w": {**ENTRY, "data_offsets": [8, 24]}},
    "the same twice": {"v": ENTRY, "w": ENTRY},
    "a hole": {"v": ENTRY, "w": {**ENTRY, "data_offsets": [20, 36]}},
    "a negative size": {"w": {**ENTRY, "shape": [-4]}},
    "a negative offset": {"w": {**ENTRY, "data_offsets": [-16, 0]}},
    "no dtype": {"w": {"shape": [4], "data_offsets": [0, 16]}},
    "a dtype of another kind": {"w": {**ENTRY, "dtype": 7}},
    "metadata of numbers": {"__metadata__": {"a": 1}, "w": ENTRY},
    "metadata that is a list": {"__metadata__": [], "w": ENTRY},
    "a fraction": {"w": {**ENTRY, "shape": [4.5]}},
}


@pytest.mark.parametrize("read", [load_state_dict, load_masks, load_run], ids=lambda read: read.__name__)
@pytest.mark.parametrize("name", HEADERS)
def test_a_lying_header_is_one_line(tmp_path, name, read):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_file(json.dumps(HEADERS[name]).encode(), BITS * 3))
    line_of(path, read)


def test_a_name_that_comes_twice_in_a_header_is_one_line(tmp_path):
    other = json.dumps({**ENTRY, "data_offsets": [16, 32]})
    header = f'{{"w": {json.dumps(ENTRY)}, "w": {other}}}'
    assert "no valid safetensors file" in refused(
        tmp_path, safetensors_file(header.encode(), BITS * 2), "model.safetensors"
    )


@pytest.mark.parametrize("read", [load_state_dict, load_masks, load_run], ids=lambda read: read.__name__)
@pytest.mark.parametrize(
    "content",
    [
        safetensors_file(b"{", BITS),
        safetensors_file(b"\xff\xfe", BITS),
        safetensors_file(b"[" * 100_000, BITS),
        safetensors_file(b'{"w":' * 100_000, BITS),
        safetensors_file(json.dumps({"w": ENTRY}).encode(), BITS, 2**63),
        safetensors_file(json.dumps({"w": ENTRY}).encode(), BITS, 0),
        safetensors_file(json.dumps({"w": ENTRY}).encode(), BITS[:8]),
        b"\0" * 7,
    ],
    ids=["cut", "no text", "deep list", "deep dict", "long", "no header", "short", "seven bytes"],
)
def test_a_broken_header_is_one_line(tmp_path, content, read):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    line_of(path, read)


NOTES = ['{"a": 1' + "0" * 9999 + "}", "NaN", "\x1b[2J", "null", '{"a":' * 9999]


@pytest.mark.parametrize(("read", "entry"), [(load_masks, "maskops"), (load_run, "maskops_run")])
@pytest.mark.parametrize(
    "noted", ['{"a": 1' + "0" * 9999 + "}", "NaN", "\x1b[2J", "null", '{"a":' * 9999], ids=range(5)
)
def test_notes_that_are_none_are_one_line(tmp_path, read, entry, noted):
    path = tmp_path / "file.safetensors"
    for metadata in ({entry: noted, f"{entry}_format": "1"}, {entry: "{}", f"{entry}_format": "\x1b[2J\n"}):
        safetensors.torch.save_file({"mask": torch.ones(1)}, path, metadata)
        line_of(path, read)


@pytest.mark.parametrize("read", [load_state_dict, load_masks, load_run], ids=lambda read: read.__name__)
def test_paths_that_are_no_files_are_one_line(tmp_path, read):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", tmp_path / ("n" * 5000), tmp_path / "nul\0", "/dev/zero", "/dev/stdin"):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert len(str(caught.value).splitlines()) == 1


def test_other_kinds_of_files_are_one_line(tmp_path):
    archive = tmp_path / "model.pth"
    with tarfile.open(archive, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            tar.addfile(tarfile.TarInfo(f"../../{name}"))
    line_of(archive)
    for content in (b"\x80", b"\x80\x02", b"\x80\x02.", b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18, b"\x93NUMPY\x01\0"):
        refused(tmp_path, content)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]
