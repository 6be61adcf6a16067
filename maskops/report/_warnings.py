"""Warnings of a run, for its report."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def heard_warnings() -> Iterator[list[str]]:
    """The RuntimeWarnings that are raised within, which are shown as ever.

    >>> with warnings.catch_warnings(record=True), heard_warnings() as heard:
    ...     warnings.warn("memory ran out", RuntimeWarning)
    >>> heard
    ['memory ran out']
    """
    heard: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def hear(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, RuntimeWarning):
                heard.append(str(message))
            show(message, category, *place, **more)

        warnings.showwarning = hear
        yield heard
