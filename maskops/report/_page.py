"""The page: one HTML file about a purification, for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from torch import Tensor

from maskops.report._markup import Markup, element, join
from maskops.report._measurements import course_section, measurements_section
from maskops.report._pictures import Shown, masks_section, pruned_section, trigger_section
from maskops.report._sentences import duration, size, summary
from maskops.report._settings import cost_section, memory_of, settings_section
from maskops.report._style import STYLE

# what isn't in the file isn't loaded, and what isn't a style or an image does nothing
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(
    content: Mapping[str, Any], tensors: Mapping[str, Tensor], images: Tensor, triggers: Mapping[str, Shown]
) -> str:
    """The page as HTML that needs no other file.

    content:  as result.json holds it
    tensors:  the masks that were learned, before anything was pruned
    images:   clean images (N, C, H, W) in [0, 1] to show
    triggers: ``recovered`` and ``real`` -> what is added to images (1, C, H, W), and the images with it
    """
    title = _title(content)
    body = join(
        element("header", element("h1", title), element("p", summary(content), class_="lead"), _cards(content)),
        [element("p", "Warning: ", warning, class_="warning") for warning in content["warnings"]],
        measurements_section(content),
        course_section(content),
        trigger_section(content, images, triggers),
        masks_section(content, tensors),
        pruned_section(content),
        settings_section(content),
        cost_section(content),
        element("footer", f"Written by maskops {content['versions']['maskops']}. The numbers are in result.json too."),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    return f"<!doctype html>\n{element('html', head, element('body', element('main', body)), lang='en')}\n"


def _title(content: Mapping[str, Any]) -> str:
    method = str(content["options"].get("method", "purification")).replace("_", "-").upper()
    weights = (content.get("inputs") or {}).get("weights")
    return f"{method} on {PurePath(str(weights)).name}" if weights else f"{method}: report of a purification"


def _cards(content: Mapping[str, Any]) -> Markup:
    before, after, timings = content["before"], content["after"], content["timings"]
    shown = [
        (name, _both(before[field], after[field]), small)
        for field, name, small in (("acc", "Accuracy", "on clean images"), ("asr_all", "Attack success", "asr_all"))
        if None not in (before[field], after[field])
    ]
    if timings.get("total") is not None:
        shown.append(("Time", duration(timings["total"]), "of the purification"))
    if timings.get("peak_bytes"):
        shown.append(("Peak memory", size(timings["peak_bytes"]), memory_of(content)))
    cards = [
        element("div", element("dt", name), element("dd", value, element("small", small)))
        for name, value, small in shown
    ]
    return element("dl", cards, class_="cards")


def _both(before: float, after: float) -> str:
    return f"{100 * before:.1f} → {100 * after:.1f} %"
