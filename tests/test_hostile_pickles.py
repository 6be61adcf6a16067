"""Model files that say little and ask for much: what is in them is copied, hashed and multiplied only so often."""

import pickle
import struct
import zipfile

import pytest
import torch
from helpers_hostile import call, dict_of, legacy, named, number, storage, text, tuple_of, zipped
from test_hostile_files import BITS, PLAIN, refused

from maskops.checkpoint import load_state_dict


def again(value, call_of, count):
    """A list of what so many calls make of one value."""
    one = pickle.BINGET + b"\x00"
    return value + pickle.BINPUT + b"\x00" + pickle.EMPTY_LIST + (call_of(one) + pickle.APPEND) * count


def numbers(count):
    return pickle.EMPTY_LIST + pickle.MARK + (pickle.BININT1 + b"\x07") * count + pickle.APPENDS


def entries(count):
    content = b"".join(number(place) + pickle.NONE for place in range(count))
    return pickle.EMPTY_DICT + pickle.MARK + content + pickle.SETITEMS


SIZES = pickle.MARK + number(1 << 2000) * 5000 + pickle.TUPLE
COPIES = {
    "a text": again(text("x" * 100_000), lambda it: call(named("_codecs", "encode"), it, text("latin1")), 3000),
    "a list": again(numbers(100_000), lambda it: call(named("collections", "Counter"), it), 3000),
    "a dict": again(entries(20_000), lambda it: call(named("collections", "OrderedDict"), it), 3000),
    "a state": again(entries(20_000), lambda it: call(named("collections", "OrderedDict")) + it + pickle.BUILD, 3000),
    "sizes": again(SIZES, lambda it: call(named("torch", "Size"), it), 3000),
}


@pytest.mark.parametrize("wrap", [zipped, legacy], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("name", COPIES)
def test_what_is_in_a_file_once_is_not_copied_at_will(tmp_path, name, wrap):
    assert "more copies of its content" in refused(tmp_path, wrap(COPIES[name]))


def tuples_of_one_hash(count):
    """Pairs of numbers, from how Python makes a tuple's hash of theirs."""
    first, second, third, whole = 11400714785074694791, 14029467366897019727, 2870177450012600261, 2**64 - 1

    def step(state, lane):
        state = (state + lane * second) & whole
        return ((state << 31 | state >> 33) & whole) * first & whole

    inverse, found = pow(second, -1, 2**64), []
    for lane in range(10 * count):
        other = (-step(third, lane)) * inverse & whole
        if other < 2**61 - 2:
            found.append((lane, other))
    return found[:count]


def test_tuples_of_one_hash_as_keys_are_one_line(tmp_path):
    pairs = tuples_of_one_hash(2000)
    assert len(set(map(hash, pairs))) == 1
    content = b"".join(number(a) + number(b) + pickle.TUPLE2 + pickle.NONE + pickle.SETITEM for a, b in pairs)
    assert "keys are tuples" in refused(tmp_path, zipped(pickle.EMPTY_DICT + content))
    sizes = b"".join(
        call(named("torch", "Size"), tuple_of(number(a), number(b))) + pickle.NONE + pickle.SETITEM for a, b in pairs
    )
    assert "a key must be" in refused(tmp_path, zipped(pickle.EMPTY_DICT + sizes))


def test_sizes_whose_product_takes_hours_are_one_line(tmp_path):
    large = number(1 << 2000) + pickle.BINPUT + b"\x00"
    sizes = pickle.MARK + large + (pickle.BINGET + b"\x00") * 100_000 + pickle.TUPLE
    made = call(named("torch._utils", "_rebuild_tensor_v2"), storage(4), number(0), sizes, sizes)
    assert "too large" in refused(tmp_path, zipped(made, {"data/0": BITS}))


def other_directory(offset_of_64):
    """An archive whose directory Python finds elsewhere than torch does, which finds a record that isn't checked."""
    harmless = zipped(dict_of(w=PLAIN), {"data/0": BITS})
    end = harmless.rindex(b"PK\x05\x06")
    count, length, offset = struct.unpack("<H2L", harmless[end + 10 : end + 20])
    directory = harmless[offset : offset + length]
    if not offset_of_64:  # torch reads the first directory; Python takes what comes before for something put in front
        return harmless[:end] + directory + harmless[end:]
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    return harmless[:end] + record + directory + record + locator + harmless[end:]


@pytest.mark.parametrize("offset_of_64", [False, True])
def test_two_directories_are_one_line(tmp_path, offset_of_64):
    assert "directory isn't at its end" in refused(tmp_path, other_directory(offset_of_64))


def test_a_file_that_is_refused_is_not_given_to_another_reader(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(torch.serialization, "get_unsafe_globals_in_checkpoint", called.append)
    zeros = zipped(text("x") + b"\0" * (1 << 20), method=zipfile.ZIP_DEFLATED)
    assert "claims to hold more than" in refused(tmp_path, zeros) and not called


def test_tuples_and_copies_in_small_number_are_read(tmp_path):
    torch.save({"net": {"w": torch.ones(2)}, "at": {(0, 1): 2.0}, "seen": b"bytes"}, tmp_path / "model.pth")
    assert load_state_dict(tmp_path / "model.pth")["w"].tolist() == [1, 1]
