"""Results of an evaluation as pictures: retrieval by length and depth, accuracy against density."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attnspan.planner.errors import UserError
from attnspan.planner.files import write_whole

__all__ = ["draw"]

DPI = 150
INK, FAINT = "#222222", "#6b6b6b"
# One colour for each kind of method, told apart by colour-blind readers too.
PLAN, UNIFORM, DENSE = "#3b6f8f", "#c2452d", "#222222"


def draw(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the PNGs that the content of results.json gives rise to, and return them: heat_TASK.png for each task with depths,
    density_TASK.png where methods of several densities were compared. UserError when matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the pictures need matplotlib: pip install matplotlib") from None
    out = []
    for task in dict.fromkeys(x["task"] for x in content["cells"]):
        cells = [x for x in content["cells"] if x["task"] == task and x["accuracy"] is not None]
        if any(x["depth"] is not None for x in cells):
            out.append(_save(_heat(Figure, task, cells), folder / f"heat_{task}.png"))
        totals = [x for x in content["totals"] if x["task"] == task and x["accuracy"] is not None]
        densities = content.get("densities", {})
        kept = {round(densities.get(x["method"], {}).get(str(x["length"]), 1.0), 2) for x in totals}
        if len(kept - {1.0}) > 1:
            out.append(_save(_against_density(Figure, task, totals, densities), folder / f"density_{task}.png"))
    return out


def _save(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")
    write_whole(path, buffer.getvalue())
    return path


def _heat(figure_class: Any, task: str, cells: list[dict[str, Any]]) -> Any:
    """Lengths across, depths down, one panel for each method; colour and number are the accuracy in per cent."""
    methods = list(dict.fromkeys(x["method"] for x in cells))
    lengths, depths = sorted({x["length"] for x in cells}), sorted({x["depth"] for x in cells})
    # Inches: cells wide enough for three digits, panels wide enough for the name of a method.
    wide = max(0.55 * len(lengths), 0.09 * max(map(len, methods)), 1.0)
    tall = max(0.3 * len(depths), 1.2)
    figure = figure_class(figsize=(len(methods) * (wide + 0.3) + 1.4, tall + 1.1), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    for axis, method in zip(axes, methods, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for x in cells:
            if x["method"] == method:
                grid[depths.index(x["depth"]), lengths.index(x["length"])] = 100 * x["accuracy"]
        image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                ink = "black" if value > 60 else "white"  # viridis is bright from about 60 % of its range on
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color=ink)
        axis.set_title(method, fontsize=9, color=INK, parse_math=False)
        axis.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=7.5, rotation=45 if len(lengths) > 6 else 0)
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=7.5)
        axis.tick_params(length=0, colors=INK)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("depth of the answer", fontsize=8.5, color=INK)
    figure.supxlabel("length, tokens", fontsize=8.5, color=INK)
    n = min(x["n"] for x in cells)
    figure.suptitle(f"{task}: exact answers, % (n = {n} a cell)", fontsize=10.5, color=INK, fontweight="bold")
    bar = figure.colorbar(image, ax=list(axes), fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=7.5, length=0, colors=INK)
    bar.outline.set_visible(False)
    return figure


def _against_density(figure_class: Any, task: str, totals: list[dict[str, Any]], densities: Mapping[str, Any]) -> Any:
    """Accuracy over density with 95 % intervals, one panel for each length; the dense model is a line across."""
    lengths = sorted({x["length"] for x in totals})
    figure = figure_class(figsize=(3.1 * len(lengths) + 0.6, 3.0), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    for axis, length in zip(axes, lengths, strict=True):
        rows = [(densities.get(x["method"], {}).get(str(length), 1.0), x) for x in totals if x["length"] == length]
        dense = [x for _, x in rows if x["method"] == "dense"]
        if dense:
            axis.axhline(100 * dense[0]["accuracy"], color=DENSE, linewidth=1.0, linestyle=(0, (4, 2)), label="dense")
        for colour, label, uniform in ((UNIFORM, "uniform", True), (PLAN, "plan", False)):
            line = sorted(
                ((density, x) for density, x in rows if x["method"] != "dense" and x["method"].startswith("uniform") == uniform),
                key=lambda pair: pair[0],
            )
            if line:
                middle = np.array([100 * x["accuracy"] for _, x in line])
                below = middle - [100 * x["low"] for _, x in line]
                above = [100 * x["high"] for _, x in line] - middle
                axis.errorbar(
                    [density for density, _ in line], middle, np.clip([below, above], 0, None), color=colour, marker="o",
                    markersize=4, linewidth=1.5, capsize=2.5, elinewidth=0.9, label=label,
                )  # fmt: skip
        axis.set_title(f"{length} tokens", fontsize=9, color=INK)
        axis.set_ylim(-3, 103)
        axis.set_xlim(0, 1.02)
        axis.set_xlabel("density: share of the cache kept", fontsize=8.5, color=INK)
        axis.tick_params(labelsize=8, colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0].set_ylabel("exact answers, %", fontsize=8.5, color=INK)
    axes[-1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(f"{task}: accuracy against density, 95 % intervals", fontsize=10.5, color=INK, fontweight="bold")
    return figure
