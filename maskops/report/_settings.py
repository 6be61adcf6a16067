"""What a run was given, how it ran and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskops.report._blocks import folded, section, table
from maskops.report._markup import Markup, element
from maskops.report._sentences import duration, size

_INPUTS = {
    "arch": "architecture",
    "weights": "weights",
    "clean": "clean images",
    "clean_images": "number of clean images",
    "eval": "evaluation images",
    "trigger": "trigger to measure with",
    "target": "its target class",
}
_LONGEST = 300


def settings_section(content: Mapping[str, Any]) -> Markup:
    inputs, options = content.get("inputs") or {}, content["options"]
    names = [*(name for name in _INPUTS if name in inputs), *(name for name in inputs if name not in _INPUTS)]
    given = [(_INPUTS.get(name, name), shown(inputs[name])) for name in names]
    known = table(("", "given"), given, "What the run was given") if given else None
    return section(
        "Settings",
        element("div", known, _differing(content), class_="figures"),
        folded(f"All {len(options)} options", _all_options(content)),
    )


def _differing(content: Mapping[str, Any]) -> Markup | None:
    differing, preset = content["differs_from_preset"], content["preset"]
    if differing is None:
        return None
    if not differing:
        return element("p", f"All options are those of the preset “{preset}”.")
    rows = [(name, shown(content["options"][name]), shown(value)) for name, value in differing.items()]
    return table(("option", "here", "in the preset"), rows, f"Options that differ from the preset “{preset}”")


def _all_options(content: Mapping[str, Any]) -> Markup:
    differing = content["differs_from_preset"] or {}
    rows = [(name, shown(value)) for name, value in content["options"].items()]
    caption = "Those with a dot differ from the preset" if differing else "As the run had them"
    return table(("option", "value"), rows, caption, marked=[name in differing for name, _ in rows])


def shown(value: Any) -> str:
    """
    >>> shown(True), shown(None), shown([0.5, 1 - 0.8]), shown({'width': 2})
    ('yes', 'none', '0.5, 0.2', 'width=2')
    """
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value in (None, "", [], {}, "None"):
        return "none"
    if isinstance(value, dict):
        value = [f"{name}={shown(entry)}" for name, entry in value.items()]
    text = ", ".join(map(shown, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def cost_section(content: Mapping[str, Any]) -> Markup:
    timings, execution = content["timings"], content["execution"]
    rows = [
        (name if name == "total" else f"phase: {name}", duration(value))
        for name, value in timings.items()
        if name != "peak_bytes" and value is not None
    ]
    if timings.get("peak_bytes"):
        rows.append((f"peak memory {memory_of(content)}", size(timings["peak_bytes"])))
    how = [(f"phase: {name}", text) for name, text in execution.items()]
    return section(
        "Time, memory, versions",
        element(
            "div",
            table(("", "cost"), rows, "What it took"),
            table(("", "version"), list(content["versions"].items()), "What decides the numbers"),
            table(("", "how"), how, "How the steps ran") if how else None,
            class_="figures",
        ),
    )


def memory_of(content: Mapping[str, Any]) -> str:
    return "on the GPU" if str(content["options"].get("device")).startswith("cuda") else "of the whole process"
