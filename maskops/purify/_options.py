"""Options by name: a preset, single changes to it, and one clear line for what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

from maskops.purify._loop import Setting

Options = TypeVar("Options")
Auto = Literal["auto"]


def settle(
    method: str, presets: Mapping[str, Options], preset: str, changes: Mapping[str, Any]
) -> tuple[Options, Setting]:
    """A method's options, from the preset and the changes that are its fields, and the setting, from all others."""
    if preset not in presets:
        raise ValueError(f"{method}: preset must be one of {', '.join(presets)}; got {preset!r}")
    options = presets[preset]
    own, common = ({field.name for field in fields(of)} for of in (options, Setting))
    unknown = sorted(changes.keys() - own - common)
    if unknown:
        raise TypeError(f"{method}: no option {', '.join(unknown)}; there are {', '.join(sorted(own | common))}")
    setting = Setting(**{name: value for name, value in changes.items() if name in common})
    return replace(options, **{name: value for name, value in changes.items() if name in own}), setting


def check(method: str, options: Any, name: str, expected: str, holds: Callable[[Any], bool]) -> None:
    """Raise unless the field is finite and as expected, or "auto" where it may be."""
    value = getattr(options, name)
    (may_be,) = (field.type for field in fields(options) if field.name == name)
    if value == "auto" and "Auto" in may_be:
        return
    try:
        valid = (not isinstance(value, float) or math.isfinite(value)) and holds(value)
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"{method}: {name} must be {expected}; got {value!r}")
