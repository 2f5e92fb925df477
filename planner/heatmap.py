"""A plan as a picture: the span of every KV head, layer by layer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnspan.planner.errors import UserError
from attnspan.planner.files import write_whole
from attnspan.planner.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 150
INK, FAINT, BAR, MEAN = "#222222", "#6b6b6b", "#3b6f8f", "#c2452d"
# Inches around and between the panels: the density strip sits above the map.
LEFT, RIGHT, TOP, BOTTOM, GAP, STRIP = 0.75, 1.45, 0.85, 0.6, 0.16, 0.75
NUMBERED_CELL = 0.36
"""Cells at least this wide, in inches, carry their span as a number."""


def heat_map(plan: Plan, path: str | Path, n: int | None = None) -> None:
    """Write a PNG: layers across, KV heads down, colour = span at n tokens (default n_max).

    Above it the density of each layer; numbers in the cells where they fit; hatching marks sampled (lsh)
    heads. UserError when matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the heat map needs matplotlib: pip install matplotlib, or use --no-png") from None
    n = plan.n_max if n is None else n
    spans = np.minimum(plan.spans(n), n)
    layers, heads = spans.shape
    inner_w = max(layers * float(np.clip(13.0 / layers, 0.13, 0.52)), 5.0)
    inner_h = max(heads * float(np.clip(6.0 / heads, 0.12, 0.42)), 0.8)
    width, height = LEFT + inner_w + RIGHT, BOTTOM + inner_h + GAP + STRIP + TOP
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")

    def panel(x: float, y: float, w: float, h: float, **more: Any) -> Axes:
        return figure.add_axes((x / width, y / height, w / width, h / height), **more)

    axes = panel(LEFT, BOTTOM, inner_w, inner_h)
    cell_w, cell_h = inner_w / layers, inner_h / heads
    edges = [np.arange(count + 1) - 0.5 for count in (layers, heads)]
    thin = 0.6 if min(cell_w, cell_h) > 0.2 else 0.25
    image = axes.pcolormesh(*edges, spans.T, cmap="viridis", vmin=0, vmax=n, edgecolors="white", linewidth=thin)
    axes.set_xlabel("layer", color=INK)
    axes.set_ylabel("KV head", color=INK)
    axes.set_xticks(_ticks(layers, inner_w / 0.36))
    axes.set_yticks(_ticks(heads, inner_h / 0.2))
    _plain(axes)
    if cell_w >= NUMBERED_CELL and cell_h >= 0.15:
        # 72 points an inch; a digit of DejaVu Sans is about 0.64 of its size wide.
        _numbers(axes, spans, n, min(8.5, 0.84 * 72 * cell_w / (0.64 * len(str(spans.max()))), 50 * cell_h))
    sampled = _hatch_sampled(axes, plan)
    _density_strip(panel(LEFT, BOTTOM + inner_h + GAP, inner_w, STRIP, sharex=axes), spans.mean(axis=1) / n)
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_ylim(heads - 0.5, -0.5)

    bar = figure.colorbar(image, cax=panel(LEFT + inner_w + 0.22, BOTTOM, 0.17, inner_h))
    ticks = np.unique(np.linspace(0, n, 5 if inner_h >= 1.2 else 3).round().astype(int)).tolist()
    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks])
    bar.set_label("span, tokens" if inner_h >= 1.2 else "tokens", color=INK, fontsize=9, labelpad=7)
    bar.ax.tick_params(labelsize=8, colors=INK, length=3)
    bar.outline.set_visible(False)

    subtitle = f"span of each KV head at N = {n} tokens, density {plan.density(n):.3f}"
    subtitle += "; hatched: lsh (full cache, sampled)" if sampled else ""
    name = _shorten(plan.model.id, int((width - LEFT) / 0.13))  # inches per bold character of 12 points
    for text, down, style in (
        (name, 0.16, {"fontsize": 12, "fontweight": "bold", "color": INK}),
        (subtitle, 0.45, {"fontsize": 9.5, "color": FAINT}),
    ):
        figure.text(LEFT / width, 1 - down / height, text, va="top", parse_math=False, **style)  # type: ignore[arg-type]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write_whole(Path(path), buffer.getvalue())


def _shorten(text: str, room: int) -> str:
    half = room // 2 - 2
    return text if len(text) <= room else f"{text[:half]}...{text[-half:]}"


def _ticks(count: int, room: float) -> list[int]:
    """Indices to label so that at most `room` labels are drawn."""
    steps = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 65536)
    return list(range(0, count, next(step for step in steps if count / step <= max(room, 2))))


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=8, colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")
        spine.set_linewidth(0.6)


def _density_strip(axes: Axes, density: Any) -> None:
    mean = float(density.mean())
    axes.bar(np.arange(len(density)), density, width=0.86, color=BAR)
    axes.axhline(mean, color=MEAN, linewidth=1.1, linestyle=(0, (4, 2)))
    beside = axes.get_yaxis_transform()
    axes.text(1.006, mean, f"mean {mean:.2f}", color=MEAN, fontsize=8, va="center", transform=beside)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_ylabel("density", color=INK)
    _plain(axes)
    axes.tick_params(axis="x", labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)


def _numbers(axes: Axes, spans: Any, n: int, size: float) -> None:
    for (layer, head), span in np.ndenumerate(spans):
        # viridis is bright from about 60 % of its range on.
        ink = "black" if span > 0.6 * n else "white"
        axes.text(layer, head, f"{span}", ha="center", va="center", fontsize=size, color=ink)


def _hatch_sampled(axes: Axes, plan: Plan) -> bool:
    from matplotlib.patches import Rectangle

    rules = [(i, h, rule) for i, layer in enumerate(plan.rules) for h, rule in enumerate(layer)]
    corners = [(i - 0.5, h - 0.5) for i, h, rule in rules if rule.mode == "lsh"]
    for corner in corners:
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor="#00000040", linewidth=0))
    return bool(corners)
