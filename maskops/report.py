"""What a person looks at after a purification: a table, a picture, and the files of the result."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from maskops._version import __version__
from maskops.checkpoint import save_masks, save_state_dict
from maskops.purify import Purification

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from maskops.backdoor import Metrics

# Okabe and Ito's colours, which the colour-blind tell apart; the dashes help in print
_LINES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))
_RATES = {"acc": "ACC", "asr_all": "asr_all", "asr_excl": "asr_excl", "ra": "RA"}
_STAGING = ".maskops-"
_SHOWN = 6
_NAMED_LAYERS = 24


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned columns: the first to the left, the others to the right. The first row is the header.

    >>> print(table([("", "ACC %"), ("before", "98.8"), ("after", "7.0")]))
            ACC %
    before   98.8
    after     7.0
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def measured(before: Metrics, after: Metrics) -> str:
    """The table of ACC and, where a trigger was given, asr_all, asr_excl and RA, before and after, in percent."""
    names = [name for name in _RATES if getattr(before, name) is not None]
    rows = [("", *(f"{_RATES[name]} %" for name in names))]
    for title, metrics in (("before", before), ("after", after)):
        rows.append((title, *(f"{100 * getattr(metrics, name):.1f}" for name in names)))
    return table(rows)


def cost(result: Purification) -> str:
    """Seconds and peak memory of the run in words.

    >>> cost(Purification(None, {}, None, {}, {"total": 2.5, "peak_bytes": 3 << 20}, {"device": None}))
    '2.5 s, peak memory 3 MiB (whole process)'
    """
    on_gpu = torch.device(result.options["device"] or "cpu").type == "cuda"
    peak = f"{result.timings['peak_bytes'] / 2**20:.0f} MiB ({'on the GPU' if on_gpu else 'whole process'})"
    return f"{result.timings['total']:.1f} s, peak memory {peak}"


def versions() -> dict[str, str]:
    """Of everything that decides the numbers of a run."""
    return {
        "maskops": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


@contextmanager
def results_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A fresh folder to write into; at the end its files move to ``path``, or vanish if the block fails.

    path:   made on entering, so that a folder that can't be written to is refused before the work begins. Files there
            stay; those of the same names are replaced at the end
    errors: OSError
    """
    path = Path(path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    staging = None
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=path))
        except OSError as error:
            raise OSError(f"results_folder: can't write to {path} ({error.strerror})") from error
        yield staging
        for file in sorted(staging.iterdir()):
            os.replace(file, path / file.name)
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # the results are in it
                folder.rmdir()


def is_empty(path: str | os.PathLike, but_for: Collection[str] = ()) -> bool:
    """Whether there is no such folder, or nothing but what a killed run may have left, and files of these names."""
    path = Path(path)
    return not path.is_dir() or all(
        entry.name.startswith(_STAGING) or entry.name in but_for for entry in path.iterdir()
    )


def write(
    folder: Path,
    result: Purification,
    before: Metrics,
    after: Metrics,
    images: Tensor,
    *,
    curves: Sequence[Metrics] = (),
    notes: Mapping[str, Any] | None = None,
) -> str | None:
    """Write ``model.safetensors``, ``masks.safetensors``, ``result.json`` and ``report.png``.

    No masks are written for a method without; for one that prunes, also ``scores.safetensors``.

    images:  a few clean images for the picture, (N, C, H, W) in [0, 1]
    curves:  measurements after each epoch
    notes:   more entries of result.json, of plain values
    returns: one sentence when there is no picture because matplotlib is missing
    """
    options = _plain(result.options)
    save_state_dict(folder / "model.safetensors", result.model.state_dict())
    for name, tensors in (("masks", result.masks), ("scores", result.scores)):
        if tensors:
            save_masks(folder / f"{name}.safetensors", tensors, options)
    content = {
        **(notes or {}),
        "before": before,
        "after": after,
        "curves": curves,
        "history": result.history,
        "timings": result.timings,
        "execution": result.execution,
        "options": options,
        "versions": versions(),
    }
    text = json.dumps({name: _plain(value) for name, value in content.items()}, indent=1, allow_nan=False)
    (folder / "result.json").write_text(text + "\n", encoding="utf-8")
    try:
        picture(result, folder / "report.png", before, after, images, curves)
    except ImportError as error:
        return str(error)
    return None


def _plain(value: Any) -> Any:
    """What JSON can represent: NaN becomes None, a dtype or device its name, measurements a dict."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence):
        return [_plain(entry) for entry in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return str(value).removeprefix("torch.")


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
        bottom.insert(0, partial(_draw_images, images=images[:_SHOWN].cpu(), trigger=result.trigger))
    rows = [draws for draws in (top, bottom) if draws]
    for row, draws in zip(np.atleast_1d(figure.subfigures(len(rows), 1, hspace=0.05)), rows, strict=True):
        for panel, draw in zip(np.atleast_1d(row.subfigures(1, len(draws), wspace=0.04)), draws, strict=True):
            draw(panel)
    figure.savefig(path, format="png")


def _title(result: Purification, before: Metrics | None, after: Metrics | None) -> str:
    parts = [str(result.options.get("method", "")).upper()]
    for name, label in _RATES.items():
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
            axes.plot(steps, values, dashes, color=colour, label=_RATES[name], **_markers(values))
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
    values = [mask.detach().float().flatten().numpy() for mask in masks.values()]
    low, high = min(0.0, *(array.min() for array in values)), max(1.0, *(array.max() for array in values))
    shares = np.stack([np.histogram(array, 20, (low, high))[0] * 100 / array.size for array in values])
    drawn = axes.imshow(
        np.ma.masked_equal(shares, 0),
        cmap="viridis_r",
        norm=LogNorm(0.01, 100, clip=True),
        extent=(low, high, len(values), 0),
        aspect="auto",
        interpolation="nearest",
    )
    step = -(-len(values) // _NAMED_LAYERS)
    names = [name.removesuffix(".mask").removesuffix(".neuron_mask") for name in masks]
    axes.set_yticks(np.arange(0.5, len(values), step), names[::step])
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
