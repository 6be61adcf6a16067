"""Pickles of CIFAR that mean harm: one line, nothing run and nothing large allocated."""

import pickle
import struct

import pytest
from helpers_hostile import call, line_of, named, number, text

from maskops.cifar import _from_buffer

BIG_MEMO = b"\x80\x02]r\xff\xff\xff\x7f."
CIFAR = {
    "a place in the memo of 2^31": BIG_MEMO,
    "a tuple of tuples as a key": b"\x80\x02}" + b")q\x00" + b"h\x00\x86q\x00" * 60 + b"Ns.",
    "a deep tuple as a key": b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns.",
    "a deep tuple in a set": b"\x80\x04\x8f()" + b"\x85" * 200_000 + b"\x90.",
    "a deep tuple in a dict": b"\x80\x02()" + b"\x85" * 200_000 + b"Nd.",
    "bytes of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "text of 2^32": b"\x80\x02X\xff\xff\xff\xffx.",
    "a shape of 2^60": pickle.dumps({b"data": 1}, 2)[:-1] + b".",
    "a persistent object": b"\x80\x02NQ.",
    "an extension": b"\x80\x02\x82\x01.",
    "nothing": b"",
    "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "a state of a function": b"\x80\x02cnumpy.core.numeric\n_frombuffer\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
    "a module with codes": b"\x80\x02cevil\x1b[2J\nna\rme\n.",
}


@pytest.mark.parametrize("name", CIFAR)
def test_a_pickle_of_cifar_that_is_none_is_one_line(tmp_path, name):
    (tmp_path / "test_batch").write_bytes(CIFAR[name])
    line_of(f"{tmp_path}:test")
    assert _from_buffer.__defaults__ is None


def array_of(data):
    """A pickle of an array of 3072 bytes over what these instructions make."""
    dtype = b"cnumpy\ndtype\n" + text("u1") + pickle.TUPLE1 + pickle.REDUCE
    shape = number(1) + number(3072) + pickle.TUPLE2
    made = call(b"cnumpy.core.numeric\n_frombuffer\n", data, dtype, shape, text("C"))
    return b"\x80\x02}U\x04data" + made + b"s."


ENCODED = call(named("_codecs", "encode"), b"h\x00", text("latin1"))
CIFAR_BOMBS = {
    "text that is encoded again and again": (
        b"\x80\x02" + text("x" * 500_000) + b"q\x00](" + ENCODED * 2000 + b"e.",
        "more bytes of its text than it has",
    ),
    "an array of bytes that aren't there": (b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b"x.", "EOFError"),
    "an array over a number": (array_of(number(2**33)), "whose content is no bytes"),
}


@pytest.mark.parametrize("name", CIFAR_BOMBS)
def test_a_small_pickle_of_cifar_that_asks_for_gigabytes_is_one_line(tmp_path, name):
    content, message = CIFAR_BOMBS[name]
    (tmp_path / "test_batch").write_bytes(content)
    assert message in line_of(f"{tmp_path}:test")
