from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from maskops.backdoor.triggers._base import Trigger
from maskops.backdoor.triggers.colours import BPPA, StyleStandIn
from maskops.backdoor.triggers.patches import BadNetsCheckerboard, BadNetsSquare, FourCorners, L0Inv
from maskops.backdoor.triggers.patterns import SIG, Additive, Blend, BlendNoise, SIGWrapped, pattern_from_file
from maskops.backdoor.triggers.several import Several
from maskops.backdoor.triggers.warps import WaNet

TRIGGERS: dict[str, type[Trigger]] = {
    "badnets_square": BadNetsSquare,
    "badnets_checkerboard": BadNetsCheckerboard,
    "four_corners": FourCorners,
    "blend": Blend,
    "blend_noise": BlendNoise,
    "additive": Additive,
    "sig": SIG,
    "sig_wrapped": SIGWrapped,
    "wanet": WaNet,
    "bppa": BPPA,
    "style_stand_in": StyleStandIn,
    "l0_inv": L0Inv,
}


def _bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"true or false expected, got {text!r}")
    return text == "true"


_READERS: dict[Any, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": _bool,
    "Tensor": pattern_from_file,
}


def parse(spec: str) -> Trigger:
    """Make a trigger from ``name`` or ``name:option=value,...``; the first option's name may be left out.

    A pattern is given by the path of a PNG (without a comma): ``blend:noise.png,alpha=0.1``. Seeded triggers take
    ``seed=3``, switches ``true`` or ``false``. `` + `` between triggers makes a ``Several``.

    ValueError: unknown name or option, a value that cannot be read or is out of range

    >>> parse("badnets_square:size=2,margin=0")
    BadNetsSquare(size=2, margin=0, value=1.0)
    >>> parse("wanet:seed=3 + sig_wrapped")
    Several(triggers=(WaNet(seed=3, k=4, s=0.5), SIGWrapped(alpha=0.2)))
    >>> parse("badnets")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: parse: unknown trigger 'badnets'; known: badnets_square, badnets_checkerboard, ...
    """
    parts = spec.split(" + ")
    return _parse_one(spec) if len(parts) == 1 else Several(tuple(_parse_one(part.strip()) for part in parts))


def _parse_one(spec: str) -> Trigger:
    name, _, options = spec.partition(":")
    if name not in TRIGGERS:
        raise ValueError(f"parse: unknown trigger {name!r}; known: {', '.join(TRIGGERS)}")
    known = {option.name: option for option in fields(TRIGGERS[name])}
    texts = _split_options(spec, options, tuple(known))
    for key, option in known.items():
        if option.default is MISSING and key not in texts:
            raise ValueError(f"parse: {name} needs a {key}, as in '{name}:{key}.png'; got {spec!r}")
    try:
        return TRIGGERS[name](**{key: _READERS[known[key].type](text) for key, text in texts.items()})
    except ValueError as error:
        raise ValueError(f"parse: {spec!r}: {error}") from None


def _split_options(spec: str, options: str, known: tuple[str, ...]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for option in options.split(",") if options else ():
        key, equals, text = option.partition("=")
        if not equals and known and not texts:
            key, text = known[0], option
        if key not in known or key in texts:
            raise ValueError(
                f"parse: wrong option {option!r} in {spec!r}; options, each once: {', '.join(known) or 'none'}"
            )
        texts[key] = text
    return texts
