"""One PNG of a purification, by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from maskops.purify import Purification
from maskops.report._masks import Distribution, layer_of
from maskops.report._tables import RATES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from maskops.backdoor import Metrics

# Okabe and Ito's colours, which the colour-blind tell apart; the dashes help in print
_LINES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))
SHOWN = 6
_NAMED_LAYERS = 24


def picture(
    result: Purification,
    path: str | os.PathLike,
    before: Metrics | None = None,
    after: Metrics | None = None,
    images: Tensor | None = None,
    curves: Sequence[Metrics] = (),
) -> None:
    """One PNG: losses, ACC and ASR, the recovered trigger, clean images with it, and the masks of each layer.

    before, after: measurements, for the title and, with ``curves``, measurements after each epoch, for their panel
    images:        clean images (N, C, H, W) in [0, 1] with C of 1 or 3, of which the first few are shown
    errors:        ImportError where matplotlib is missing
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no global state is touched
    except ImportError as error:
        raise ImportError("picture: drawing needs matplotlib: pip install maskops[report]") from error
    figure = Figure(figsize=(12, 7.6), dpi=120, layout="constrained")
    figure.suptitle(_title(result, before, after), fontsize=12)
    top: list[Callable[[SubFigure], None]] = [partial(_draw_losses, history=result.history)]
    bottom: list[Callable[[SubFigure], None]] = []
    if result.masks:
        pruned = result.scores is not None
        bottom.append(partial(_draw_masks, masks=result.scores if pruned else result.masks, before_pruning=pruned))
    if before is not None and after is not None:
        top.append(partial(_draw_rates, before=before, after=after, curves=curves))
    if result.trigger is not None:
        top.append(partial(_draw_trigger, trigger=result.trigger[0]))
    if result.trigger is not None and images is not None:
        bottom.insert(0, partial(_draw_images, images=images[:SHOWN].cpu(), trigger=result.trigger))
    rows = [draws for draws in (top, bottom) if draws]
    for row, draws in zip(np.atleast_1d(figure.subfigures(len(rows), 1, hspace=0.05)), rows, strict=True):
        for panel, draw in zip(np.atleast_1d(row.subfigures(1, len(draws), wspace=0.04)), draws, strict=True):
            draw(panel)
    figure.savefig(path, format="png")


def _title(result: Purification, before: Metrics | None, after: Metrics | None) -> str:
    parts = [str(result.options.get("method", "")).upper()]
    for name, label in RATES.items():
        values = [getattr(metrics, name, None) for metrics in (before, after)]
        if None not in values:
            parts.append(f"{label} {100 * values[0]:.1f} → {100 * values[1]:.1f} %")
    return "     ".join(parts)


def _draw_losses(panel: SubFigure, history: Mapping[str, Sequence[float]]) -> None:
    axes = _axes(panel, "Losses", "epoch", "mean cross entropy")
    for (name, values), (colour, dashes) in zip(history.items(), cycle(_LINES)):
        axes.plot(range(1, len(values) + 1), values, dashes, color=colour, label=name, **_markers(values))
    if all(value > 0 for values in history.values() for value in values):
        axes.set_yscale("log")  # the inner loss begins orders of magnitude above the others
    axes.legend(fontsize=8, frameon=False)


def _draw_rates(panel: SubFigure, before: Metrics, after: Metrics, curves: Sequence[Metrics]) -> None:
    axes = _axes(panel, "Accuracy and attack success", "epoch" if curves else "", "% of the evaluation images")
    measurements = [before, *(curves or [after])]
    steps = range(len(measurements)) if curves else ("before", "after")
    for name, (colour, dashes) in zip(("acc", "asr_all", "asr_excl"), _LINES, strict=False):
        if getattr(before, name) is not None:
            values = [100 * getattr(metrics, name) for metrics in measurements]
            axes.plot(steps, values, dashes, color=colour, label=RATES[name], **_markers(values))
    axes.set_ylim(-4, 104)
    axes.margins(x=0.2 if not curves else 0.05)
    axes.legend(fontsize=8, frameon=False)


def _draw_trigger(panel: SubFigure, trigger: Tensor) -> None:
    axes = _axes(panel, f"Recovered trigger, ‖Δ‖₁ = {trigger.abs().sum():.1f}")
    largest = max(float(trigger.abs().max()), 1e-6)
    if len(trigger) == 3:
        axes.imshow((0.5 + trigger / (2 * largest)).permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_xlabel(f"grey: unchanged; black and white: {largest:.2g} less or more", fontsize=9)
    else:
        drawn = axes.imshow(trigger.mean(0).numpy(), cmap="PuOr", vmin=-largest, vmax=largest, interpolation="nearest")
        bar = panel.colorbar(drawn, ax=axes, shrink=0.85)
        bar.set_label("added to pixels in [0, 1]", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_images(panel: SubFigure, images: Tensor, trigger: Tensor) -> None:
    panel.suptitle("Clean images, and with the recovered trigger", fontsize=10)
    rows = (images, (images + trigger).clamp(0, 1))
    grid = panel.subplots(2, len(images), squeeze=False)
    for axes, image in zip(grid.flat, torch.cat(rows), strict=True):
        image = image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()


def _draw_masks(panel: SubFigure, masks: Mapping[str, Tensor], before_pruning: bool = False) -> None:
    """One row of colours per layer: a histogram for each stays readable with a hundred layers."""
    from matplotlib.colors import LogNorm

    title = "Masks: how the values of each layer are distributed" + (", before pruning" if before_pruning else "")
    axes = _axes(panel, title, "mask value (1: weight kept, 0: removed)")
    found = Distribution.of(masks, {})
    (low, *_, high), shares = found.edges, found.shares()
    drawn = axes.imshow(
        np.ma.masked_equal(shares, 0),
        cmap="viridis_r",
        norm=LogNorm(0.01, 100, clip=True),
        extent=(low, high, len(shares), 0),
        aspect="auto",
        interpolation="nearest",
    )
    step = -(-len(shares) // _NAMED_LAYERS)
    axes.set_yticks(np.arange(0.5, len(shares), step), [layer_of(name) for name in masks][::step])
    bar = panel.colorbar(drawn, ax=axes)
    bar.set_label("% of the layer (white: none)", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _axes(panel: SubFigure, title: str, xlabel: str = "", ylabel: str = "") -> Axes:
    axes = panel.subplots()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    return axes


def _markers(values: Sequence[float]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4} if len(values) < 15 else {}
