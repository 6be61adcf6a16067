"""A picture of the steps on one device: time, and memory beside it. Black and white print it as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.groups import COMPILED, EAGER, fastest
from benchmarks.results import Row

STYLES = {
    "official": ("#ffffff", ""),
    "best eager": ("#d9d9d9", ""),
    "best compiled": ("#ffffff", "///"),
    "maskops": ("#202020", ""),
    "floor": ("#ffffff", "|||"),
}
"""Grey and hatching of each bar, from top to bottom."""


class Bar(NamedTuple):
    """A bar in both panels; None for no number."""

    label: str
    contestant: str
    ms: float
    peak_mb: float | None


Step = tuple[str, str, Mapping[str, Row]]


def bars_of(steps: Sequence[Step]) -> dict[str, list[Bar]]:
    """By network and step: the bars from top to bottom."""
    found = {}
    for title, step, by_name in steps:
        eager, compiled = fastest(by_name, EAGER), fastest(by_name, COMPILED)
        rows = [by_name.get("official"), eager, compiled, by_name.get("maskops"), by_name.get("floor")]
        bars = [
            Bar(label, row.contestant, row.ms, float(row.peak_mb) if row.peak_mb else None)
            for label, row in zip(STYLES, rows, strict=True)
            if row is not None
        ]
        if bars:
            found[f"{title}\n{step}"] = bars
    return found


def write(path: Path, device: str, groups: Mapping[str, Sequence[Bar]]) -> str | None:
    """Write the picture; what matplotlib lacks is the reason why it isn't written, in one line.

    The same bars give the same file.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"the picture needs matplotlib, which can't be imported ({error})"
    with rc_context({"svg.hashsalt": "maskops", "svg.fonttype": "none", "font.size": 8, "hatch.linewidth": 0.6}):
        figure = Figure(figsize=(9, 1.1 + 1.25 * len(groups)), layout="constrained")
        axes = figure.subplots(len(groups), 2, squeeze=False)
        figure.suptitle(f"{device}: one step, shorter is better")
        for (title, bars), (left, right) in zip(groups.items(), axes, strict=True):
            _draw(left, [(bar, bar.ms) for bar in bars])
            _draw(right, [(bar, bar.peak_mb) for bar in bars])
            left.set_title(title, loc="left", fontsize=8)
            right.set_yticklabels([])
        axes[-1][0].set_xlabel("ms")
        axes[-1][1].set_xlabel("peak MB beyond the model and its images")
        figure.savefig(path, metadata={"Date": None})
    return None


def _draw(axis: Any, bars: Sequence[tuple[Bar, float | None]]) -> None:
    largest = max((value for _, value in bars if value is not None), default=1.0)
    for place, (bar, value) in enumerate(bars):
        colour, hatch = STYLES[bar.label]
        axis.barh(place, value or 0.0, color=colour, hatch=hatch, edgecolor="black", linewidth=0.8)
        axis.text((value or 0.0) + 0.01 * largest, place, "no number" if value is None else f"{value:.4g}", va="center")
    named = [bar.label if bar.label == bar.contestant else f"{bar.label}: {bar.contestant}" for bar, _ in bars]
    axis.set_yticks(range(len(bars)), named)
    axis.set_xlim(0, 1.15 * largest)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
