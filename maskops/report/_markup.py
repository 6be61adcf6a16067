"""HTML and SVG in which no text becomes markup: what isn't made here is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

_VOID = ("img", "meta", "br")


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """Any value as text: without meaning for a browser, nor characters that none shows or that turn others around.

    >>> text("<b>\\x00\\u202e & 'so'")
    '&lt;b&gt;?? &amp; &#x27;so&#x27;'
    """
    if isinstance(value, Markup):
        return value
    shown = (one if one.isprintable() else " " if one.isspace() else "?" for one in str(value))
    return Markup(escape("".join(shown)))


def join(*children: Any) -> Markup:
    """Children one after the other; None is left out, lists are joined."""
    parts = (
        join(*child) if isinstance(child, (list, tuple)) else text(child) for child in children if child is not None
    )
    return Markup("".join(parts))


def element(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element with children and attributes; those that are None are left out, and ``class_`` is ``class``.

    >>> element("p", "1 < 2", element("b", "!"), class_="lead")
    '<p class="lead">1 &lt; 2<b>!</b></p>'
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = "".join(f' {key}="{text(value)}"' for key, value in given.items())
    return Markup(f"<{name}{opening}>" if name in _VOID else f"<{name}{opening}>{join(*children)}</{name}>")
