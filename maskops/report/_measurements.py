"""What was measured, and the course of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maskops.report._blocks import folded, section, table
from maskops.report._charts import Line, changes, lines, number
from maskops.report._markup import Markup, element
from maskops.report._sentences import SHARES

_UNMEASURED = (
    "No trigger was given to measure with, so nothing is known about a backdoor: neither whether there was one, nor "
    "whether it is gone."
)
_DER = "what the attack lost against what the accuracy lost, from 0 to 1; 0.5 is no change"
_MOST_ROWS = 200
_LEAST_LOST_CLASSES = 10
_RATES = "Accuracy and attack success"
_MASKS = "The masks are learned"
_OUTER = "Outer phase: the masks are learned"
_INNER = "Inner phase: the search for a trigger"
_PANELS = {
    "inner loss": _INNER,
    "outer loss": "Outer phase: the trigger is unlearned",
    "unlearning loss": "Unlearning",
    "recovery loss": "Recovery: the masks are learned",
    "curve loss": "Along the curve",
}
"""history -> the chart it stands in; the others share one."""
_NOTES = {
    _RATES: "Measured after every epoch; 0 is the model as it came.",
    _INNER: "Cross entropy of images with the trigger that is looked for, which it raises within each epoch. From "
    "epoch to epoch there should be less to find.",
    _OUTER: "Cross entropy of clean images and of those with the trigger that was found, which the masks lower.",
}


def measurements_section(content: Mapping[str, Any]) -> Markup:
    before, after = content["before"], content["after"]
    rows, known = [], []
    for field, (name, _) in SHARES.items():
        values = [measurement[field] for measurement in (before, after)]
        if field != "acc" and None in values:
            continue
        shown = ["—" if value is None else f"{100 * value:.1f} %" for value in values]
        rows.append((name, *shown, "—" if None in values else _points(*values)))
        if None not in values:
            known.append((name, *(100 * value for value in values)))
    if content.get("der") is not None:
        rows.append(("DER", "0.500", f"{content['der']:.3f}", _change(content["der"] - 0.5, 3)))
    images = content.get("evaluation_images")
    among = f", {images:,} of them" if isinstance(images, int) else ""
    numbers = table(("", "before", "after", "change"), rows, f"Measured on the same images before and after{among}")
    return section(
        "Measurements",
        element("p", _UNMEASURED) if before["asr_all"] is None else None,
        element(
            "div",
            element("div", numbers, _meanings([row[0] for row in rows]), _classes(content)),
            changes("Before and after, in percent", known) if known else None,
            class_="figures",
        ),
    )


def _meanings(names: Sequence[str]) -> Markup:
    texts = {**dict(SHARES.values()), "DER": _DER}
    return element("dl", [(element("dt", name), element("dd", texts[name])) for name in names], class_="meanings")


def _points(before: float, after: float) -> str:
    return _change(100 * (after - before), 1)


def _change(value: float, digits: int) -> str:
    """
    >>> _change(-6.44, 1), _change(0.001, 1), _change(2.0, 1)
    ('−6.4', '0.0', '+2.0')
    """
    shown = f"{abs(value):.{digits}f}"
    return shown if not float(shown) else ("−" if value < 0 else "+") + shown


def _classes(content: Mapping[str, Any]) -> Markup | None:
    pairs = list(zip(content["before"]["acc_per_class"], content["after"]["acc_per_class"], strict=True))
    known = [(after - before, index) for index, (before, after) in enumerate(pairs) if None not in (before, after)]
    if len(known) < 2:
        return None
    rows = [
        (f"class {index}", *(f"{100 * value:.1f} %" for value in pairs[index]), _points(*pairs[index]))
        for _, index in sorted(known)[:_LEAST_LOST_CLASSES]
    ]
    title = "Accuracy of each class" if len(rows) == len(pairs) else "Classes that lost the most accuracy"
    return folded(title, table(("", "before", "after", "change"), rows, "The greatest loss first"))


def course_section(content: Mapping[str, Any]) -> Markup | None:
    history = content["history"]
    others = _MASKS if content["masks"] is not None else "Training"
    others = _OUTER if "inner loss" in history else others
    panels: dict[str, list[Line]] = {}
    for name, values in history.items():
        if len(values) > 1:
            panels.setdefault(_PANELS.get(name, others), []).append(Line(name, values))
    rates = _rates(content)
    charts = [lines(_RATES, rates, "epoch", "%", _NOTES[_RATES], span=(0, 100))] if content["curves"] else []
    charts += [lines(title, of, "epoch", "loss", _NOTES.get(title)) for title, of in panels.items()]
    alone = [f"{name}: {number(values[0])}" for name, values in history.items() if len(values) == 1]
    if not charts and not alone:
        return None
    return section(
        "Course of the run",
        element("div", charts, class_="figures") if charts else None,
        element("p", "Noted once: ", "; ".join(alone), ".") if alone else None,
        _numbers([line for of in panels.values() for line in of], rates) if charts else None,
    )


def _rates(content: Mapping[str, Any]) -> list[Line]:
    """Percentages after each epoch; before the first they are those of the model as it came."""
    measurements = [content["before"], *content["curves"]]
    return [
        Line(name, [None if one[field] is None else 100 * one[field] for one in measurements], 0)
        for field, (name, _) in SHARES.items()
        if content["before"][field] is not None
    ]


def _numbers(losses: Sequence[Line], rates: Sequence[Line]) -> Markup:
    columns = {line.name: line.values for line in losses}
    columns |= {f"{line.name} %": line.values[1:] for line in rates if len(line.values) > 1}
    most = max(map(len, columns.values()))
    step = -(-most // _MOST_ROWS)
    rows = [
        (index + 1, *(number(values[index]) if index < len(values) else "—" for values in columns.values()))
        for index in sorted({*range(0, most, step), most - 1})
    ]
    caption = "Of each epoch" + (f"; every {step}th, and the last" if step > 1 else "") + "; losses are means"
    return folded("Numbers of these curves", table(("epoch", *columns), rows, caption))
