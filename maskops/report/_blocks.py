"""The blocks that a page is built of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maskops.report._markup import Markup, element


def section(title: str, *children: Any) -> Markup:
    return element("section", element("h2", title), *children)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str, marked: Sequence[bool] = ()) -> Markup:
    """A table whose first column names the rows; cells of :class:`str` that aren't numbers go to the left."""
    numeric = [all(_is_numeric(row[place]) for row in rows) for place in range(len(head))]
    kinds = [None if place == 0 or not numeric[place] else "number" for place in range(len(head))]
    top = [
        element("th", name, scope="col", class_=kind) if name else element("td")
        for name, kind in zip(head, kinds, strict=True)
    ]
    body = []
    for index, (first, *rest) in enumerate(rows):
        cells = [element("td", cell, class_=kind) for cell, kind in zip(rest, kinds[1:], strict=True)]
        mark = "differs" if index < len(marked) and marked[index] else None
        body.append(element("tr", element("th", first, scope="row"), cells, class_=mark))
    whole = element("table", element("caption", caption), element("thead", element("tr", top)), element("tbody", body))
    return element("div", whole, class_="scroll", role="region", aria_label=caption, tabindex="0")


def _is_numeric(cell: Any) -> bool:
    return isinstance(cell, (int, float)) or str(cell)[:1] in "0123456789−+—" or cell == "no number"


def folded(title: str, *children: Any) -> Markup:
    """What only opens when it is asked for."""
    return element("details", element("summary", title), *children)
