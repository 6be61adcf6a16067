"""The files of a result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from maskops.checkpoint import save_masks, save_state_dict
from maskops.purify import Purification
from maskops.report._numbers import content
from maskops.report._page import page
from maskops.report._picture import SHOWN, picture
from maskops.report._pictures import Shown

if TYPE_CHECKING:
    from maskops.backdoor import Metrics, Trigger


def write(
    folder: Path,
    result: Purification,
    before: Metrics,
    after: Metrics,
    images: Tensor,
    *,
    curves: Sequence[Metrics] = (),
    trigger: Trigger | None = None,
    preset: str = "paper",
    notes: Mapping[str, Any] | None = None,
) -> str | None:
    """Write ``model.safetensors``, ``masks.safetensors``, ``result.json``, ``report.html`` and ``report.png``.

    No masks are written for a method without; for one that prunes, also ``scores.safetensors``.

    images:  a few clean images to show, (N, C, H, W) in [0, 1]
    curves:  measurements after each epoch
    trigger: the real one that was measured with, to be shown beside the recovered one
    preset:  where the options of the run began
    notes:   more entries of result.json, of plain values; the page knows ``inputs`` (what the run was given, by name),
             ``evaluation_images`` (how many were measured on) and ``warnings``
    returns: one sentence when there is no picture because matplotlib is missing; the page needs none
    """
    images = images[:SHOWN].detach().float().cpu()
    triggers = _triggers(result, images, trigger)
    added = {name: shown.added for name, shown in triggers.items()}
    found = content(result, before, after, curves, preset, added, notes or {})
    save_state_dict(folder / "model.safetensors", result.model.state_dict())
    for name, tensors in (("masks", result.masks), ("scores", result.scores)):
        if tensors:
            save_masks(folder / f"{name}.safetensors", tensors, found["options"])
    text = json.dumps(found, indent=1, allow_nan=False)
    (folder / "result.json").write_text(text + "\n", encoding="utf-8")
    learned = result.scores or result.masks
    (folder / "report.html").write_text(page(found, learned, images, triggers), encoding="utf-8")
    try:
        picture(result, folder / "report.png", before, after, images, curves)
    except ImportError as error:
        return str(error)
    return None


def _triggers(result: Purification, images: Tensor, trigger: Trigger | None) -> dict[str, Shown]:
    triggers = {}
    if result.trigger is not None:
        triggers["recovered"] = Shown(result.trigger, (images + result.trigger).clamp(0, 1))
    if trigger is not None:
        on = next((parameter.device for parameter in result.model.parameters()), images.device)
        triggered = trigger(images.to(on)).float().cpu()  # where it was measured
        triggers["real"] = Shown((triggered - images).mean(0, keepdim=True), triggered)
    return triggers
