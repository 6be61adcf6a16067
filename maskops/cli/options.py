"""The fields of options dataclasses as command-line options, with the help of their docstrings."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

import torch

from maskops.purify.methods import METHODS


def add_options(
    parser: argparse._ArgumentGroup,
    presets: Mapping[str, Any],
    leave_out: Collection[str] = (),
    texts: Mapping[str, str] | None = None,
) -> None:
    """An option for each field of a dataclass; one that isn't given isn't in the namespace.

    presets: name -> instance; the help tells their values
    texts:   name -> help, where it isn't the docstring's
    """
    texts = texts or {}
    first = next(iter(presets.values()))
    documented = field_texts(first)
    for field in fields(first):
        if field.name in leave_out:
            continue
        values = {name: getattr(preset, field.name) for name, preset in presets.items()}
        text = texts.get(field.name) or f"{documented[field.name]} ({_defaults(values)})"
        text = text.replace("%", "%%")
        option = f"--{field.name.replace('_', '-')}"
        action = parser.add_argument(option, default=argparse.SUPPRESS, help=text, **_kind(field))
        action.nullable = "None" in field.type  # for files of options, which can say so


def given(arguments: argparse.Namespace, *dataclasses: Any) -> dict[str, Any]:
    """The fields of the dataclasses that were given on the command line."""
    names = {field.name for dataclass in dataclasses for field in fields(dataclass)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def field_texts(dataclass: Any) -> dict[str, str]:
    """name -> what the docstring's lines ``name, other: text`` say about it, or where they speak of it.

    >>> from maskops.purify import AWMOptions
    >>> field_texts(AWMOptions)["clamp"]
    'clamp x + Δ to [0, 1] in the outer phase'
    """
    names = [field.name for field in fields(dataclass)]
    name = f"(?:{'|'.join(names)})"
    kind = dataclass if isinstance(dataclass, type) else type(dataclass)
    texts = {}
    for documented in kind.__mro__[:-1]:
        paragraphs = re.split(rf"^ +({name}(?:, {name})*): +", documented.__doc__, flags=re.MULTILINE)[1:]
        for listed, text in zip(paragraphs[::2], paragraphs[1::2], strict=True):
            for field in listed.split(", "):
                plain = re.sub(r"``\"([^\"`]*)\"``|``|:\w+:`([^`]*)`", r"\1\2", text)
                texts.setdefault(field, " ".join(plain.split()))
    for name in names:
        if name not in texts:
            texts[name] = f"see {next(other for other, text in texts.items() if name in text)}"
    return texts


def _defaults(values: Mapping[str, Any]) -> str:
    shown = {name: _shown(value) for name, value in values.items()}
    if len(set(shown.values())) == 1:
        return f"default: {next(iter(shown.values()))}"
    return ", ".join(f"{name}: {text}" for name, text in shown.items())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None or value == () else str(value)


def _kind(field: Field) -> dict[str, Any]:
    if field.type in ("bool", "bool | None"):
        return {"action": argparse.BooleanOptionalAction}
    read, shape = _READERS[field.type]
    return {"type": read, "metavar": shape}


def _or_auto(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def read_or_auto(text: str) -> Any:
        return "auto" if text == "auto" else read(text)

    read_or_auto.__name__ = read.__name__  # argparse says "invalid float value"
    return read_or_auto


def method_in(argv: Sequence[str], among: Collection[str] = METHODS, otherwise: Any = None) -> str:
    """The method in a command line, or else the other; AWM's name where that is none, or one that will be refused."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--method", nargs="?")
    method = parser.parse_known_args(list(argv))[0].method or otherwise
    return method if isinstance(method, str) and method in among else "awm"


def arch_options(text: str) -> dict[str, Any]:
    """``key=value,…``; a value is a Python literal, or else text."""
    options = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not (key and equals):
            raise argparse.ArgumentTypeError(f"expected key=value,…; got {part!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[key] = value
    return options


def best_device() -> torch.device:
    """The GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device(text: str) -> torch.device:
    """A device that torch can use here."""
    try:
        chosen = torch.device(text)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(
            f"torch can't use the device {text!r} ({str(error).splitlines()[0]})"
        ) from None
    return chosen


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise argparse.ArgumentTypeError(f"expected a floating dtype such as bfloat16; got {text!r}")
    return dtype


def plain(value: Any) -> Any:
    """An option's value as one that JSON knows."""
    return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, torch.device)) else value


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "N"),
    "float": (float, "X"),
    "int | None": (int, "N"),
    "float | None": (float, "X"),
    "str": (str, "NAME"),
    "int | Auto": (_or_auto(int), "N"),
    "float | Auto": (_or_auto(float), "X"),
    "str | torch.device | None": (device, "DEVICE"),
    "torch.dtype | None": (_dtype, "DTYPE"),
    "Sequence[float] | None": (numbers, "X,X,X"),
    "str | Sequence[str]": (_names, "NAME,NAME"),
}
"""How the text of an option becomes a value, and what the help calls it, by the field's annotation."""
