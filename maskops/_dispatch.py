"""Which backend computes an op, and why not the others."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor

BACKENDS = ("cuda", "triton", "reference")
"""The order of preference. The first backend that has no reason against serving a call serves it."""

OPS: list[str] = []
"""The names of all ops, in the order in which ``maskops._ops`` defines them."""


@cache
def _load(backend: str) -> ModuleType | str:
    """The backend's module, or one sentence that says why it is not there."""
    name = f"maskops.backends.{backend}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return f"this installation has no {backend} backend"
        return f"the {backend} backend needs {error.name}, which is not installed"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"the {backend} backend failed to load: {(str(error) or type(error).__name__).splitlines()[0]}"


@cache
def _find(backend: str, op: str) -> Callable[..., Any] | str:
    """The backend's function for ``op``, or one sentence that says why there is none."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    module = _load(backend)
    if isinstance(module, str):
        return module
    return getattr(module, op, f"the {backend} backend has no {op}")


def why_not(backend: str, op: str, *tensors: Tensor) -> str | None:
    """One short sentence that says why ``backend`` can't compute ``op`` on these tensors; None when it can.

    backend: ``"cuda"``, ``"triton"`` or ``"reference"``
    op:      name of an op, such as ``"masked_conv"``
    errors:  ValueError for a backend that doesn't exist

    >>> import maskops, torch
    >>> maskops.why_not("reference", "masked_conv", torch.zeros(1)) is None
    True
    """
    function = _find(backend, op)
    return function if isinstance(function, str) else _load(backend).why_not(op, *tensors)


def _why_not_first(backend: str, op: str, *tensors: Tensor) -> str | None:
    """Why ``backend``, which can compute ``op`` on these tensors, leaves it to the next one unless it is asked for."""
    unless_asked = getattr(_load(backend), "unless_asked", None)
    return None if unless_asked is None else unless_asked(op, *tensors)


def choose(op: str, arguments: tuple[Any, ...], backend: str | None) -> Callable[..., Any]:
    """The function that computes ``op`` on these arguments: of the forced backend, else of the first that can serve.

    A backend is forced by ``backend`` or by the environment variable ``MASKOPS_BACKEND``; if a forced backend can't
    serve the call, the reason is raised and nothing else is tried.
    """
    forced = backend or os.environ.get("MASKOPS_BACKEND") or None
    tensors = _tensors(arguments)
    for candidate in (forced,) if forced else BACKENDS:
        reason = why_not(candidate, op, *tensors)
        if reason is None and not (forced is None and _why_not_first(candidate, op, *tensors)):
            return _find(candidate, op)
    # the reference serves everything, so only a forced choice comes here
    raise RuntimeError(f"{op}: backend {forced!r} was asked for, but {reason}")


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments, and in lists of them."""
    found = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += [entry for entry in argument if isinstance(entry, Tensor)]
    return found


def explain(op: str | None = None, *arguments: Any) -> str:
    """A table of the backends: which one serves ``op`` on these tensors and how, and why the others don't.

    op:        name of an op; None for a table of all ops
    arguments: tensors; with all arguments of the op also which way of several a backend would take, and why
    errors:    ValueError for an op that doesn't exist

    >>> import maskops, torch
    >>> print(maskops.explain("masked_linear", torch.zeros(2, 3)))  # doctest: +ELLIPSIS
    masked_linear
      cuda       ...
      triton     ...
      reference  serves
    """
    if op is None:
        return "\n".join(explain(name, *arguments) for name in OPS)
    if op not in OPS:
        raise ValueError(f"explain: expected one of {', '.join(OPS)}; got {op!r}")
    rows = [op]
    tensors = _tensors(arguments)
    forced = os.environ.get("MASKOPS_BACKEND")
    served = False
    for backend in (forced,) if forced else BACKENDS:
        reason = why_not(backend, op, *tensors)
        if reason is None:
            later = None if forced else _why_not_first(backend, op, *tensors)
            reason = f"serves when asked for: {later}" if later else "could serve" if served else "serves"
            describe = getattr(_load(backend), "describe", None)
            way = None if describe is None else describe(op, *arguments)
            reason += f"; {way}" if way else ""
            served = served or later is None
        rows.append(f"  {backend:<9}  {reason}" + (" (forced by MASKOPS_BACKEND)" if forced else ""))
    return "\n".join(rows)
