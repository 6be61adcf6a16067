"""Pictures for the docs, from the recorded results: what the Triton kernels take, and what the ops move."""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import moved, results
from benchmarks.kernels import table
from benchmarks.moved import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = results.ROOT / "docs" / "figures"
SOURCES = {"registers": table.FOLDER / "kernels.csv", "bytes": moved.FILE}
"""Picture -> what it is drawn from."""
PAPER, INK, FAINT = "#fefefe", "#1f2328", "#d0d7de"
DARK = {PAPER: "#0d1117", INK: "#e6edf3", FAINT: "#3d444d"}
"""What the three become where a reader's screen is dark; the colours of data stay."""
MARKS = {"80": ("o", "#0072B2"), "86": ("s", "#E69F00"), "89": ("x", "#009E73"), "90": ("D", "#CC79A7")}
THREADS = {32: 2048, 64: 1024, 128: 512, 255: 256}
"""Registers per thread, and how many threads of an SM the 65536 registers are then enough for."""
GREY, BLUE = "#9aa4ae", "#0072B2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the pictures; docs/figures")


def main(options: argparse.Namespace) -> int:
    """0 when all is well; 2 without matplotlib."""
    try:
        from matplotlib import rc_context
    except ImportError as error:
        print(f"benchmarks figures: it needs matplotlib, which can't be imported ({error})", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for name, source in SOURCES.items():
        with rc_context(_style()):
            figure = registers(table.read(source)) if name == "registers" else bytes_of_ops(moved.read(source))
            text = f"{_svg(figure)}<!-- {of(source)} -->\n"
        (options.out / f"{name}.svg").write_text(text, encoding="utf-8")
    return 0


def of(source: Path) -> str:
    """What a picture says it was drawn from."""
    return f"of {source.name}, sha256 {hashlib.sha256(source.read_bytes()).hexdigest()}"


def registers(rows: Sequence[table.Row]) -> Figure:
    """Of each kernel the most registers that a thread of it takes, on each architecture."""
    kernels = sorted({row.kernel for row in rows}, reverse=True)
    figure, axis = _figure(7.4, 1.2 + 0.21 * len(kernels))
    for offset, (capability, (mark, colour)) in zip((0.24, 0.08, -0.08, -0.24), MARKS.items(), strict=True):
        most = {kernel: _most(rows, kernel, capability, "registers") for kernel in kernels}
        places = [at + offset for at, kernel in enumerate(kernels) if most[kernel] is not None]
        values = [value for value in most.values() if value is not None]
        axis.scatter(values, places, 16, colour, marker=mark, linewidths=1, label=f"sm_{capability}", zorder=3)
    spilled = [kernel for kernel in kernels if any(_most(rows, kernel, c, "stack") for c in MARKS)]
    names = [f"{kernel.removeprefix('_')}{' (spills)' if kernel in spilled else ''}" for kernel in kernels]
    axis.set_yticks(range(len(kernels)), names)
    axis.set_ylim(-0.7, len(kernels) - 0.3)
    axis.set_xlim(0, 264)
    axis.set_xticks(list(THREADS))
    above = axis.secondary_xaxis("top")
    above.set_xticks(list(THREADS), [str(threads) for threads in THREADS.values()])
    above.tick_params(length=0)
    above.spines["top"].set_visible(False)
    above.set_xlabel("threads of an SM for which its registers are enough")
    axis.set_xlabel(f"registers per thread, the most of a kernel's cases; {_of_spills(spilled)}")
    axis.grid(axis="both")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4)
    return figure


def _most(rows: Sequence[table.Row], kernel: str, capability: str, name: str) -> int | None:
    found = (int(getattr(row, name)) for row in rows if (row.kernel, row.capability) == (kernel, capability))
    return max(found, default=None)


def _of_spills(spilled: Sequence[str]) -> str:
    return f"spilled by {len(spilled)}" if spilled else "none is spilled"


def bytes_of_ops(rows: Sequence[Row]) -> Figure:
    """What each op reads and writes, in plain torch and in ours, as multiples of the floor."""
    figure, axis = _figure(7.4, 1 + 0.3 * len(rows))
    for place, shade, label, name in ((-0.2, GREY, "plain PyTorch", "plain_bytes"), (0.2, BLUE, "maskops", "bytes")):
        values = [getattr(row, name) / row.floor_bytes for row in rows]
        axis.barh([at + place for at in range(len(rows))], values, 0.36, color=shade, label=label, zorder=3)
        for at, value in enumerate(values):
            axis.text(max(value, 1), at + place, f" {value:.2f}", va="center", fontsize=7)
    axis.axvline(1, color=INK, linewidth=0.8, zorder=4)
    axis.set_yticks(range(len(rows)), [row.op for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel(f"bytes, as multiples of the floor; {rows[0].net}, {rows[0].batch} images, {rows[0].dtype}")
    axis.grid(axis="x")
    axis.legend(loc="center right")
    return figure


def _style() -> dict[str, object]:
    inks = "text.color", "axes.labelcolor", "xtick.color", "ytick.color"
    sizes = dict.fromkeys(("font.size", "legend.fontsize", "xtick.labelsize", "ytick.labelsize", "axes.labelsize"), 8)
    sides = {f"axes.spines.{side}": False for side in ("top", "left", "right")}
    # the same results give the same file
    written = {"svg.hashsalt": "maskops", "svg.fonttype": "none", "font.family": "sans-serif"}
    colours = {**dict.fromkeys(inks, INK), "axes.edgecolor": FAINT, "grid.color": FAINT, "axes.facecolor": PAPER}
    return {**colours, **sizes, **sides, **written, "grid.linewidth": 0.6, "legend.frameon": False}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    axis = figure.subplots()
    axis.tick_params(length=0)
    axis.set_axisbelow(True)
    return figure, axis


def _svg(figure: Figure) -> str:
    """The picture as text, dark where the reader's screen is."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    rules = "".join(
        f"[style*='{part}: {light}']{{{part}:{dark} !important}}"
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark) {{{rules}}}</style>"
    before, end, after = written.getvalue().partition(" <defs>")
    return f"{before}{style}\n{end}{after}"
