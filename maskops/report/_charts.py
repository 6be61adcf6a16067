"""Charts as SVG inside a page, drawn with its colours; the style sheet knows their classes.

They are made for a width of 360 pixels, at which their letters have the size of those around them, and also tell their
lines apart by dashes and markers, and their levels by lightness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from maskops.report._markup import Markup, element

WIDTH = 360
LEVELS = 6
"""How many lightnesses a heat map has."""

_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 52, 12, 12, 36, 220
_KINDS = 4
_MOST_POINTS, _MARKED = 400, 25
_MARKERS = ("M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "M-3-3h6v6h-6z", "M0-4l4 7h-8z", "M0-4l4 4l-4 4l-4-4z")
_LETTERS, _LETTER_WIDTH = 18, 6.4
_ROW_HEIGHTS, _MOST_ROWS_HEIGHT, _NAME_HEIGHT = (2, 18), 440, 13

Value = float | None


class Line(NamedTuple):
    """One line of a chart: its name, its values, and where they begin; a value that is None is a gap."""

    name: str
    values: Sequence[Value]
    first: int = 1


class _Scale:
    """From values to pixels, on a line or on a logarithm, and the ticks between."""

    def __init__(self, low: float, high: float, pixels: tuple[float, float], log: bool = False) -> None:
        self.log, self.pixels = log, pixels
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)
        if self.high - self.low < 1e-12 * max(1.0, abs(self.high)):
            around = 0.5 * max(1.0, abs(self.high))  # less would be lost in rounding
            self.low, self.high = self.low - around, self.high + around

    def __call__(self, value: float) -> float:
        share = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return round(self.pixels[0] + share * (self.pixels[1] - self.pixels[0]), 1)

    def ticks(self, about: int, whole: bool = False) -> list[float]:
        if self.log:
            return self._decades(about)
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
        step = max(step, 1.0) if whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(count * step, 12) for count in range(first, last + 1)]

    def _decades(self, about: int) -> list[float]:
        first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
        every = -(-max(last - first, 1) // about)
        ticks = [10.0**power for power in range(first, last + 1, every)]
        if len(ticks) >= 3:
            return ticks
        between = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
        return [tick for tick in between if self.low - 1e-9 <= math.log10(tick) <= self.high + 1e-9]


def number(value: Value, digits: int = 3) -> str:
    """
    >>> [number(value) for value in (0.123456, 120000.0, 2.0, -1e-7, None)]
    ['0.123', '1.2e+05', '2', '−1e-07', 'no number']
    """
    if value is None:
        return "no number"
    shown = f"{value:.0f}" if 10**digits <= abs(value) < 1e5 else f"{value:.{digits}g}"
    return shown.replace("-", "−", 1) if value < 0 else shown


def _labels(ticks: Sequence[float]) -> list[str]:
    """As short as they can be without saying something else.

    >>> _labels([2.0, 2.5]), _labels([2.025, 2.0275, 2.03])
    (['2', '2.5'], ['2.025', '2.0275', '2.03'])
    """
    apart = min((after - before for before, after in pairwise(ticks)), default=1.0)
    off = (max((abs(float(f"{tick:.{digits}g}") - tick) for tick in ticks), default=0.0) for digits in range(3, 16))
    digits = next((3 + more for more, most in enumerate(off) if most < 0.01 * apart), 16)
    return [number(tick, digits) for tick in ticks]


def lines(
    title: str, of: Sequence[Line], along: str, unit: str, note: Any = None, span: tuple[float, float] | None = None
) -> Markup:
    """A chart of lines over whole numbers.

    along, unit: what the two axes count
    span:        of the values; None for theirs, on a logarithmic axis where they are positive and far apart
    """
    of = [_thinned(line) for line in of]
    known = [value for _, points in of for _, value in points if value is not None]
    if not known:
        return _figure(title, note, element("p", "None of these values is a finite number.", class_="note"), None)
    places = [place for _, points in of for place, _ in points]
    log = span is None and min(known) > 0 and max(known) / min(known) > 30
    low, high = span or (min(known), max(known))
    margin = 0 if log or span else 0.04 * (high - low)
    x = _Scale(min(places), max(places), (_LEFT + 6, WIDTH - _RIGHT))
    y = _Scale(low - margin, high + margin, (_HEIGHT - _BOTTOM, _TOP), log)
    heights = y.ticks(5)
    ticks = [
        *(_y_tick(y(value), label) for value, label in zip(heights, _labels(heights), strict=True)),
        *(_x_tick(x(value), number(value)) for value in x.ticks(6, whole=True)),
    ]
    drawn = [_line(line, points, index % _KINDS, x, y, along) for index, (line, points) in enumerate(of)]
    svg = _svg(_HEIGHT, title, ticks, _titles(along, unit + (", logarithmic" if log else "")), drawn)
    return _figure(title, note, svg, [_key(index % _KINDS, _course(line)) for index, (line, _) in enumerate(of)])


def _thinned(line: Line) -> tuple[Line, list[tuple[int, Value]]]:
    """The points that are drawn: all, or of very many the first of every few, and the last."""
    points = [
        (place, value if value is None or math.isfinite(value) else None)
        for place, value in enumerate(line.values, line.first)
    ]
    step = -(-len(points) // _MOST_POINTS) or 1
    return line, points if step == 1 else [*points[:-1:step], points[-1]]


def _course(line: Line) -> str:
    known = [value for value in line.values if value is not None]
    return f"{line.name}: {number(known[0])} → {number(known[-1])}" if known else f"{line.name}: no number"


def _line(line: Line, points: list[tuple[int, Value]], kind: int, x: _Scale, y: _Scale, along: str) -> Markup:
    path, marks = [], []
    every = -(-len(points) // _MARKED)
    for there, run in groupby(points, lambda point: point[1] is not None):
        if not there:
            continue
        found = [(x(place), y(value), place, value) for place, value in run]
        path.append("M" + "L".join(f"{across} {down}" for across, down, *_ in found))
        marks += [one for index, one in enumerate(found) if index % every == 0]
    markers = [
        element(
            "path",
            element("title", f"{line.name}, {along} {place}: {number(value)}"),
            d=_MARKERS[kind],
            transform=f"translate({across} {down})",
        )
        for across, down, place, value in marks
    ]
    return element("g", element("path", d="".join(path), class_="line"), *markers, class_=f"k{kind}")


def _key(kind: int, name: str) -> Markup:
    sample = (
        element("path", d="M1 6H31", class_="line"),
        element("path", d=_MARKERS[kind], transform="translate(16 6)"),
    )
    drawn = element("svg", element("g", sample, class_=f"k{kind}"), viewBox="0 0 32 12", aria_hidden="true")
    return element("li", drawn, name)


def changes(title: str, rows: Sequence[tuple[str, float, float]], note: Any = None) -> Markup:
    """Percentages before (a ring) and after (a disc), one row each."""
    x = _Scale(0, 100, (_LEFT + 26, WIDTH - _RIGHT - 8))
    height, foot = 34 * len(rows) + 40, 34 * len(rows) + 8
    ticks = [_x_tick(x(value), f"{value:.0f}", foot) for value in range(0, 101, 25)]
    return _figure(
        title,
        note,
        _svg(height, title, ticks, [_change(row, 34 * index + 24, x) for index, row in enumerate(rows)], foot=foot),
        [_ring("before", "ring"), _ring("after", "disc")],
    )


def _change(row: tuple[str, float, float], y: int, x: _Scale) -> Markup:
    name, before, after = row
    return element(
        "g",
        element("title", f"{name}: {before:.1f} % before, {after:.1f} % after"),
        element("text", name, x=_LEFT + 14, y=y + 4, text_anchor="end"),
        element("path", d=f"M{x(before)} {y}H{x(after)}", class_="line"),
        element("circle", cx=x(before), cy=y, r=6, class_="ring"),
        element("circle", cx=x(after), cy=y, r=6, class_="disc"),
        class_="k0",
    )


def _ring(name: str, kind: str) -> Markup:
    circle = element("circle", cx=16, cy=6, r=5, class_=kind)
    drawn = element("svg", element("g", circle, class_="k0"), viewBox="0 0 32 12", aria_hidden="true")
    return element("li", drawn, name)


def heat_map(
    title: str,
    rows: Sequence[tuple[str, Sequence[int | None]]],
    levels: Sequence[str],
    ticks: Sequence[tuple[float, str]],
    along: str,
    note: Any = None,
) -> Markup:
    """A row of cells for each layer, in LEVELS lightnesses.

    rows:   the layer's name and the levels of its cells, which share the width; None for an empty one
    levels: what they mean
    ticks:  text at shares of the width
    """
    least, most = _ROW_HEIGHTS
    high = round(max(least, min(most, _MOST_ROWS_HEIGHT / len(rows))), 2)
    named = math.ceil(_NAME_HEIGHT / high)
    names = list(enumerate(_shortened([name for name, _ in rows])))[::named]
    left = math.ceil(12 + _LETTER_WIDTH * max(len(name) for _, name in names))
    width, height = WIDTH - left - _RIGHT, round(high * len(rows), 1)
    foot = height + 4
    hover = [_hover(name, left, index * high, width, high) for index, (name, _) in enumerate(rows)]
    drawn = (
        element("rect", x=left, y=2, width=width, height=height, class_="empty"),
        [_cells(level, rows, f"translate({left} 2)", width, high) for level in range(LEVELS)],
        element("g", hover, class_="hover"),
        [
            element("text", name, x=left - 6, y=round(high * (index + 0.5) + 6, 1), text_anchor="end")
            for index, name in names
        ],
        [_x_tick(left + share * width, label, foot, grid=False) for share, label in ticks],
        element("text", along, x=left + width / 2, y=foot + 29, text_anchor="middle"),
    )
    svg = element("svg", element("title", title), drawn, viewBox=f"0 0 {WIDTH} {math.ceil(height + 40)}", role="img")
    return _figure(title, note, svg, [_swatch(level, name) for level, name in enumerate(levels)])


def _cells(
    level: int, rows: Sequence[tuple[str, Sequence[int | None]]], place: str, width: float, high: float
) -> list[Markup]:
    """All cells of a level: one path for the rows of each length, in whole cells."""
    paths: dict[int, list[str]] = {}
    for index, (_, row) in enumerate(rows):
        at = 0
        for found, run in groupby(row):
            count = len(list(run))
            if found == level:
                paths.setdefault(len(row), []).append(f"M{at} {index}h{count}v1h-{count}z")
            at += count
    return [
        element("path", d="".join(path), transform=f"{place} scale({width / cells:.4f} {high})", class_=f"s{level}")
        for cells, path in paths.items()
    ]


def _hover(name: str, x: float, y: float, width: float, height: float) -> Markup:
    return element("rect", element("title", name), x=x, y=round(y + 2, 2), width=width, height=height)


def _shortened(names: Sequence[str]) -> list[str]:
    """Where one is long: names without what all begin and end with, and of those that are still long their two ends.

    >>> _shortened(["a.0", "a.1"]), _shortened(["the_network.a.0.conv", "the_network.a.1.conv"])
    (['a.0', 'a.1'], ['0', '1'])
    >>> _shortened(["a_name_of_more_letters"])
    ['a_nam…more_letters']
    """
    if max(map(len, names)) <= _LETTERS:
        return list(names)
    parts = [name.split(".") for name in names]
    first, last = (_common([each[::way] for each in parts]) for way in (1, -1))
    if first + last < min(map(len, parts)):
        names = [".".join(each[first : len(each) - last]) for each in parts]
    head = _LETTERS // 3 - 1
    return [name if len(name) <= _LETTERS else f"{name[:head]}…{name[head + 1 - _LETTERS :]}" for name in names]


def _common(parts: Sequence[Sequence[str]]) -> int:
    """How many parts the names have in common at their beginning."""
    return next((index for index, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1), 0)


def _swatch(level: int, name: str) -> Markup:
    square = element("rect", x=1, y=1, width=18, height=10, class_=f"s{level} swatch")
    return element("li", element("svg", square, viewBox="0 0 20 12", aria_hidden="true", class_="small"), name)


def _svg(height: int, title: str, *drawn: Any, foot: int = _HEIGHT - _BOTTOM) -> Markup:
    axis = element("path", d=f"M{_LEFT} {foot}H{WIDTH - _RIGHT}", class_="axis")
    return element("svg", element("title", title), axis, drawn, viewBox=f"0 0 {WIDTH} {height}", role="img")


def _x_tick(x: float, label: str, foot: float = _HEIGHT - _BOTTOM, grid: bool = True) -> Markup:
    start = _TOP if grid else foot - 2
    shown = round(x, 1)
    line = element("path", d=f"M{shown} {start}V{round(foot + 3, 1)}", class_="grid")
    return element("g", line, element("text", label, x=shown, y=round(foot + 15, 1), text_anchor="middle"))


def _y_tick(y: float, label: str) -> Markup:
    line = element("path", d=f"M{_LEFT} {y}H{WIDTH - _RIGHT}", class_="grid")
    return element("g", line, element("text", label, x=_LEFT - 6, y=y + 4, text_anchor="end"))


def _titles(along: str, unit: str) -> list[Markup]:
    middle = (_TOP + _HEIGHT - _BOTTOM) // 2
    return [
        element("text", along, x=(_LEFT + WIDTH - _RIGHT) // 2, y=_HEIGHT - 4, text_anchor="middle"),
        element("text", unit, transform=f"translate(10 {middle}) rotate(-90)", text_anchor="middle"),
    ]


def _figure(title: str, note: Any, drawn: Markup, key: Sequence[Markup] | None) -> Markup:
    caption = element("figcaption", element("h3", title), None if note is None else element("p", note))
    return element("figure", caption, drawn, None if key is None else element("ul", key, class_="key"))
