"""Everything about a purification that is a number or a word: what ``result.json`` holds, and the page shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from maskops.backdoor import der
from maskops.purify import Purification
from maskops.purify._loop import plain_options
from maskops.purify.methods import METHODS
from maskops.report._masks import Distribution, pruned, transposed_groups
from maskops.report._tables import versions

if TYPE_CHECKING:
    from maskops.backdoor import Metrics


def content(
    result: Purification,
    before: Metrics,
    after: Metrics,
    curves: Sequence[Metrics],
    preset: str,
    triggers: Mapping[str, Tensor],
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """What JSON can represent; a number that is none (NaN, infinite) is None.

    triggers: ``recovered`` and ``real`` where they are known, what they add to images
    """
    options = plain(result.options)
    transposed = transposed_groups(result.model, result.masks)
    measured = before.asr_excl is not None and after.asr_excl is not None
    found = {
        "warnings": list(notes.get("warnings", ())),
        "preset": preset,
        "differs_from_preset": _differing(options, preset),
        "before": before,
        "after": after,
        "der": der(before, after) if measured and not math.isnan(before.asr_excl + after.asr_excl) else None,
        "curves": curves,
        "history": result.history,
        "triggers": {name: _sizes(added) for name, added in triggers.items()},
        "masks": vars(Distribution.of(result.scores or result.masks, transposed)) if result.masks else None,
        "pruned": pruned(result.masks, result.scores, transposed) if result.scores else None,
        "timings": result.timings,
        "execution": result.execution,
        "options": options,
        "versions": versions(),
    }
    return plain({**notes, **found})


def plain(value: Any) -> Any:
    """What JSON can represent: NaN becomes None, a dtype or device its name, measurements a dict."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence):
        return [plain(entry) for entry in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return str(value).removeprefix("torch.")


def _differing(options: Mapping[str, Any], preset: str) -> dict[str, Any] | None:
    """option -> the preset's value, where the run had another; None for a method or preset that isn't known.

    What the preset leaves to the run, as ``"auto"`` or the model's device, is no difference.
    """
    method = METHODS.get(options.get("method"))
    if method is None or preset not in tuple(method.presets):
        return None
    of_preset = {name: value for part in method.presets[preset] for name, value in plain_options(part).items()}
    return {
        name: value
        for name, value in plain(of_preset).items()
        if name in options and options[name] != value and value != "auto" and name != "device"
    }


def _sizes(added: Tensor) -> dict[str, float]:
    return {"l1": added.abs().sum().item(), "largest": added.abs().max().item()}
