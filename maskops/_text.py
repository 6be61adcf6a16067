"""What comes from files and goes to people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MOST = 200


def printable(text: str) -> str:
    """The text on one line, without characters that a terminal would obey.

    >>> printable("conv\\n\\x1b[2Jweight")
    'conv ?[2Jweight'
    """
    text = " ".join(text.split())
    return "".join(character if character.isprintable() else "?" for character in text)


def one_line(reason: Exception | str) -> str:
    """A reason in one printable line of bounded length: it may quote a hostile file."""
    text = printable(str(reason).partition("Check the documentation")[0])
    if isinstance(reason, Exception):
        text = f"{type(reason).__name__}: {text}" if text else type(reason).__name__
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever a reader raises on a missing, truncated or foreign file, as one line that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"load_images: cannot read {printable(str(path))} ({one_line(error)})") from error
