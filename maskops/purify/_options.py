"""Options by name: a preset, single changes to it, and one clear line for what is wrong with them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple

Auto = Literal["auto"]


class Preset(NamedTuple):
    """Where the values of a method's options, and of its setting, begin."""

    options: Any
    setting: Any


def settle(method: str, presets: Mapping[str, Preset], preset: str, changes: Mapping[str, Any]) -> tuple[Any, Any]:
    """A method's options and setting: those of the preset, with the changes."""
    if preset not in tuple(presets):
        raise ValueError(f"{method}: preset must be one of {', '.join(presets)}; got {preset!r}")
    own, common = ({field.name for field in fields(of)} for of in presets[preset])
    unknown = sorted(changes.keys() - own - common)
    if unknown:
        raise TypeError(f"{method}: no option {', '.join(unknown)}; there are {', '.join(sorted(own | common))}")
    options, setting = (
        replace(of, **{name: value for name, value in changes.items() if name in names})
        for of, names in zip(presets[preset], (own, common), strict=True)
    )
    return options, setting


def number(
    method: str, options: Any, name: str, kind: type, least: float, most: float = math.inf, auto: bool = False
) -> None:
    """Make the field an int or a float; raise unless it is a number in [least, most], or "auto" where allowed."""
    value = getattr(options, name)
    if auto and isinstance(value, str) and value == "auto":
        return
    of_kind = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if not (of_kind and math.isfinite(value) and least <= value <= most):
        expected = "a whole number" if kind is int else "a number"
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        other = " or 'auto'" if auto else ""
        raise ValueError(f"{method}: {name} must be {expected} {bounds}{other}; got {value!r}")
    object.__setattr__(options, name, kind(value))


def choice(method: str, options: Any, name: str, choices: Collection[Any]) -> None:
    """Raise unless the field is one of the choices."""
    value = getattr(options, name)
    if not any(type(value) is type(each) and value == each for each in choices):
        raise ValueError(f"{method}: {name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def optional(method: str, options: Any, name: str, kind: type, least: float, most: float = math.inf) -> None:
    """As :func:`number`, for a field that may be None."""
    if getattr(options, name) is not None:
        number(method, options, name, kind, least, most)
